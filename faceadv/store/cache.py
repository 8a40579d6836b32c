"""One cache for all that is made from something else and may be made again: chips, embeddings, cloaks, digests.

An entry is a folder ``ROOM/NAME-KEY``. The key is a hash of the *content* of everything the entry depends on
(``key``); beside the files lies ``entry.json`` with the size, the SHA-256 and, for arrays, the shape of each. What is
not as it was written is made again, with one line that says so. Entries are written whole or not at all, and two
processes that want the same one do the work once.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from faceadv.errors import Failed
from faceadv.store.paths import cache_root, replacing, scratch
from faceadv.store.progress import log

try:
    import fcntl
except ImportError:  # not a Unix: two processes then may do the same work twice
    fcntl = None

__all__ = ["array", "content", "entry", "key", "read_json", "sha256", "write_json"]

VERSION = 1  # of the layout of entries
NOTE = "entry.json"


def key(*parts) -> str:
    """A hash of arrays, tensors, modules, bytes, files and whatever JSON can hold, 24 hexadecimal digits.

    Parts may be nested in lists and dicts. A ``Path`` stands for the content of its file, a module for its weights.
    """
    digest = hashlib.sha256()
    for part in parts:
        _feed(digest, part)
    return digest.hexdigest()[:24]


def _feed(digest, part):
    if hasattr(part, "state_dict"):
        part = part.state_dict()
    if hasattr(part, "detach"):
        part = part.detach().cpu().numpy()
    if isinstance(part, dict):
        part = [[name, part[name]] for name in sorted(part)]
    if isinstance(part, np.ndarray):
        digest.update(f"array {part.dtype.str} {part.shape} ".encode())
        digest.update(np.ascontiguousarray(part).data)
    elif isinstance(part, bytes):
        digest.update(b"bytes %d " % len(part) + part)
    elif isinstance(part, Path):
        digest.update(f"file {sha256(part)} ".encode())
    elif isinstance(part, (list, tuple)):
        digest.update(f"list {len(part)} ".encode())
        for one in part:
            _feed(digest, one)
    else:
        digest.update(f"value {json.dumps(part)} ".encode())


def entry(room: str, name: str, key: str, make: Callable[[Path], object]) -> Path:
    """The folder of an entry. ``make(folder)`` writes its files if it is not here, or not as it was written.

    Raises ``Failed`` if the cache cannot be written, and what ``make`` raises; nothing is kept then.
    """
    home = cache_root() / room / f"{name}-{key}"
    if damage(home) is None:
        return home
    with _writing(home), _lock(home):
        reason = damage(home)
        if reason is None:  # another process made it meanwhile
            return home
        if os.path.lexists(home):
            log.warning("%s in the cache is damaged (%s) and is made again.", home.name, reason)
            _remove(home)
        for leftover in home.parent.glob(f".{home.name}.*"):  # of runs that were killed: nobody else has the lock
            _remove(leftover)
        with scratch(home) as work:
            make(work)
            note = {"version": VERSION, "files": {path.name: _facts(path) for path in sorted(work.iterdir())}}
            (work / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")
            work.rename(home)
    return home


def array(room: str, name: str, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array kept as an entry, made by ``make()`` if need be. Errors as for ``entry``."""
    home = entry(room, name, key, lambda folder: np.save(folder / "array.npy", make()))
    return np.load(home / "array.npy")


def damage(home: Path) -> str | None:
    """Why a folder is no whole entry, in a few words, or None if it is one."""
    if not os.path.lexists(home):
        return "it is not there"
    try:
        note = json.loads((home / NOTE).read_text(encoding="utf-8"))
        if note["version"] != VERSION:
            return "of another version"
        for name, facts in note["files"].items():
            path = home / name
            if path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "something is missing"
    return None


def _facts(path):
    facts = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if path.suffix == ".npy":
        made = np.load(path, mmap_mode="r")
        facts |= {"shape": list(made.shape), "dtype": made.dtype.str}
    return facts


@contextlib.contextmanager
def _writing(home):
    """Turn errors of a cache that cannot be written into a sentence."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR):
            raise
        reason = os.strerror(e.errno).lower()
        raise Failed(f"The cache under {cache_root()} cannot be written ({reason}): set FACEADV_CACHE.") from e


@contextlib.contextmanager
def _lock(home):
    """Held while an entry is made; the system lets go of it when a process is killed."""
    place = cache_root() / "locks" / home.name
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place, "w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, computed again only when its size, its time of change or the file itself is another."""
    stat = Path(path).stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=1024)
def _sha256(path, *state):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content(name: str, files: Sequence[Path]) -> str:
    """A hash of the content of many files, in their order. It is kept, so that unchanged files are not read again.

    As for git, a file counts as unchanged while its place, size and time of change are the same.
    """
    stats = [(str(path), stat.st_size, stat.st_mtime_ns) for path in files for stat in [os.stat(path)]]

    def read():
        digests = [hashlib.sha256(path.read_bytes()).digest() for path in files]
        return np.frombuffer(hashlib.sha256(b"".join(digests)).digest(), np.uint8)

    return array("digests", name, key(stats), read).tobytes().hex()


def write_json(path: Path, value) -> None:
    """Write a value as JSON with its checksum, whole or not at all."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    with replacing(path) as part:
        part.write_text(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n", encoding="utf-8")


def read_json(path: Path):
    """The value in a file of ``write_json``; None if there is none, or, with a line, if it is not as it was written."""
    try:
        text, digest = path.read_text(encoding="utf-8").split("\n")[:2]
        if hashlib.sha256(text.encode()).hexdigest() == digest:
            return json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        pass
    log.warning("%s is damaged and is made again.", path.name)
    return None
