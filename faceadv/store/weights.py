"""Weights: what ships, what can be fetched (``sources.yaml``), and the check that each is what it was."""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from faceadv.errors import Failed, Invalid, Missing
from faceadv.store import cache
from faceadv.store.datasets import SOURCES, download
from faceadv.store.paths import cache_root, nearest, replacing

__all__ = [
    *("check", "check_one", "checked", "enter", "fetch", "fetched", "find", "half", "layout", "listing"),
    *("load_safetensors", "names", "need", "read_state", "remembered", "ship", "shipped"),
]

SHIPPED = Path(__file__).parents[1] / "models"
PACKAGED, DOWNLOADS = SOURCES["packaged"], SOURCES["downloads"]
SHIPS = "ships (its SHA-256 differs): install it again, or restore it from the repository"
FETCHED = "was published, or first fetched (its SHA-256 differs): delete it and fetch it again"
PUBLISHED = {row["file"]: row["sha256"] for row in DOWNLOADS.values() if "sha256" in row}


def shipped() -> dict[str, dict[str, str]]:
    """What ships, from ``models/SHA256SUMS``: by its name, the SHA-256 of each file by its path in ``models/``.

    A name is one file, ``NAME.safetensors``, or a folder.
    """
    sums, found = SHIPPED / "SHA256SUMS", {}
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.exists() else []:
        digest, _, path = line.partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", digest) or not path:
            raise Invalid(f"{sums.name} in models/ is damaged: install this package again, or restore the file.")
        found.setdefault(Path(path).parts[0].removesuffix(".safetensors"), {})[path] = digest
    return found


def fetched() -> dict[str, str]:
    """The SHA-256 of each fetched file of weights that is here, by the name of the weights."""
    return {row["name"]: cache.sha256(row["path"]) for row in listing() if row["found"] and row["name"] in DOWNLOADS}


def names() -> list[str]:
    """All names that ``find`` knows."""
    return [*PACKAGED, *shipped(), *DOWNLOADS]


def listing() -> list[dict]:
    """All weights as dicts: name, what, size, path (or None), found."""
    rows = []
    for name in names():
        what = (PACKAGED | DOWNLOADS).get(name, {"what": "trained here, shipped"})["what"]
        rows.append({"name": name, "what": what, "size": "", "path": None, "found": False})
        with contextlib.suppress(Missing):
            size = sum(file.stat().st_size for file in _files(name)) / 1e6
            rows[-1] |= {"size": f"{size:.1f} MB", "path": find(name), "found": True}
    return rows


def find(name: str) -> Path:
    """Path of the weights, or of their folder if they are several files ("mtcnn", "prior").

    Raises ``Missing`` saying how to get them, ``Invalid`` for an unknown name.
    """
    files = list(_files(name))
    return files[0] if len(files) == 1 else Path(os.path.commonpath(files))


def _files(name):
    """The SHA-256 of each file by its path; None if only its first use can tell. Errors as for ``find``."""
    if "hub" in DOWNLOADS.get(name, {}):
        return {file: _known(file) for file in _hub_files(name)}
    if name in DOWNLOADS:
        file, ours, hub = DOWNLOADS[name]["file"], cache_root() / "weights", Path(torch.hub.get_dir())
        # the other two are where torch and facenet-pytorch themselves keep downloads
        for folder in (ours, hub / "checkpoints", hub.parent / "checkpoints"):
            if (folder / file).is_file():
                return {folder / file: _known(folder / file)}
        fetch = f"run `faceadv weights fetch {name}` with a network, or put {file} into {ours}"
        raise Missing(f"The weights of {name} are missing: {fetch}.")
    if name not in names():
        raise Invalid(f'There are no weights "{name}"{nearest(name, names())}; there are {", ".join(names())}.')
    place, sums, whose = SHIPPED, shipped().get(name), "this repository"
    if name in PACKAGED:
        package, folder, sums = (PACKAGED[name][key] for key in ("package", "folder", "files"))
        spec, whose = importlib.util.find_spec(package), f"the package {package}"  # found, not imported
        place = Path(spec.submodule_search_locations[0] if spec else package) / folder
    for file in sums:
        if not (place / file).is_file():
            raise Missing(f"{Path(file).name} is missing, which comes with {whose}: install it again.")
    return {place / file: digest for file, digest in sums.items()}


def _hub_files(name):
    """The files of weights that the cache of the Hugging Face hub has of a model. Raises ``Missing`` without any."""
    from huggingface_hub import snapshot_download  # takes half a second
    from huggingface_hub.errors import LocalEntryNotFoundError

    found = []
    with contextlib.suppress(LocalEntryNotFoundError):
        folder = Path(snapshot_download(DOWNLOADS[name]["hub"], local_files_only=True))
        found = sorted(file for ending in ("bin", "safetensors") for file in folder.rglob(f"*.{ending}"))
    if not found:
        raise Missing(f"The weights of {name} are missing: run `faceadv weights fetch {name}` with a network.")
    return found


def need(*names: str) -> None:
    """Raise ``Missing``, with the command, if one of these is to be fetched and is not here. Other names pass."""
    missing = []
    for name in dict.fromkeys(names):
        with contextlib.suppress(Missing):
            if name not in DOWNLOADS or find(name):
                continue
        missing.append(name)
    if missing:
        commands = " and ".join(f"`faceadv weights fetch {name}`" for name in missing)
        raise Missing(f"This needs weights that are not here: run {commands} with a network.")


def fetch(name: str, release: str | None = None) -> Path:
    """Download weights and return their path; those that are there already are left alone.

    release: the address of the folder that has the file, by default its publisher's. The files of VGGFace2 and AlexNet
    are checked by SHA-256. For the others no hash is known: the first download is trusted if it loads with
    ``weights_only=True`` as the tensors of its network. Its SHA-256 is written beside it (``.sha256``) and checked at
    every later load. Raises ``Invalid`` for an unknown name, ``Failed`` if the download fails or holds something else.
    """
    if name not in DOWNLOADS:
        return find(name)
    with contextlib.suppress(Missing):  # before any lock, which a cache that can only be read does not have
        return find(name)
    with cache.lock(f"weights-{name}", f"Another process is fetching {name}: this one waits for its end."):
        with contextlib.suppress(Missing):
            return find(name)
        row = DOWNLOADS[name]
        if "hub" in row:
            return _fetch_from_hub(name)
        path = cache_root() / "weights" / row["file"]
        _note(path).unlink(missing_ok=True)  # it is of a file that was deleted
        digest = PUBLISHED.get(path.name)

        def accept(part):
            if not digest and layout(_read_torch(part, path.name)) != row["layout"]:
                raise Failed(f"{path.name} does not hold the weights of {row['network']} and was not kept.")

        download((release or row["host"]) + path.name, path, digest, accept)
        _remember(path)
        return path


def _fetch_from_hub(name):
    """As ``networks.prior.load`` will ask for it. Raises ``Failed`` if that fails."""
    from diffusers import DDPMPipeline  # takes seconds

    try:
        DDPMPipeline.download(DOWNLOADS[name]["hub"])
    except (OSError, ValueError) as e:
        raise Failed(f"{name} could not be fetched from the Hugging Face hub: try again with a network.") from e
    with remembered(_hub_files(name)):
        return find(name)


def layout(state: Mapping[str, torch.Tensor]) -> str:
    """A hash of names and shapes, without the counters of batch normalisation, which files of 2018 may lack."""
    shapes = sorted([key, list(v.shape)] for key, v in state.items() if not key.endswith("num_batches_tracked"))
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a torch file, loaded with ``weights_only=True`` after its SHA-256 was checked.

    The hash is the published one, or the one beside the file (``.sha256``). If there is none, the file is trusted, and
    its hash is written there now. Raises ``Missing`` if there is no such file, ``Invalid`` if the hash differs,
    ``Failed`` if the file holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise Missing(f"There is no file {path}: `faceadv weights list` shows which weights are here.")
    with remembered([path]):
        return _read_torch(path)


@contextlib.contextmanager
def remembered(paths: Iterable[Path]) -> Iterator[None]:
    """A context that reads files of others, whose SHA-256 is known from the first time that it ended without an error.

    Raises ``Invalid``, before the files are read, if one is not what it was.
    """
    _compare({path: _known(path) for path in paths}, FETCHED)
    yield
    for path in paths:
        with contextlib.suppress(OSError):  # somebody else's folder, or a read-only disk: every use is the first
            _remember(path)


def _note(path):
    return path.with_name(path.name + ".sha256")


def _known(path):
    """The SHA-256 that a fetched file must have, or None."""
    note = _note(path)
    noted = note.read_text(encoding="utf-8", errors="replace").strip() if note.exists() else None
    return PUBLISHED.get(path.name, noted)


def _remember(path):
    if _known(path) is None:
        with replacing(_note(path)) as part:
            part.write_text(cache.sha256(path) + "\n", encoding="utf-8")


def _compare(files, fate):
    """Raise ``Invalid`` if one of the files is not what it was."""
    for path, digest in files.items():
        if digest is not None and digest != cache.sha256(path):
            raise Invalid(f"{path if fate is FETCHED else path.name} is not the file that {fate}.")


def _read_torch(path, shown=None):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise Invalid("no state dict")
    except (PermissionError, MemoryError):  # which are no fault of the file
        raise
    except Exception as e:  # torch raises a dozen kinds for a file that is not its own
        raise Failed(f"{shown or path} does not hold network weights (an error page, or cut short?).") from e
    return state


def load_safetensors(name: str) -> dict[str, torch.Tensor]:
    """The tensors of shipped weights by their names. Errors as for ``checked``."""
    return load_file(checked(name))


def checked(name: str) -> Path:
    """Path of shipped weights, of their folder if they are one, after each file's SHA-256 was checked.

    Raises ``Invalid`` if one differs or nothing of that name ships, ``Missing`` if a file is missing.
    """
    if name not in shipped():
        raise Invalid(f'No weights "{name}" ship{nearest(name, shipped())}.')
    _compare(_files(name), SHIPS)
    return find(name)


def half(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, floats in float16.

    Raises ``Invalid`` if a tensor does not survive that: if a value overflows or is not finite, or if one changes by
    more than a thousandth of the tensor's largest. (Tiny values beside large ones may become 0, as in every network.)
    """
    ready = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    for key, exact in ready.items():
        if exact.is_floating_point() and exact.numel():
            ready[key] = exact.half()
            if not (ready[key].double() - exact.double()).abs().max() <= exact.abs().max() / 1000:  # NaN is not
                raise Invalid(f"{key} holds values that float16 cannot: scale it, or ship it as a whole number.")
    return ready


def ship(name: str, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write ``models/NAME.safetensors`` in float16 (see ``half``) and its line in ``models/SHA256SUMS``: its path."""
    path = SHIPPED / f"{name}.safetensors"
    ready = half(tensors)
    with replacing(path) as part:
        save_file(ready, part)
    enter(name, [path])
    return path


def enter(name: str, files: Iterable[Path]) -> None:
    """Write the SHA-256 of shipped files into ``models/SHA256SUMS``, in place of what it has of that name."""
    mine = {name: {path.relative_to(SHIPPED).as_posix(): cache.sha256(path) for path in files}}
    with cache.lock("ship"), replacing(SHIPPED / "SHA256SUMS") as part:  # no other process's line is lost
        lines = sorted((path, digest) for paths in (shipped() | mine).values() for path, digest in paths.items())
        part.write_text("".join(f"{digest}  {path}\n" for path, digest in lines), encoding="utf-8")


def check() -> list[tuple[bool, str]]:
    """Whether all weights that are here are whole: a list of (ok, sentence)."""
    return [check_one(name) for name in names()]


def check_one(name: str) -> tuple[bool, str]:
    """Whether the weights of that name are what they were, by SHA-256: (ok, sentence).

    Weights that can be fetched and are not here are ok. Raises ``Invalid`` for an unknown name.
    """
    fetchable = name in DOWNLOADS
    try:
        files = _files(name)
        _compare(files, FETCHED if fetchable else SHIPS)
    except Missing as e:
        return fetchable, f"{name}: {f'not found (optional): `faceadv weights fetch {name}`' if fetchable else e}"
    except Invalid as e:
        if name not in names():
            raise
        return False, f"{name}: {e}"
    if not fetchable:
        return True, f"{name}: SHA-256 as shipped"
    if None in files.values():
        return True, f"{name}: SHA-256 not known before its first use"
    published = all(path.name in PUBLISHED for path in files)
    return True, f"{name}: SHA-256 as {'published' if published else 'first fetched (no published one is known)'}"
