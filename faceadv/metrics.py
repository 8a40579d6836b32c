"""How far apart two images are, and how sure a number is."""

import numpy as np
import torch
from scipy.stats import binomtest
from torchmetrics.functional.image import structural_similarity_index_measure

from faceadv.errors import Invalid


def l2(a, b):
    """Euclidean norm of the whole perturbation, per image: (N,) in units of [0, 1] pixels."""
    return (a - b).flatten(1).norm(dim=1)


def linf(a, b):
    """Largest change of a pixel, per image: (N,) in [0, 1]."""
    return (a - b).flatten(1).abs().amax(1)


def ssim(a, b):
    """Mean structural similarity per image, (N,): Gaussian window of sigma 1.5, 1 for equal images.

    Source: Wang et al. 2004, equation 13; torchmetrics' implementation.
    """
    # in parts, as the library's temporaries take 15 MB an image
    parts = [
        structural_similarity_index_measure(*part, data_range=1.0, reduction="none").reshape(-1)
        for part in zip(a.split(64), b.split(64), strict=True)
    ]
    return torch.cat(parts) if parts else a.new_zeros(0)


def bootstrap(values, groups=None, repeats=2000, seed=0, level=0.95):
    """Mean of values (N,) with a percentile bootstrap interval: ``(mean, low, high)``.

    groups: (N,) labels; whole groups are drawn then, as photos of one person are not independent. With one value or
    one group there is nothing to draw from, and low and high are NaN.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise Invalid("There is no mean of no values.")
    groups = np.arange(len(values)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    if len(sums) < 2:
        return float(values.mean()), float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(len(sums), size=(repeats, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def rate(hits, groups, seed=0):
    """Share of hits (N,) bool with a 95 % interval over groups (N,): ``(share, low, high)``.

    A bootstrap over groups; where all hits are equal it would say [0, 0] or [1, 1], as if that were certain, so
    there it is the exact binomial interval (Clopper and Pearson 1934) with one trial per group.
    """
    hits = np.asarray(hits, dtype=bool)
    if hits.all() or not hits.any():
        people = len(np.unique(np.asarray(groups)))
        interval = binomtest(people if hits.all() else 0, people).proportion_ci(0.95, method="exact")
        return float(hits.mean()), float(interval.low), float(interval.high)
    return bootstrap(hits, groups, seed=seed)
