"""Where data sets, caches and downloads live, and how a file is written whole or not at all."""

import contextlib
import difflib
import os
import tempfile
from pathlib import Path

import pooch

PROJECT = Path(__file__).resolve().parents[2]


def data_root():
    """Folder with data sets: ``FACEADV_DATA``, or ``data/`` of this checkout."""
    return Path(os.environ.get("FACEADV_DATA") or PROJECT / "data").expanduser()


def cache_root():
    """Folder for chips and downloaded weights: ``FACEADV_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("FACEADV_CACHE") or pooch.os_cache("faceadv")).expanduser()


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside ``path``; it takes ``path``'s place when the block ends without an error.

    A reader never sees half a file, and a block that fails leaves the old file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's, and safetensors', are for the owner alone
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def nearest(name, names):
    """The words ", did you mean …?" for a mistyped name, or nothing."""
    close = difflib.get_close_matches(str(name), list(names), n=2)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
