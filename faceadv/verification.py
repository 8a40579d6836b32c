"""Verification: distances of pairs, thresholds, and the protocols that report them.

Everywhere in this module ``distances`` (P,) are those of P pairs, and ``same`` (P,) says of each pair whether it shows
one person: bool, or integers 0 and 1. A distance that is not finite raises ``Invalid``.
"""

from collections.abc import Sequence

import numpy as np
import torch

from faceadv.errors import Invalid
from faceadv.metrics import finite
from faceadv.pairs import Pairs
from faceadv.recognisers import Recogniser

__all__ = ["accuracy", "best_threshold", "pair_distances", "roc", "ten_folds", "threshold_at_far"]

AT_ONCE = 2**22  # numbers of a temporary result: 16 MB
Flags = Sequence | np.ndarray | torch.Tensor


@torch.no_grad()
def pair_distances(recogniser: Recogniser, embeddings: torch.Tensor, pairs: Pairs) -> np.ndarray:
    """Distances (P,) float64 between the embeddings of the two photos of each pair.

    Parameters
    ----------
    recogniser : whose distance is used
    embeddings : (N, D) of the N photos, on any device
    pairs : P pairs of positions in ``embeddings``
    """
    rows, distances = max(1, AT_ONCE // max(1, embeddings.shape[1])), np.empty(len(pairs))
    for start in range(0, len(pairs), rows):  # all at once, LFW's pairs would need 10 GB
        part = slice(start, start + rows)
        a, b = embeddings[pairs.first[part]], embeddings[pairs.second[part]]
        distances[part] = recogniser.distance(a, b).double().cpu().numpy()
    return distances


def accuracy(distances: np.ndarray, same: Flags, threshold: float) -> float:
    """Share of pairs on the right side of the threshold: same pairs below it, different pairs at or above it.

    Parameters
    ----------
    distances, same : see the top of this module
    threshold : in units of the distances
    """
    finite(np.append(distances, threshold), "distances")
    return float(((distances < threshold) == np.asarray(same, dtype=bool)).mean())


def best_threshold(distances: np.ndarray, same: Flags) -> float:
    """The threshold of highest accuracy; midway between the two distances that it separates.

    Raises ``Invalid`` if there are no pairs.
    """
    if not len(distances):
        raise Invalid("A threshold cannot be chosen without pairs: give at least one.")
    order = np.argsort(finite(distances, "distances"), kind="stable")
    d, right = np.asarray(distances)[order], np.asarray(same, dtype=bool)[order]
    # cut i accepts the i smallest distances; equal distances cannot be parted
    correct = np.r_[0, np.cumsum(right)] + (~right).sum() - np.r_[0, np.cumsum(~right)]
    possible = np.r_[True, d[1:] > d[:-1], True]
    edges = np.r_[d[0], (d[1:] + d[:-1]) / 2, d[-1] + 1e-9]
    return float(edges[np.argmax(np.where(possible, correct, -1))])


def threshold_at_far(different_distances: np.ndarray, far: float) -> float:
    """The threshold that accepts at most a share ``far`` of these different pairs.

    Calibrate it on held-out pairs, never on the pairs reported. Raises ``Invalid`` if there are too few of them
    to tell: fewer than 1 / far.
    """
    distances = np.sort(np.asarray(finite(different_distances, "distances")))
    if not 0 < far < 1 or len(distances) * far < 1:
        raise Invalid(f"A false accept rate of {far} cannot be read off {len(distances)} different pairs.")
    return float(distances[int(len(distances) * far)])


def ten_folds(distances: np.ndarray, same: Flags, fold: Flags) -> tuple[float, float, np.ndarray]:
    """LFW's protocol: for each fold, the accuracy on it at the best threshold of all other folds.

    Parameters
    ----------
    distances, same : see the top of this module
    fold : (P,) integers, the fold of each pair

    Returns
    -------
    mean, standard error, accuracies : the error is the standard deviation over folds / sqrt(folds)

    Raises
    ------
    Invalid : if there is a single fold
    """
    same, fold = np.asarray(same, dtype=bool), np.asarray(fold)
    accuracies = []
    for k in np.unique(fold):
        threshold = best_threshold(distances[fold != k], same[fold != k])
        accuracies.append(accuracy(distances[fold == k], same[fold == k], threshold))
    accuracies = np.array(accuracies)
    return accuracies.mean(), accuracies.std(ddof=1) / np.sqrt(len(accuracies)), accuracies


def roc(distances: np.ndarray, same: Flags) -> tuple[np.ndarray, np.ndarray, float]:
    """False accept rates, true accept rates and the area under the curve."""
    from sklearn.metrics import roc_auc_score, roc_curve  # takes a second

    far, tar, _ = roc_curve(np.asarray(same, dtype=bool), -np.asarray(finite(distances, "distances")))
    return far, tar, float(roc_auc_score(np.asarray(same, dtype=bool), -np.asarray(distances)))
