"""Verification: distances of pairs, thresholds, and the protocols that report them."""

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from faceadv.errors import Invalid


def pair_distances(recogniser, embeddings, pairs):
    """Distances (P,) float64 between the embeddings (N, D) of the two photos of each pair."""
    return recogniser.distance(embeddings[pairs.first], embeddings[pairs.second]).double().numpy()


def accuracy(distances, same, threshold):
    """Share of pairs on the right side of the threshold: same below it, different at or above."""
    return float(((distances < threshold) == np.asarray(same)).mean())


def best_threshold(distances, same):
    """The threshold of highest accuracy; midway between the two distances that it separates."""
    order = np.argsort(distances, kind="stable")
    d, right = np.asarray(distances)[order], np.asarray(same)[order]
    # cut i accepts the i smallest distances; equal distances cannot be parted
    correct = np.r_[0, np.cumsum(right)] + (~right).sum() - np.r_[0, np.cumsum(~right)]
    possible = np.r_[True, d[1:] > d[:-1], True]
    edges = np.r_[d[0], (d[1:] + d[:-1]) / 2, d[-1] + 1e-9]
    return float(edges[np.argmax(np.where(possible, correct, -1))])


def threshold_at_far(different_distances, far):
    """The threshold that accepts at most a share ``far`` of these different pairs.

    Calibrate it on held-out pairs, never on the pairs reported. Raises ``ValueError`` if there are too few of them
    to tell: fewer than 1 / far.
    """
    distances = np.sort(np.asarray(different_distances))
    if not 0 < far < 1 or len(distances) * far < 1:
        raise Invalid(f"A false accept rate of {far} cannot be read off {len(distances)} different pairs.")
    return float(distances[int(len(distances) * far)])


def ten_folds(distances, same, fold):
    """LFW's protocol: the threshold from all folds but one, the accuracy on that one.

    Returns ``(mean, standard error, accuracies)``; the error is the standard deviation over folds / sqrt(folds).
    """
    same, fold = np.asarray(same), np.asarray(fold)
    accuracies = []
    for k in np.unique(fold):
        threshold = best_threshold(distances[fold != k], same[fold != k])
        accuracies.append(accuracy(distances[fold == k], same[fold == k], threshold))
    accuracies = np.array(accuracies)
    return accuracies.mean(), accuracies.std(ddof=1) / np.sqrt(len(accuracies)), accuracies


def roc(distances, same):
    """False accept rates, true accept rates and the area under the curve."""
    far, tar, _ = roc_curve(np.asarray(same), -np.asarray(distances))
    return far, tar, float(roc_auc_score(np.asarray(same), -np.asarray(distances)))


def tar_at_far(distances, same, far=1e-3):
    """Share of same pairs accepted at the threshold that accepts ``far`` of these different pairs."""
    same = np.asarray(same)
    return float((distances[same] < threshold_at_far(distances[~same], far)).mean())


def rank1(embeddings, labels):
    """Share of photos whose nearest other photo shows the same person."""
    squared = torch.cdist(embeddings, embeddings).fill_diagonal_(float("inf"))
    return float((labels[squared.argmin(1)] == labels).float().mean())
