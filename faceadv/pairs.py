"""Pairs of faces to verify, and who may be trained and tested on."""

import dataclasses
import hashlib
import math
from collections.abc import Collection

import numpy as np
import torch

from faceadv.errors import Invalid
from faceadv.faces import FaceSet
from faceadv.store.datasets import lfw_file
from faceadv.store.lfw_people import dev_people

__all__ = [
    *("Pairs", "all_pairs", "calibration_and_test", "lfw_people", "lfw_view1", "lfw_view2", "sample", "strangers"),
    "triples",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs of photos of a FaceSet. ``pairs[mask]`` is the subset."""

    first: torch.Tensor  # (P,) int64, position of one photo
    second: torch.Tensor  # (P,) int64, of the other one
    same: torch.Tensor  # (P,) bool, whether they show one person
    fold: torch.Tensor  # (P,) int64
    dropped: int = 0  # published pairs left out because a photo gave no chip

    def __len__(self):
        return len(self.first)

    def __getitem__(self, mask) -> "Pairs":
        """The pairs where mask is true, or at these positions."""
        return Pairs(self.first[mask], self.second[mask], self.same[mask], self.fold[mask])


def all_pairs(faces: FaceSet) -> Pairs:
    """Every pair of photos of a FaceSet once, in one fold. ORL gives 79,800, of which 1,800 same."""
    first, second = torch.triu_indices(len(faces), len(faces), 1)
    return Pairs(first, second, faces.labels[first] == faces.labels[second], torch.zeros_like(first))


def lfw_view2(faces: FaceSet) -> Pairs:
    """LFW's View 2 as published: 10 folds of 300 same and 300 different pairs. ``faces`` is all of LFW."""
    return _read_lfw(faces, lfw_file("pairs.txt"))


def lfw_view1(faces: FaceSet, which: str = "test") -> Pairs:
    """LFW's View 1 as published: 500 + 500 pairs for "test", 1,100 + 1,100 for "train". ``faces`` is all of LFW."""
    if which not in ("train", "test"):
        raise Invalid(f'which must be "train" or "test", not {which!r}.')
    return _read_lfw(faces, lfw_file(f"pairsDev{which.title()}.txt"))


def _read_lfw(faces, path):
    """Read NAME i j (same) and NAME i OTHER j (different); the header says how many of each, or folds and how many."""
    position = {file.stem: i for i, file in enumerate(faces.files)}
    text = path.read_text(encoding="utf-8", errors="replace")
    header, *lines = [line.split() for line in text.splitlines() if line.strip()] or [[]]
    if not lines or not all(map(str.isdecimal, header)) or len(lines) != 2 * math.prod(map(int, header)):
        raise Invalid(f"{path.name} has {len(lines)} pairs, not those that its first line promises: fetch it again.")
    per_fold, rows, dropped = 2 * int(header[-1]), [], 0
    for i, line in enumerate(lines):
        if len(line) not in (3, 4) or not (line[-1] + line[-2 if len(line) == 3 else 1]).isdecimal():
            raise Invalid(f"{path.name} has a line that names no pair: {' '.join(line)}.")
        one, other = (line[0], line[1]), (line[-2] if len(line) == 4 else line[0], line[-1])
        places = [position.get(f"{name}_{int(number):04d}") for name, number in (one, other)]
        if None in places:
            dropped += 1
            continue
        rows.append((*places, len(line) == 3, i // per_fold))
    if not rows:
        raise Invalid(f"{faces.name} has the photos of none of the pairs in {path.name}: load all of LFW.")
    first, second, same, fold = torch.tensor(rows).T
    return Pairs(first, second, same.bool(), fold, dropped)


def calibration_and_test(faces: FaceSet) -> tuple[Pairs, Pairs]:
    """Pairs to choose a threshold on, and pairs of other people to report: ``(calibration, test)``.

    LFW: View 1's training and test pairs as published. Any other set: all pairs within the first and within the
    second half of its people.
    """
    if faces.name == "lfw":
        return lfw_view1(faces, "train"), lfw_view1(faces, "test")
    pairs, late = all_pairs(faces), faces.labels >= len(faces.names) // 2
    first, second = late[pairs.first], late[pairs.second]
    return pairs[~first & ~second], pairs[first & second]


def strangers(faces: FaceSet, without: Collection[str] = (), most: int = 1000, seed: int = 0) -> Pairs:
    """Pairs of different people to choose a threshold on, none of whom is among the test pairs.

    LFW: all pairs of one photo each of some people of View 1's training half. Any other set: all pairs of different
    people within the first half of its people.

    Parameters
    ----------
    faces : all of LFW, or any other set
    without : names of people who must not be among them
    most : how many people, drawn at random; only where there is one photo of each
    seed : of the draw

    Raises
    ------
    Invalid : if fewer than two people are left
    """
    if faces.name == "lfw":
        names = [name for name in lfw_people(faces, "train") if name not in without]
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:most].tolist()
        wanted = {names[i] for i in order}
        first = {faces.names[label]: row for row, label in reversed(list(enumerate(faces.labels.tolist())))}
        rows = torch.tensor(sorted(first[name] for name in wanted), dtype=torch.int64)
    else:
        early = [name for name in faces.names[: len(faces.names) // 2] if name not in without]
        rows = torch.where(torch.isin(faces.labels, torch.tensor([faces.names.index(name) for name in early])))[0]
    one, other = torch.triu_indices(len(rows), len(rows), 1)
    apart = faces.labels[rows[one]] != faces.labels[rows[other]]
    if not apart.any():
        raise Invalid(f"A threshold needs at least two people of {faces.name} who are not attacked.")
    first, second = rows[one[apart]], rows[other[apart]]
    return Pairs(first, second, torch.zeros_like(first, dtype=torch.bool), torch.zeros_like(first))


def sample(pairs: Pairs, per_kind: int, seed: int = 0) -> Pairs:
    """Some same and as many different pairs, drawn without replacement.

    Parameters
    ----------
    pairs : to draw from
    per_kind : how many of each kind
    seed : of the draw

    Raises
    ------
    Invalid : if there are fewer pairs of a kind
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for kind in (True, False):
        places = torch.where(pairs.same == kind)[0]
        if len(places) < per_kind:
            raise Invalid(f"There are only {len(places)} {'same' if kind else 'different'} pairs, not {per_kind}.")
        chosen.append(places[torch.randperm(len(places), generator=generator)[:per_kind]])
    return pairs[torch.cat(chosen)]


def lfw_people(faces: FaceSet, which: str) -> list[str]:
    """Names of the identity-disjoint groups of LFW. ``faces`` is all of LFW; a person without a chip is left out.

    "train"   the 4,038 people of View 1's training half: whatever is trained here sees no one else
    "test"    the 1,711 people of its test half
    "closed"  the 47 of "test" with at least 10 photos, for closed-set identification and trackers
    "select"  one half of "test", by a hash of the name: whoever chooses between trained networks does so on them
    "report"  the other half, to report on
    "deid"    the first 30 of the 34 people with at least 30 photos (P-FGVM's 900 photos)
    """
    photos = dict(zip(faces.names, np.bincount(faces.labels.numpy(), minlength=len(faces.names)).tolist()))
    if which == "deid":
        return [name for name in sorted(photos) if photos[name] >= 30][:30]
    if which not in ("train", "test", "closed", "select", "report"):
        raise Invalid(f'which must be "train", "test", "closed", "select", "report" or "deid", not {which!r}.')
    everyone = photos.keys() | {path.parent.name for path, _ in faces.skipped}  # the split is known by its people
    half, at_least = dev_people(everyone, "train" if which == "train" else "test"), 10 if which == "closed" else 0
    if which in ("select", "report"):
        even = {name: hashlib.sha256(name.encode()).digest()[-1] % 2 == 0 for name in half}  # whoever else is missing
        half = [name for name in half if even[name] == (which == "select")]
    return [name for name in half if photos.get(name, -1) >= at_least]


def triples(labels: torch.Tensor, count: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw sources, targets who are other people, and a second photo of each target.

    Parameters
    ----------
    labels : (N,) integers of any type, the person in each photo
    count : how many triples
    draw : a generator of random numbers on the CPU

    Returns
    -------
    sources, targets, seconds : (count,) int64 each, positions in ``labels``; a person's only photo is its own second

    Raises
    ------
    Invalid : if there are fewer than two people
    """
    labels = torch.as_tensor(labels)
    if len(labels.unique()) < 2:
        raise Invalid("The target must be another person than the source: give photos of at least two people.")
    sources = torch.randint(len(labels), (count,), generator=draw)
    targets, seconds = [], []
    for row in sources.tolist():
        target = row
        while labels[target] == labels[row]:
            target = torch.randint(len(labels), (1,), generator=draw).item()
        same = torch.where(labels == labels[target])[0]
        same = same[same != target] if len(same) > 1 else same
        seconds.append(same[torch.randint(len(same), (1,), generator=draw)].item())
        targets.append(target)
    return sources, torch.tensor(targets), torch.tensor(seconds)
