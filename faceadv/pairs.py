"""Pairs of faces to verify, and who may be trained and tested on."""

import dataclasses

import numpy as np
import torch

from faceadv.errors import Invalid
from faceadv.store.datasets import lfw_file
from faceadv.store.lfw_people import dev_people


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs of positions in a FaceSet: first, second (P,) int64; same (P,) bool; fold (P,) int64.

    dropped counts the published pairs left out because a photo gave no chip.
    """

    first: torch.Tensor
    second: torch.Tensor
    same: torch.Tensor
    fold: torch.Tensor
    dropped: int = 0

    def __len__(self):
        return len(self.first)

    def __getitem__(self, mask):
        """The pairs where mask is true, or at these positions."""
        return Pairs(self.first[mask], self.second[mask], self.same[mask], self.fold[mask])


def all_pairs(faces):
    """Every pair of photos of a FaceSet once, in one fold. ORL gives 79,800, of which 1,800 same."""
    first, second = torch.triu_indices(len(faces), len(faces), 1)
    return Pairs(first, second, faces.labels[first] == faces.labels[second], torch.zeros_like(first))


def lfw_view2(faces, root=None):
    """LFW's View 2 as published: 10 folds of 300 same and 300 different pairs. ``faces`` is all of LFW."""
    return _read_lfw(faces, lfw_file("pairs.txt", root))


def lfw_view1(faces, which="test", root=None):
    """LFW's View 1 as published: 500 + 500 pairs for "test", 1,100 + 1,100 for "train". ``faces`` is all of LFW."""
    return _read_lfw(faces, lfw_file({"test": "pairsDevTest.txt", "train": "pairsDevTrain.txt"}[which], root))


def _read_lfw(faces, path):
    """Read NAME i j (same) and NAME i OTHER j (different); the header says how many of each, or folds and how many."""
    position = {file.stem: i for i, file in enumerate(faces.files)}
    header, *lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    per_fold = 2 * int(header[-1])
    rows, dropped = [], 0
    for i, line in enumerate(lines):
        if len(line) not in (3, 4):
            raise Invalid(f"{path.name} has a line that names no pair: {' '.join(line)}.")
        one, other = (line[0], line[1]), (line[-2] if len(line) == 4 else line[0], line[-1])
        places = [position.get(f"{name}_{int(number):04d}") for name, number in (one, other)]
        if None in places:
            dropped += 1
            continue
        rows.append((*places, len(line) == 3, i // per_fold))
    first, second, same, fold = torch.tensor(rows).T
    return Pairs(first, second, same.bool(), fold, dropped)


def calibration_and_test(faces, root=None):
    """Pairs to choose a threshold on, and pairs of other people to report: ``(calibration, test)``.

    LFW: View 1's training and test pairs as published. Any other set: all pairs within the first and within the
    second half of its people.
    """
    if faces.name == "lfw":
        return lfw_view1(faces, "train", root), lfw_view1(faces, "test", root)
    pairs, late = all_pairs(faces), faces.labels >= len(faces.names) // 2
    first, second = late[pairs.first], late[pairs.second]
    return pairs[~first & ~second], pairs[first & second]


def sample(pairs, per_kind, seed=0):
    """``per_kind`` same and as many different pairs, drawn without replacement; ``ValueError`` if there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for kind in (True, False):
        places = torch.where(pairs.same == kind)[0]
        if len(places) < per_kind:
            raise Invalid(f"There are only {len(places)} {'same' if kind else 'different'} pairs, not {per_kind}.")
        chosen.append(places[torch.randperm(len(places), generator=generator)[:per_kind]])
    return pairs[torch.cat(chosen)]


def lfw_people(faces, which):
    """Names of the identity-disjoint groups of LFW.

    "train"   the 4,038 people of View 1's training half: whatever is trained here sees no one else
    "test"    the 1,711 people of its test half
    "closed"  the 47 of "test" with at least 10 photos, for closed-set identification and trackers
    "deid"    the first 30 of the 34 people with at least 30 photos (P-FGVM's 900 photos)
    """
    if which in ("train", "test"):
        return dev_people(faces.names, which)
    counts = np.bincount(faces.labels.numpy(), minlength=len(faces.names))
    photos = dict(zip(faces.names, counts.tolist()))
    if which == "closed":
        return [name for name in dev_people(faces.names, "test") if photos[name] >= 10]
    if which == "deid":
        return [name for name in sorted(faces.names) if photos[name] >= 30][:30]
    raise Invalid(f'which must be "train", "test", "closed" or "deid", not {which!r}.')


def triples(labels, count, draw):
    """Rows of sources, of targets, photos of other people, and of a second photo of each target: three (count,) int64.

    labels (N,) int64; draw: a torch generator. A target with a single photo is its own second.
    """
    sources = torch.randint(len(labels), (count,), generator=draw)
    targets, others = [], []
    for row in sources.tolist():
        target = row
        while labels[target] == labels[row]:
            target = torch.randint(len(labels), (1,), generator=draw).item()
        same = torch.where(labels == labels[target])[0]
        same = same[same != target] if len(same) > 1 else same
        others.append(same[torch.randint(len(same), (1,), generator=draw)].item())
        targets.append(target)
    return sources, torch.tensor(targets), torch.tensor(others)
