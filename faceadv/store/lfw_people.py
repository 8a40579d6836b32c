"""Who of LFW may be trained on: the identity-disjoint halves of View 1.

scikit-learn's mirror of LFW has the pairs, but not peopleDevTrain.txt and peopleDevTest.txt, which name the 4,038 and
the 1,711 people. ``lfw_people.bin`` holds the first four bytes of the SHA-256 of each of these names, in this order.
With it the halves can be told apart, though it contains no names.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from faceadv.errors import Invalid

__all__ = ["dev_people"]

HASHES = np.fromfile(Path(__file__).with_name("lfw_people.bin"), ">u4").tolist()
HALVES = {"train": set(HASHES[:4038]), "test": set(HASHES[4038:])}
MAX_LOST = 0.05


def dev_people(names: Iterable[str], which: str) -> list[str]:
    """The people of View 1's "train" (4,038) or "test" (1,711) half, sorted.

    names: the people of LFW; up to 5 % may be missing, as those without a usable photo are. Raises ``Invalid`` for
    other names, or for another ``which``.
    """
    if which not in HALVES:
        raise Invalid(f'which must be "train" or "test", not {which!r}.')
    hashes = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) for name in sorted(names)}
    if not set(hashes.values()) <= set(HASHES) or len(hashes) < (1 - MAX_LOST) * len(HASHES):
        raise Invalid(f"These {len(hashes):,} names are not the 5,749 people of LFW, so its split does not apply.")
    return [name for name, digest in hashes.items() if digest in HALVES[which]]
