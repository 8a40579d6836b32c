"""Weights: what ships, what can be fetched, and the check that each is what it was."""

import contextlib
import functools
import importlib.util
import os
from pathlib import Path

import pooch
import torch
from safetensors.torch import load_file, save_file

from faceadv.errors import Failed, Invalid, Missing
from faceadv.store.datasets import download
from faceadv.store.paths import cache_root, nearest, replacing

SHIPPED = Path(__file__).parents[1] / "models"
# inside wheels: package, folder, SHA-256 of each file
PACKAGED = {
    "dlib": (
        "face_recognition_models",
        "models",
        {
            # 22,466,066 bytes
            "dlib_face_recognition_resnet_model_v1.dat": (
                "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"
            ),
        },
    ),
    "mtcnn": (
        "facenet_pytorch",
        "data",
        {
            "pnet.pt": "a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f",
            "rnet.pt": "bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86",
            "onet.pt": "165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d",
        },
    ),
}
RELEASE = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"
DOWNLOADS = {
    "facenet-vggface2": "20180402-114759-vggface2.pt",
    "facenet-casia": "20180408-102900-casia-webface.pt",
    "vgg-face": "vgg_face_dag.pth",
    "alexnet": "alexnet-owt-7be5be79.pth",
}
HOSTS = {  # RELEASE for the others
    "vgg-face": "https://www.robots.ox.ac.uk/~albanie/models/pytorch-mcn/",
    "alexnet": "https://download.pytorch.org/models/",
}
CLASSES = {"facenet-vggface2": 8631, "facenet-casia": 10575}  # of the classifier head in the published files
# facenet-pytorch publishes no hash, torchvision the first eight digits. These (111,898,327 and 244,408,911 bytes) stand
# in the locks and Dockerfiles of many unrelated projects; none was found for the other files, whose first download is
# trusted instead.
PUBLISHED = {
    "20180402-114759-vggface2.pt": "281cebca8662831adb987a874bdcb36e73f5b1c6dc5ee5878f305e985625d99b",
    "alexnet-owt-7be5be79.pth": "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
}


def shipped():
    """What ships, from ``models/SHA256SUMS``: by its name, the SHA-256 of each file by its path in ``models/``.

    A name is one file, ``NAME.safetensors``, or a folder.
    """
    sums = SHIPPED / "SHA256SUMS"
    found = {}
    for line in sums.read_text().splitlines() if sums.exists() else []:
        sha256, path = line.split()
        found.setdefault(Path(path).parts[0].removesuffix(".safetensors"), {})[path] = sha256
    return found


def names():
    """All names that ``find`` knows."""
    return [*PACKAGED, *shipped(), *DOWNLOADS]


def listing():
    """All weights as dicts: name, what, size, path (or None), found."""
    what = {
        "dlib": "face recognition ResNet, in the package face-recognition-models",
        "mtcnn": "face detector, in the package facenet-pytorch",
        "vgg-face": "VGG-Face, to fetch (580 MB)",
        "alexnet": "AlexNet, to fetch (244 MB)",
    } | {name: "FaceNet, to fetch (110 MB)" for name in CLASSES}
    return [_row(name, what.get(name, "trained here, shipped")) for name in names()]


def _row(name, what):
    try:
        path, files = find(name), _files(name)
    except FileNotFoundError:
        return {"name": name, "what": what, "size": "", "path": None, "found": False}
    size = sum(file.stat().st_size for file in files)
    return {"name": name, "what": what, "size": f"{size / 1e6:.1f} MB", "path": path, "found": True}


def find(name):
    """Path of the weights; of their folder if they are several files ("mtcnn", "prior").

    Raises ``FileNotFoundError`` saying how to get them, ``ValueError`` for an unknown name.
    """
    files = list(_files(name))
    return files[0] if len(files) == 1 else Path(os.path.commonpath(files))


def _files(name):
    """The SHA-256 of each file by its path; None where only the first use can tell. Errors as in ``find``."""
    if name in DOWNLOADS:
        path = _downloaded(name)
        return {path: PUBLISHED.get(path.name)}
    if name in PACKAGED:
        package, folder, sums = PACKAGED[name]
        spec = importlib.util.find_spec(package)  # found, not imported
        place = Path(spec.submodule_search_locations[0]) / folder if spec else Path(package)
        files, whose = {place / file: sha256 for file, sha256 in sums.items()}, f"the package {package}"
    elif name in shipped():
        files, whose = {SHIPPED / path: sha256 for path, sha256 in shipped()[name].items()}, "this repository"
    else:
        known = ", ".join(names())
        raise Invalid(f'There are no weights "{name}"{nearest(name, names())}; there are {known}.')
    for path in files:
        if not path.is_file():
            raise Missing(f"{path.name} is missing, which comes with {whose}: install it again.")
    return files


def _downloaded(name):
    # the other two are where torch and facenet-pytorch themselves keep downloads
    hub = Path(torch.hub.get_dir())
    for folder in (cache_root() / "weights", hub / "checkpoints", hub.parent / "checkpoints"):
        if (folder / DOWNLOADS[name]).is_file():
            return folder / DOWNLOADS[name]
    raise Missing(
        f"The weights of {name} are missing: run `faceadv weights fetch {name}` with a network, "
        f"or put {DOWNLOADS[name]} into {cache_root() / 'weights'}."
    )


def fetch(name, release=None):
    """Download weights and return their path; those that are there already are left alone.

    release: where the file lies, by default its publisher's. The files of VGGFace2 and AlexNet are checked by SHA-256.
    No hash is known for the others: the first download is trusted if it loads with ``weights_only=True`` as the tensors
    of its network; its SHA-256 is written beside it (``.sha256``) and checked at every later load.
    Raises ``ValueError`` for an unknown name, ``RuntimeError`` in one sentence if the download fails or
    holds something else.
    """
    if name not in DOWNLOADS:
        return find(name)
    with contextlib.suppress(FileNotFoundError):
        return _downloaded(name)
    path = cache_root() / "weights" / DOWNLOADS[name]
    _note(path).unlink(missing_ok=True)  # of a file that was deleted
    sha256 = PUBLISHED.get(path.name)
    url = (release or HOSTS.get(name, RELEASE)) + path.name
    download(url, path, sha256, None if sha256 else lambda part: _check_layout(part, name))
    if not sha256:
        _remember(path)
    return path


def _check_layout(path, name):
    """Refuse what does not hold the tensors of its network. Raises ``RuntimeError``."""
    shapes = {key: tuple(value.shape) for key, value in _read_torch(path, DOWNLOADS[name]).items()}
    # counters of batch normalisation: files of 2018 may lack them
    shapes = {key: shape for key, shape in shapes.items() if not key.endswith("num_batches_tracked")}
    if name in CLASSES:
        expected, network = facenet_shapes(CLASSES[name]), "InceptionResnetV1"
    else:
        from faceadv.networks.vgg_face import SHAPES as expected

        network = "VGG-Face"
    if shapes != expected:
        raise Failed(f"{DOWNLOADS[name]} does not hold the weights of {network} and was not kept.")


def facenet_shapes(classes):
    """Shape of each tensor in a published FaceNet file by its key, without counters."""
    from facenet_pytorch import InceptionResnetV1

    with torch.device("meta"):  # shapes only
        state = InceptionResnetV1(classify=True, num_classes=classes).state_dict()
    return {key: tuple(v.shape) for key, v in state.items() if not key.endswith("num_batches_tracked")}


def read_state(path):
    """The state dict in a torch file, loaded with ``weights_only=True`` after its SHA-256 was checked.

    The hash is the known one, or that beside the file (``.sha256``), written now if there is none: the
    first use is trusted. Raises ``ValueError`` if the hash differs, ``RuntimeError`` if there is no state dict.
    """
    path = Path(path)
    known = _check_hash(path)
    state = _read_torch(path)
    if not known:
        with contextlib.suppress(PermissionError):  # somebody else's folder: every use is the first
            _remember(path)
    return state


def _check_hash(path):
    """Compare with the hash known for a file; False if there is none. Raises ``ValueError``."""
    known = PUBLISHED.get(path.name)
    if known is None and _note(path).exists():
        known = _note(path).read_text().strip()
    if known is not None and known != _sha256(path):
        raise Invalid(
            f"{path} is not the file that was published, or first fetched (its SHA-256 differs): "
            "delete it and fetch it again."
        )
    return known is not None


def _note(path):
    return path.with_name(path.name + ".sha256")


def _remember(path):
    with replacing(_note(path)) as part:
        part.write_text(_sha256(path) + "\n")


def _read_torch(path, shown=None):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise Invalid("no state dict")
    except Exception as e:  # torch raises a dozen kinds for a file that is not its own
        raise Failed(f"{shown or path} does not hold network weights (an error page, or cut short?).") from e
    return state


def load_safetensors(name):
    """The tensors of shipped weights by their names, after the file's SHA-256 was checked.

    Raises ``ValueError`` if it differs or nothing of that name ships, ``FileNotFoundError`` if the file is
    missing.
    """
    return load_file(checked(name))


def checked(name):
    """Path of shipped weights, of their folder if they are one, after each file's SHA-256 was checked.

    Errors as ``load_safetensors``.
    """
    if name not in shipped():
        raise Invalid(f'No weights "{name}" ship{nearest(name, shipped())}.')
    for path, sha256 in _files(name).items():
        if _sha256(path) != sha256:
            raise Invalid(
                f"{path.name} is not the file that ships (its SHA-256 differs): restore it from the repository."
            )
    return find(name)


def save_safetensors(tensors, path, half=True):
    """Write tensors as safetensors, floats in float16 if ``half``: whole or not at all.

    Raises ``ValueError`` if a value does not survive float16.
    """
    ready = {}
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        if half and value.is_floating_point():
            value = value.half()
            if not value.isfinite().all():
                raise Invalid(f"{key} holds values that float16 cannot: save it with half=False.")
        ready[key] = value
    with replacing(path) as part:
        save_file(ready, part)


def ship(name, tensors):
    """Write ``models/NAME.safetensors`` in float16 and its line in ``models/SHA256SUMS``; returns the path."""
    path = SHIPPED / f"{name}.safetensors"
    save_safetensors(tensors, path)
    enter(name, [path])
    return path


def enter(name, files):
    """Write the SHA-256 of shipped files into ``models/SHA256SUMS``, in place of what it has of that name."""
    sums = shipped() | {name: {path.relative_to(SHIPPED).as_posix(): _sha256(path) for path in files}}
    lines = sorted((path, sha256) for paths in sums.values() for path, sha256 in paths.items())
    with replacing(SHIPPED / "SHA256SUMS") as part:
        part.write_text("".join(f"{sha256}  {path}\n" for path, sha256 in lines))


def check():
    """Whether all weights that are here are whole: a list of (ok, sentence)."""
    return [check_one(name) for name in names()]


def check_one(name):
    """Whether the weights of that name are what they were, by SHA-256: (ok, sentence).

    What can be fetched and is not here is ok. Raises ``ValueError`` for an unknown name.
    """
    try:
        files = _files(name)
    except FileNotFoundError as e:
        if name in DOWNLOADS:
            return True, f"{name}: not found (optional): `faceadv weights fetch {name}`"
        return False, f"{name}: {e}"
    if name in DOWNLOADS:
        (path,) = files
        try:
            known = _check_hash(path)
        except ValueError as e:
            return False, f"{name}: {e}"
        how = "as published" if path.name in PUBLISHED else "as first fetched (no published one is known)"
        return True, f"{name}: SHA-256 {how if known else 'not known before its first use'}"
    wrong = [path.name for path, sha256 in files.items() if _sha256(path) != sha256]
    if wrong:
        return False, f"{name}: {', '.join(wrong)} is not what ships (its SHA-256 differs): install it again"
    return True, f"{name}: SHA-256 as shipped"


def _sha256(path):
    stat = Path(path).stat()
    return _hash_of(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _hash_of(path, size, changed):
    """SHA-256 of a file, computed again only when its size or time of change differ."""
    return pooch.file_hash(path)
