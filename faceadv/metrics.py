"""How far apart two images are, and how sure a number is. Takes any device; what comes out lies on the CPU."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import stdtrit

from faceadv.errors import Invalid
from faceadv.images import gaussian_blur

__all__ = ["bootstrap", "finite", "gain", "l2", "linf", "rate", "ssim"]

AT_ONCE = 2**22  # numbers drawn in one go by the bootstrap
Numbers = Sequence | np.ndarray | torch.Tensor  # (N,)


def finite(values: Numbers, what: str) -> Numbers:
    """The values as they are. Raises ``Invalid`` if one is NaN or infinite, because it would decide like any number.

    what: the word for them in the message, such as "distances"
    """
    wrong = ~np.isfinite(_home(values))
    if wrong.any():
        raise Invalid(f"{wrong.sum()} of {wrong.size} numbers in the {what} are not finite: look where they come from.")
    return values


def l2(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of the whole perturbation, per image: (N,) in units of [0, 1] pixels."""
    return (a - b).flatten(1).norm(dim=1).cpu()


def linf(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Largest change of a pixel, per image: (N,) in [0, 1]."""
    return (a - b).flatten(1).abs().amax(1).cpu()


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean structural similarity per image, (N,): 1 for equal images, differentiable.

    a, b: (N, 3, H, W) in [0, 1]. The window is a Gaussian of sigma 1.5, 11 pixels wide; the border is mirrored. Raises
    ``Invalid`` for two shapes.
    Source: Wang et al. 2004, equation 13. (torchmetrics has the same; importing it takes longer than all else here.)
    """
    if a.shape != b.shape:
        raise Invalid(f"SSIM compares images of one shape, and these have {tuple(a.shape)} and {tuple(b.shape)}.")
    # in parts, because of the temporaries' size
    return torch.cat([_ssim(*part) for part in zip(a.split(64), b.split(64))] or [torch.zeros(0)]).cpu()


def _ssim(a, b):
    x, y, xx, yy, xy = gaussian_blur(torch.cat([a, b, a * a, b * b, a * b]), 11, 1.5).chunk(5)
    spread = (xx - x * x).clamp_min(0) + (yy - y * y).clamp_min(0)
    value = (2 * x * y + 0.01**2) * (2 * (xy - x * y) + 0.03**2)
    return (value / ((x * x + y * y + 0.01**2) * (spread + 0.03**2))).flatten(1).mean(1)


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
    Invalid : if there are no values, or one that is not finite
    """
    values, groups = _grouped(values, np.arange(len(values)) if groups is None else groups)
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    if len(sums) < 2:
        return float(values.mean()), np.nan, np.nan
    generator, rows, means = np.random.default_rng(seed), max(1, AT_ONCE // len(sums)), []
    for start in range(0, repeats, rows):  # drawn in parts, the numbers are the same as drawn at once
        draws = generator.integers(len(sums), size=(min(rows, repeats - start), len(sums)))
        means.append(sums[draws].sum(1) / counts[draws].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - 0.95) / 2, (1 + 0.95) / 2])
    return float(values.mean()), float(low), float(high)


def rate(hits: Numbers, groups: Numbers) -> tuple[float, float, float]:
    """Share of hits with a 95 % interval over groups: ``(share, low, high)``.

    Wilson's interval, with an effective sample size in place of the number of hits and misses (``_size``), and with
    Student's quantile for the number of groups. It has a width where all agree, and about the same one where nearly all
    do. A single group says nothing about others: its interval is [0, 1].
    Source: Wilson 1927; Korn and Graubard 1998 for the effective size and the quantile (there with
    Clopper and Pearson's).

    Parameters
    ----------
    hits : (N,) bool, or shares in [0, 1]
    groups : (N,) labels; photos of one person are not independent, so people are counted rather than photos

    Raises
    ------
    Invalid : if there are no hits and no misses, or one that is not finite
    """
    hits, groups = _grouped(hits, groups)
    share, people = float(hits.mean()), int(groups.max()) + 1
    if people == 1:
        return share, 0.0, 1.0
    n, z2 = _size(hits, groups, share * (1 - share)), stdtrit(people - 1, 0.975) ** 2
    middle, half = share + z2 / (2 * n), np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    low, high = ((middle + side * half) / (1 + z2 / n) for side in (-1, 1))
    # where all agree, rounding would leave the share outside
    return share, float(np.clip(low, 0, share)), float(np.clip(high, share, 1))


def gain(hits: Numbers, others: Numbers, groups: Numbers) -> tuple[float, float, float]:
    """How much larger a share is than another one of the same rows: ``(difference, low, high)``.

    The adjusted Wald interval for paired shares, which has a width where both always agree, with the effective size and
    the quantile of ``rate``. A single group says nothing about others: its interval is [-1, 1].
    Source: Bonett and Price 2012.

    Parameters
    ----------
    hits, others : (N,) bool each, or shares in [0, 1]; row i of both is the same photo or pair
    groups : (N,) labels, as for ``rate``

    Raises
    ------
    Invalid : if there are no rows, or a value that is not finite
    """
    moved, groups = _grouped(_home(hits).astype(float) - _home(others), groups)
    change, people = float(moved.mean()), int(groups.max()) + 1
    if people == 1:
        return change, -1.0, 1.0
    n = _size(moved, groups, float(moved.var()))
    middle = n * change / (n + 2)  # one row more that was won, and one that was lost
    spread = (n * float(np.square(moved).mean()) + 2) / (n + 2) - middle**2
    half = stdtrit(people - 1, 0.975) * np.sqrt(spread / (n + 2))
    return change, float(max(middle - half, -1)), float(min(middle + half, 1))


def _size(values, groups, variance):
    """How many independent values say as much about the mean as these do.

    Of N values it is N over the design effect, which is the variance of their mean over groups in units of that of N
    independent values. It is at least 1 for hits and misses; shares that are means already vary less than hits and
    misses do, and for them it is at least the ratio of the two variances. Where few groups have another value than the
    commonest one, the data hardly tell this effect: each such group takes a quarter of the weight of an assumption,
    that values of a group correlate by a half.
    Source: Kish 1965 for the design effect; the assumption was chosen by simulations (``tests/test_metrics.py``).
    """
    counts = np.bincount(groups)
    assumed = 1 + (np.square(counts).sum() / len(values) - 1) / 2
    common, often = np.unique(values, return_counts=True)
    known = 1 - 0.75 ** len(np.unique(groups[values != common[often.argmax()]]))
    off = np.bincount(groups, values - values.mean())
    if variance <= 1e-12:
        return len(values) / assumed
    effect = np.square(off).sum() * len(counts) / (len(counts) - 1) / len(values) / variance
    return len(values) / (known * max(values.var() / variance, effect) + (1 - known) * assumed)


def _grouped(values, groups):
    values = _home(finite(values, "values")).astype(float)
    if not len(values):
        raise Invalid("There is no mean of no values.")
    return values, np.unique(_home(groups), return_inverse=True)[1]


def _home(values):
    """A list, array or tensor, of whatever device and type, as an array."""
    return values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
