"""Sets of aligned faces: find the photos, cut the chips once, keep them in a cache.

``load("orl")`` needs nothing but the installed packages; ``load("lfw")`` needs LFW (``faceadv data fetch lfw``);
``load(folder)`` takes any folder of NAME/*.jpg or *.png.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from faceadv import align, precision
from faceadv.errors import Failed, Invalid
from faceadv.store import cache, datasets, progress

__all__ = ["FaceSet", "fingerprint", "load"]

MAX_SKIPPED = 0.05
BATCH = 32


@dataclasses.dataclass(frozen=True, eq=False)
class FaceSet:
    """Aligned chips with their people. ``faces[index]`` is the subset, ``faces.images`` the tensor to work on."""

    name: str  # what was loaded
    chips: np.ndarray  # (N, 3, 112, 112) uint8, memory-mapped
    labels: torch.Tensor  # (N,) int64 into ``names``
    names: list[str]  # of the people
    files: list[Path]  # the N photos
    matrices: np.ndarray  # (N, 2, 3) float64, photo to chip (see ``align.similarity``)
    counts: np.ndarray  # (N,) int64, how many faces each photo shows
    skipped: list[tuple[Path, str]]  # photos without a chip, and the reason
    device: torch.device | str = "cpu"  # where ``images`` are

    def __len__(self):
        return len(self.files)

    @functools.cached_property
    def images(self) -> torch.Tensor:
        """(N, 3, 112, 112) float32 RGB in [0, 1]. Made on first use: 2 GB for all of LFW, so take a subset."""
        return torch.from_numpy(np.array(self.chips)).to(self.device).float().div_(255)

    def __getitem__(self, index) -> "FaceSet":
        """The subset at ``index`` (a slice, list, array or tensor of positions, or a mask)."""
        if not isinstance(index, slice):
            index = index.cpu().numpy() if isinstance(index, torch.Tensor) else np.asarray(index)
            index = index if index.size else np.zeros(0, int)  # NumPy takes an empty list for one of floats
        index = np.atleast_1d(np.arange(len(self))[index]).copy()  # torch takes no negative strides
        return dataclasses.replace(
            self,
            chips=self.chips[index],
            labels=self.labels[torch.from_numpy(index)],
            files=[self.files[i] for i in index],
            matrices=self.matrices[index],
            counts=self.counts[index],
        )

    def people(self, names: Sequence[str]) -> "FaceSet":
        """The subset of these people, relabelled 0, 1, … in the order of ``names``. ``Invalid`` if one is absent."""
        position = {name: i for i, name in enumerate(self.names)}
        missing = [name for name in names if name not in position]
        if missing:
            raise Invalid(f"{self.name} has no one called {', '.join(map(str, missing[:5]))}: see its names.")
        new = torch.full((len(self.names),), -1)
        new[[position[name] for name in names]] = torch.arange(len(names))
        kept = self[(new[self.labels] >= 0).numpy()]
        return dataclasses.replace(kept, labels=new[kept.labels], names=list(names))

    def first_photos(self, per_person: int) -> "FaceSet":
        """The subset of the first ``per_person`` photos of each person."""
        seen = np.zeros(len(self.names), int)
        keep = np.zeros(len(self), bool)
        for i, label in enumerate(self.labels.tolist()):
            keep[i] = seen[label] < per_person
            seen[label] += 1
        return self[keep]


def load(name: str | Path, root: str | Path | None = None, device: str | torch.device = "cpu") -> FaceSet:
    """Load a set of faces. Its photos are aligned on first use; those without a chip are listed in ``.skipped``.

    Parameters
    ----------
    name : "orl", "lfw" or a folder of NAME/*.jpg|png
    root : folder with data sets, by default ``FACEADV_DATA``
    device : where ``images`` of the set and of its subsets are; photos are aligned on the CPU, to the same chips

    Raises
    ------
    Missing : if the photos are not there
    Failed : if none of them gave a chip, or of "orl" and "lfw" more than 5 % did not
    """
    device = precision.device(device)
    folder, photos = datasets.photos(name, root)
    make = functools.partial(_build, str(name), folder, photos)
    home = cache.entry("chips", folder.resolve().name, fingerprint(name, root), make)
    index = json.loads((home / "index.json").read_text(encoding="utf-8"))
    people = [file.split("/")[0] for file in index["files"]]
    names = list(dict.fromkeys(people))
    position = {person: i for i, person in enumerate(names)}
    return FaceSet(
        name=str(name),
        chips=np.load(home / "chips.npy", mmap_mode="r"),
        labels=torch.tensor([position[person] for person in people]),
        names=names,
        files=[folder / file for file in index["files"]],
        matrices=np.load(home / "matrices.npy"),
        counts=np.load(home / "counts.npy"),
        skipped=[(folder / file, reason) for file, reason in index["skipped"]],
        device=device,
    )


def fingerprint(name: str | Path, root: str | Path | None = None) -> str:
    """A hash that changes whenever ``load`` could give other chips. Arguments as for ``load``, ``Missing`` too."""
    detector = [cache.versions(), align.MTCNN_SETTINGS, align.SECOND_LOOK]
    return cache.key(align.VERSION, np.round(align.TEMPLATE, 6), detector, datasets.fingerprint(name, root))


def _build(name, folder, photos, home):
    """Align every photo into the folder ``home``. The chips never lie in memory all at once: LFW's are 500 MB."""
    kept, skipped, shape = [], [], (3, align.SIZE, align.SIZE)
    # written, not mapped: on a full disk, a sparse map kills the process
    with open(home / "all", "wb") as raw, progress.bar(total=len(photos), desc=f"aligning {name}", unit="photo") as bar:
        if hasattr(os, "posix_fallocate"):  # a disk that is too small is told now, not in ten minutes
            os.posix_fallocate(raw.fileno(), 0, len(photos) * math.prod(shape))
        for start in range(0, len(photos), BATCH):
            batch = photos[start : start + BATCH]
            for photo, result in zip(batch, align.align([folder / photo for photo in batch])):
                if isinstance(result, str):
                    skipped.append([photo, result])
                    continue
                raw.write(result[0].tobytes())
                kept.append((photo, *result[1:]))
            bar.update(len(batch))
    if skipped:
        some = "; ".join(f"{photo}: {reason}" for photo, reason in skipped[:5])
        said = f"{len(skipped)} of {len(photos)} photos of {name} gave no chip"
        named = f"({some}{'; …' if len(skipped) > 5 else ''})"
        if not kept or (name in ("orl", "lfw") and len(skipped) > MAX_SKIPPED * len(photos)):
            limit = f", more than {MAX_SKIPPED:.0%}" if kept else ""
            raise Failed(f"{said}{limit} {named}: remove them, or put better ones there.")
        progress.log.warning("%s %s; the others are used.", said, named)
    np.save(home / "chips.npy", np.memmap(home / "all", np.uint8, "r", shape=(len(kept), *shape)))
    (home / "all").unlink()
    files, matrices, counts = zip(*kept)
    np.save(home / "matrices.npy", np.array(matrices))
    np.save(home / "counts.npy", np.array(counts))
    (home / "index.json").write_text(json.dumps({"files": files, "skipped": skipped}), encoding="utf-8")
