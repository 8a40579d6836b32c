"""How far apart two images are, and how sure a number is. Takes any device; what comes out lies on the CPU."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import betaincinv
from torchmetrics.functional.image import structural_similarity_index_measure

from faceadv.errors import Invalid

__all__ = ["bootstrap", "l2", "linf", "rate", "ssim"]

AT_ONCE = 2**22  # numbers drawn in one go by the bootstrap
Numbers = Sequence | np.ndarray | torch.Tensor  # (N,)


def l2(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of the whole perturbation, per image: (N,) in units of [0, 1] pixels."""
    return (a - b).flatten(1).norm(dim=1).cpu()


def linf(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Largest change of a pixel, per image: (N,) in [0, 1]."""
    return (a - b).flatten(1).abs().amax(1).cpu()


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean structural similarity per image, (N,): Gaussian window of sigma 1.5, 1 for equal images.

    Source: Wang et al. 2004, equation 13; torchmetrics' implementation.
    """
    if not len(a):
        return torch.zeros(0)
    # in parts, because the library's temporaries take 15 MB per image
    parts = [
        structural_similarity_index_measure(*part, data_range=1.0, reduction="none").reshape(-1)
        for part in zip(a.split(64), b.split(64), strict=True)
    ]
    return torch.cat(parts).cpu()


def bootstrap(
    values: Numbers, groups: Numbers | None = None, repeats: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean with a 95 % percentile bootstrap interval: ``(mean, low, high)``.

    A single value or group has no interval: low and high are then NaN, which a record and a figure take for "none".

    Parameters
    ----------
    values : (N,) numbers
    groups : (N,) labels; whole groups are drawn then, because photos of one person are not independent
    repeats, seed : number of draws, and their seed

    Raises
    ------
    Invalid : if there are no values
    """
    values = _home(values).astype(float)
    if not len(values):
        raise Invalid("There is no mean of no values.")
    groups = np.arange(len(values)) if groups is None else np.unique(_home(groups), return_inverse=True)[1]
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    if len(sums) < 2:
        return float(values.mean()), np.nan, np.nan
    generator, rows, means = np.random.default_rng(seed), max(1, AT_ONCE // len(sums)), []
    for start in range(0, repeats, rows):  # drawn in parts, the numbers are the same as drawn at once
        draws = generator.integers(len(sums), size=(min(rows, repeats - start), len(sums)))
        means.append(sums[draws].sum(1) / counts[draws].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - 0.95) / 2, (1 + 0.95) / 2])
    return float(values.mean()), float(low), float(high)


def rate(hits: Numbers, groups: Numbers, seed: int = 0) -> tuple[float, float, float]:
    """Share of hits with a 95 % interval over groups: ``(share, low, high)``.

    The interval is a bootstrap over groups. If all groups have the same share, a bootstrap would give an interval of no
    width, as if that were certain. The interval is then the exact binomial one (Clopper and Pearson 1934) with one
    trial per group. A single group with hits and misses says nothing about other groups: the interval is [0, 1].

    Parameters
    ----------
    hits : (N,) bool, or shares in [0, 1]
    groups : (N,) labels, as for ``bootstrap``
    seed : of the draws

    Raises
    ------
    Invalid : if there are no hits and no misses
    """
    hits, groups = _home(hits).astype(float), np.unique(_home(groups), return_inverse=True)[1]
    share, low, high = bootstrap(hits, groups, seed=seed)
    shares = np.bincount(groups, hits) / np.bincount(groups)
    if len(shares) == 1 and 0 < share < 1:
        return share, 0.0, 1.0
    if np.ptp(shares) > 1e-9:
        return share, low, high
    trials, wins = len(shares), len(shares) * share
    low = betaincinv(wins, trials - wins + 1, 0.025) if wins > 0 else 0.0
    high = betaincinv(wins + 1, trials - wins, 0.975) if wins < trials else 1.0
    return share, float(low), float(high)


def _home(values):
    """A list, array or tensor, of whatever device, as an array."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
