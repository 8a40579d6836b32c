"""Where data sets, caches and downloads live, and how a file is written whole or not at all."""

import contextlib
import difflib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pooch
from filelock import FileLock, Timeout

from faceadv.errors import Failed, Invalid

__all__ = ["PROJECT", "alone", "cache_root", "data_root", "meant", "nearest", "replacing", "scratch", "settle"]

PROJECT = Path(__file__).resolve().parents[2]


def data_root() -> Path:
    """Folder with data sets: ``FACEADV_DATA``, or ``data/`` of this checkout."""
    return meant(os.environ.get("FACEADV_DATA") or PROJECT / "data")


def cache_root() -> Path:
    """Folder for chips and downloaded weights: ``FACEADV_CACHE``, or the user's cache folder."""
    try:
        return meant(os.environ.get("FACEADV_CACHE") or pooch.os_cache("faceadv"))
    except RuntimeError as e:  # a user whom the system does not know, and no HOME
        raise Failed("Your home folder, for the cache, is not known: set FACEADV_CACHE to a folder.") from e


def meant(path: str | Path) -> Path:
    """The absolute path that somebody means who types this here. ``Invalid`` for ~ where there is no home folder."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as e:
        raise Invalid(f"{path} begins with ~, and your home folder is not known: write the whole path.") from e


def settle() -> None:
    """Make ``FACEADV_DATA`` and ``FACEADV_CACHE`` absolute, because a notebook's kernel runs in another folder."""
    for name in ("FACEADV_DATA", "FACEADV_CACHE"):
        if os.environ.get(name):
            os.environ[name] = str(meant(os.environ[name]))


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
def alone(file: str | Path) -> Iterator[None]:
    """A context in which nobody else who asks for this file writes into its folder. Raises ``Failed``."""
    folder, lock = Path(file).parent, FileLock(file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as e:
        raise Failed(f"Another run is writing into {folder}: wait for its end, or choose another folder.") from e
    except OSError as e:
        raise Failed(f"{folder} cannot be written ({e.strerror}): choose another folder.") from e
    with lock:
        yield


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
    name = path.name if len(os.fsencode(path.name)) < 200 else path.name[:40]  # a disk takes 255 bytes
    return path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}")


def nearest(name: str, names: Iterable[str]) -> str:
    """The words " (did you mean …?)" for a mistyped name, or nothing."""
    close = difflib.get_close_matches(str(name), list(names), n=2)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
