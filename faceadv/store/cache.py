"""One cache for all that is made from something else and may be made again: chips, embeddings, cloaks, digests.

An entry is a folder ``ROOM/NAME-KEY``. The key is a hash of the *content* of everything the entry depends on
(``key``). Beside the files lies ``entry.json`` with the size and the SHA-256 of each, and the shape of arrays. An entry
that is not as it was written is made again, and one line says so. Entries are written whole or not at all, and two
processes that want the same one do the work once.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from glob import escape
from importlib import metadata
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from faceadv.errors import Failed
from faceadv.store.paths import cache_root, replacing, scratch
from faceadv.store.progress import log

__all__ = ["LIBRARIES", "array", "content", "entry", "key", "lock", "read_json", "sha256", "versions", "write_json"]

VERSION = 1  # of the layout of entries
NOTE = "entry.json"
# what numbers are made with: another version may give others
LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "facenet-pytorch", "diffusers", "torchmetrics", "scikit-learn")
LIBRARIES += ("scipy",)
# the error of a read-only mount is not a PermissionError
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}
YOUNG = 2  # seconds: two changes of a file within one tick of its file system's clock look like one
_known = {}


def key(*parts: object) -> str:
    """A hash of arrays, tensors, modules, bytes, files and whatever JSON can hold, 24 hexadecimal digits.

    Parts may be nested in lists and dicts. A ``Path`` stands for the content of its file, a module for its layers,
    weights and public attributes (those that a key can be made of; not whether it is in training mode). Raises
    ``TypeError`` for anything else.
    """
    digest = hashlib.sha256()
    for part in parts:
        _feed(digest, part)
    return digest.hexdigest()[:24]


def _feed(digest, part):
    if hasattr(part, "state_dict"):
        part = ["module", repr(part), part.state_dict(), _options(part)]
    if hasattr(part, "detach"):
        part = part.detach().cpu()
        try:
            part = part.numpy()
        except TypeError:  # NumPy has no bfloat16, whose values float32 holds exactly
            part = [str(part.dtype), part.float().numpy()]
    if isinstance(part, np.ndarray) and not part.dtype.hasobject:
        digest.update(f"array {part.dtype.str} {part.shape} ".encode())
        digest.update(np.ascontiguousarray(part).data)
    elif isinstance(part, bytes):
        digest.update(b"bytes %d " % len(part) + part)
    elif isinstance(part, Path):
        digest.update(f"file {sha256(part)} ".encode())
    elif isinstance(part, (list, tuple, dict)):
        pairs = isinstance(part, dict)
        digest.update(f"{'dict' if pairs else 'list'} {len(part)} ".encode())
        for one in sorted(part.items(), key=lambda item: repr(item[0])) if pairs else part:
            _feed(digest, one)
    else:
        digest.update(f"value {json.dumps(part.item() if isinstance(part, np.generic) else part)} ".encode())


def _options(module):
    """Keys of the public attributes of a module and of those in it, by their names."""
    found = {}
    for place, part in module.named_modules() if hasattr(module, "named_modules") else ():
        for name, value in vars(part).items():
            if not name.startswith("_") and name != "training":
                with contextlib.suppress(TypeError):  # of a function, for example, which has no content
                    found[f"{place}.{name}"] = key(value)
    return found


def versions() -> dict[str, str]:
    """The versions of ``LIBRARIES``, which belong in the key of whatever was computed."""
    return {name: metadata.version(name) for name in LIBRARIES}


@contextlib.contextmanager
def lock(name: str, busy: str = "", wait: bool = True) -> Iterator[None]:
    """A context that one process, and in it one thread, can be in at a time.

    Parameters
    ----------
    name : of the lock; the same thread may hold it more than once
    busy : a sentence for the log when there is somebody to wait for
    wait : without it that sentence is the error instead

    Raises
    ------
    Failed : if another one is in it and ``wait`` is off, or if the cache cannot be written
    """
    with _writing():
        held = FileLock(cache_root() / "locks" / name, is_singleton=True)
        try:
            held.acquire(timeout=0)
        except Timeout as e:
            if not wait:
                raise Failed(busy) from e
            if busy:
                log.warning(busy)
            held.acquire()
    try:
        yield
    finally:
        held.release()


def entry(room: str, name: str, key: str, make: Callable[[Path], object]) -> Path:
    """The folder of an entry. ``make(folder)`` writes its files if it is not here, or not as it was written.

    Parameters
    ----------
    room, name : where it lies in the cache
    key : a hash of all that the entry depends on, from ``cache.key``
    make : writes the files of the entry into an empty folder

    Raises
    ------
    Failed : if the cache cannot be written
    Exception : what ``make`` raises; nothing is kept then
    """
    name = re.sub(r"[^\w.-]+", "_", name)[:60]  # it may be the name of any folder
    home = cache_root() / room / f"{name}-{key}"
    if _damage(home) is None:
        return home
    with _writing(), lock(f"{room}-{home.name}"):
        reason = _damage(home)
        if reason is None:  # another process made it meanwhile
            return home
        if os.path.lexists(home):
            log.warning("%s in the cache is damaged (%s) and is made again.", home.name, reason)
            _remove(home)
        for leftover in home.parent.glob(f".{escape(home.name)}.*"):  # of killed runs: nobody else has the lock
            _remove(leftover)
        with scratch(home) as work:
            make(work)
            made = {path.relative_to(work).as_posix(): path for path in sorted(work.rglob("*")) if path.is_file()}
            note = {"version": VERSION, "files": {name: _facts(path) for name, path in made.items()}}
            (work / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")
            work.rename(home)
    return home


def array(room: str, name: str, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that is kept as an entry.

    Parameters
    ----------
    room, name, key : as for ``entry``, with its errors
    make : computes the array; called only if the entry is not here, or not as it was written
    """
    home = entry(room, name, key, lambda folder: np.save(folder / "array.npy", make(), allow_pickle=False))
    return np.load(home / "array.npy")


def _damage(home: Path) -> str | None:
    """Why a folder is no whole entry, in a few words, or None if it is one."""
    try:
        note = json.loads((home / NOTE).read_text(encoding="utf-8"))
        if note["version"] != VERSION:
            return "it is of another version"
        if not note["files"]:
            return "something is missing"
        for name, facts in note["files"].items():
            if (home / name).stat().st_size != facts["bytes"] or sha256(home / name) != facts["sha256"]:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "something is missing"
    return None


def _facts(path):
    facts = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if path.suffix == ".npy":
        made = np.load(path, mmap_mode="r" if facts["bytes"] > 256 else None)  # an empty array cannot be mapped
        facts |= {"shape": list(made.shape), "dtype": made.dtype.str}
    return facts


@contextlib.contextmanager
def _writing():
    """Turn the errors of a cache that cannot be written into a sentence."""
    try:
        (cache_root() / "locks").mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        root, place = (os.path.abspath(path) for path in (cache_root(), e.filename or cache_root()))
        number = errno.ENOSPC if str(e).endswith(" written") else e.errno  # NumPy counts bytes instead
        # a file that lies elsewhere could not be read: that is not about the cache
        if number not in UNWRITABLE or os.path.commonpath([root, place]) not in (root, place):
            raise
        reason = os.strerror(number).lower()
        raise Failed(f"The cache under {root} cannot be written ({reason}): set FACEADV_CACHE.") from e


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _state(path):
    """What tells that a file has changed without reading it, and whether it has been as it is for a moment."""
    stat = os.stat(path)
    state = os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
    return state, time.time() - max(stat.st_mtime, stat.st_ctime) > YOUNG


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, computed again only when its size, its times of change or the file itself is another."""
    state, settled = _state(path)
    if state in _known:
        return _known[state]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if settled:
        _known[state] = digest
    return digest


def content(name: str, files: Sequence[Path]) -> str:
    """A hash of the content of many files, in their order. It is kept, so that unchanged files are not read again.

    As for git, a file counts as unchanged while its place, size and times of change are the same. What is no regular
    file, or cannot be read, has no content.
    """
    files = [path for path in files if os.path.isfile(path) and os.access(path, os.R_OK)]
    states = [_state(path) for path in files]

    def read():
        digests = [hashlib.sha256(Path(path).read_bytes()).digest() for path in files]
        return np.frombuffer(hashlib.sha256(b"".join(digests)).digest(), np.uint8)

    if not all(settled for _, settled in states):
        return read().tobytes().hex()
    with contextlib.suppress(Failed):  # the cache cannot be written: the files are read each time
        return array("digests", name, key(json.dumps([state for state, _ in states])), read).tobytes().hex()
    return read().tobytes().hex()


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON with its checksum, whole or not at all."""
    text = json.dumps(value, allow_nan=False)  # in ASCII: a name may be no Unicode
    if path.is_dir():  # ``read_json`` has said that it is damaged
        _remove(path)
    with replacing(path) as part:
        part.write_text(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n", encoding="utf-8")


def read_json(path: Path) -> object:
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
