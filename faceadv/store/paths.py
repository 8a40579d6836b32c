"""Where data sets, caches and downloads live, and how a file is written whole or not at all."""

import contextlib
import difflib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pooch

__all__ = ["PROJECT", "cache_root", "data_root", "nearest", "replacing", "scratch"]

PROJECT = Path(__file__).resolve().parents[2]


def data_root() -> Path:
    """Folder with data sets: ``FACEADV_DATA``, or ``data/`` of this checkout."""
    return Path(os.environ.get("FACEADV_DATA") or PROJECT / "data").expanduser()


def cache_root() -> Path:
    """Folder for chips and downloaded weights: ``FACEADV_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("FACEADV_CACHE") or pooch.os_cache("faceadv")).expanduser()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes ``path``'s place when the block ends without an error.

    A reader never sees half a file, and a block that fails leaves the old file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    part.touch(0o666, exist_ok=False)
    mode = part.stat().st_mode & 0o777  # what the user's umask allows; safetensors lets only the owner read its files
    try:
        yield part
        os.chmod(part, mode)
        os.replace(part, path)
    except OSError as e:
        # the error of a full disk names no file; an error with a text of its own would lose it
        if e.errno and not e.filename:
            e.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``, to be filled and renamed to it; what is left of it at the end is deleted."""
    work = _beside(Path(path))
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _beside(path):
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


def nearest(name: str, names: Iterable[str]) -> str:
    """The words " (did you mean …?)" for a mistyped name, or nothing."""
    close = difflib.get_close_matches(str(name), list(names), n=2)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
