"""Cloaks: perturbations on photos that will later train a recogniser. Fawkes and LowKey.

All take images (N, 3, H, W) in [0, 1] of any float type and compute with a detached copy in float32, ``BATCH`` images
at a time, on a GPU eight times as many. They return images of the same shape and type, within the budget also after
rounding to that type.
Sources: Shan et al. 2020 (Fawkes), Cherepanova et al. 2021 (LowKey); constants of their published code.

Parameters
----------
images : the photos to be published
extractors : ``recognisers.load``'s or ``adaptive.purified`` ones; features are their embeddings scaled to unit length
mode : how large the budget is: "low", "mid" or "high", for v0.3 of Fawkes "min" too
steps : iterations, by default as many as the published code has for the mode
seed : the same one gives the same cloak

Raises
------
Invalid : for other images and options than these, no extractor, and an extractor in training mode
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from faceadv.attacks import leave, within
from faceadv.errors import Invalid, number, whole
from faceadv.images import gaussian_blur
from faceadv.networks import lpips
from faceadv.networks.common import generator
from faceadv.objectives import enter, evaluating, slope
from faceadv.precision import has_bfloat16, in_parts, together
from faceadv.recognisers import Recogniser
from faceadv.store import cache
from faceadv.store.paths import nearest

__all__ = ["cached", "dssim", "fawkes", "fawkes_targeted", "features", "lowkey", "multiscale", "perceptual",
           "target_shifts"]  # fmt: skip

# budget of DSSIM, steps, learning rate of Adadelta
FAWKES_03 = {"min": (0.002, 20, 40.0), "low": (0.003, 50, 35.0), "mid": (0.005, 200, 20.0), "high": (0.008, 500, 10.0)}
FAWKES_10 = {"low": (0.004, 40, 25.0), "mid": (0.012, 75, 20.0), "high": (0.017, 150, 15.0)}
PENALTY = 1e6  # weight of the squared excess over the budget
CLIP = 15 / 255  # v1.0 changes no pixel by more
FARTHEST = 20  # v0.3 draws its target among so many
BATCH = 32
SCALES = 3  # of ``multiscale``

Extractor = Recogniser | SimpleNamespace


def dssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural dissimilarity (1 - SSIM) / 2 of each image, (N,), differentiable. Source: Fawkes, section 5.2.

    ``metrics.ssim``'s number, many times faster with its gradient: the Gaussian windows are two products of matrices.
    """
    a, b = a.float(), b.float()
    rows, columns = (_window(side).to(a) for side in a.shape[2:])
    means = rows @ torch.stack([a, b, a * a, b * b, a * b]) @ columns.T
    ma, mb, aa, bb, ab = means
    numerator = (2 * ma * mb + 0.01**2) * (2 * (ab - ma * mb) + 0.03**2)
    denominator = (ma * ma + mb * mb + 0.01**2) * (aa - ma * ma + bb - mb * mb + 0.03**2)
    return (1 - (numerator / denominator).mean((1, 2, 3))) / 2


@functools.lru_cache(maxsize=8)
def _window(side):
    """Gaussian means of 11 neighbours, sigma 1.5, mirrored at the border, as a matrix (side, side)."""
    taps = torch.exp(-0.5 * (torch.arange(-5, 6) / 1.5) ** 2)
    matrix = torch.zeros(side, side)
    for offset, tap in zip(range(-5, 6), taps / taps.sum()):
        place = (torch.arange(side) + offset).abs()
        place = torch.where(place >= side, 2 * (side - 1) - place, place)
        matrix[torch.arange(side), place] += tap
    return matrix


def features(extractor: Extractor, images: Tensor, fast: bool = True) -> Tensor:
    """Embeddings of unit length (N, D), float32.

    Parameters
    ----------
    extractor : whose features
    images : (N, 3, H, W) in [0, 1]
    fast : computed in bfloat16 where the extractor and the hardware allow it
    """
    return F.normalize(extractor.embed(images, fast=fast).float())


def cached(label: str, make: Callable[[Tensor], Tensor], images: Tensor, extractors: Sequence[Extractor]) -> Tensor:
    """``make(images)`` as a user would publish it, in 8 bits; made once and kept in the cache.

    Parameters
    ----------
    label : what is made, with its settings; it is a part of the cache's key, as this module's text is
    make : the cloak, a function of the images
    images, extractors : the key holds the images' content and the extractors' weights
    """
    photos, kinds = enter(images), [[e, getattr(e, "precision", "")] for e in extractors]
    if not len(photos):
        return images.detach().clone()

    def eight_bits(pictures):
        return (pictures.float() * 255).round().byte().cpu().numpy()

    versions = [cache.versions(), photos.device.type, has_bfloat16(photos.device)]
    key = cache.key(label, Path(__file__), eight_bits(photos), kinds, versions)
    published = cache.array("cloaks", "cloak", key, lambda: eight_bits(make(photos)))
    return torch.from_numpy(published).to(images.device).float().div_(255).to(images.dtype)


def fawkes(
    images: Tensor, extractors: Sequence[Extractor], *, mode: str = "mid", steps: int | None = None, seed: int = 0
) -> Tensor:
    """Fawkes v1.0: move the features as far as the budget of DSSIM allows, in any direction.

    Maximises sum_m |f_m(x') - f_m(x)|² / |f_m(x)| - c max(DSSIM - rho, 0)² in tanh space by Adadelta. It starts at
    small random signs (at x itself the features have no slope); the weight of the features is halved where the budget
    is exceeded and doubled where it is not reached. After a step that exceeds it the change is shrunk back to it, which
    the published code leaves to the penalty. Each image keeps its best iterate within the budget.

    Parameters
    ----------
    images, extractors, mode, steps : as for all cloaks
    seed : of the small random signs
    """
    settings = _settings(extractors, mode, FAWKES_10, steps)

    def distance(part, rows):
        with torch.no_grad():
            clean = [features(e, part) for e in extractors]
        return lambda x: sum((features(e, x) - f).square().sum(1) for e, f in zip(extractors, clean))

    return _fawkes(images, distance, settings, CLIP, kick=generator(seed))


def fawkes_targeted(
    images: Tensor, extractors: Sequence[Extractor], targets: Sequence[Tensor], *, mode: str = "mid",
    steps: int | None = None,
) -> Tensor:  # fmt: skip
    """Fawkes v0.3: move the features to t = f(x) + 2 (mean of the target's - mean of the person's own).

    Minimises sum_m |f_m(x') - t_m| / |t_m| + c max(DSSIM - rho, 0)²; the learning rate falls to 0.8 of itself every
    third of the steps.

    Parameters
    ----------
    images, extractors, mode, steps : as for all cloaks
    targets : for each extractor the shifts (N, D) as ``target_shifts`` gives them
    """
    settings = _settings(extractors, mode, FAWKES_03, steps)
    if [len(shift) for shift in targets] != [len(images)] * len(extractors):
        raise Invalid(f"targets must be a tensor ({len(images)}, D) for each of the {len(extractors)} extractors.")

    def distance(part, rows):
        with torch.no_grad():
            wanted = [features(e, part) + shift.detach()[rows].to(part) for e, shift in zip(extractors, targets)]
        return lambda x: -sum((features(e, x) - t).norm(dim=1) / t.norm(dim=1) for e, t in zip(extractors, wanted))

    return _fawkes(images, distance, settings)


def target_shifts(own: Sequence[Tensor], public: Sequence[Tensor], labels: Tensor, seed: int = 0) -> list[Tensor]:
    """Where v0.3 sends a person: per extractor 2 (target's mean - own mean), repeated for the N photos, (N, D).

    The target is drawn among the ``FARTHEST`` people from the person's mean by the first extractor.

    Parameters
    ----------
    own : for each extractor the ``features`` (N, D) of one person's photos
    public : for each extractor those (M, D) of photos of other people
    labels : who is on these photos, (M,)
    seed : of the draw
    """
    means = [torch.stack([f[labels == person].mean(0) for person in labels.unique()]) for f in public]
    far = (means[0] - own[0].mean(0)).norm(dim=1).argsort(descending=True)[:FARTHEST]
    target = far[torch.randint(len(far), (1,), generator=generator(seed)).item()]
    return [(2 * (m[target] - mine.mean(0))).expand(len(mine), -1) for m, mine in zip(means, own, strict=True)]


def _exact(extractors):
    """Whether one of the extractors computes in float32 alone, once they are checked."""
    if not extractors:
        raise Invalid("A cloak needs at least one extractor, for example recognisers.load('dlib').")
    evaluating(*extractors)
    return any(getattr(e, "precision", "auto") == "float32" for e in extractors)


def _settings(extractors, mode, modes, steps):
    """Budget, steps, learning rate and whether gradients are in float32, all of them and the extractors checked."""
    exact = _exact(extractors)
    if mode not in modes:
        raise Invalid(f'The mode must be one of {", ".join(modes)}, not "{mode}"{nearest(mode, modes)}.')
    rho, published, lr = modes[mode]
    return rho, published if steps is None else whole("steps", steps, 1), lr, exact


def _fawkes(images, distance, settings, limit=1.0, kick=None):
    """Adadelta on -distance + c max(DSSIM - rho, 0)² in tanh space, batch by batch.

    limit: the largest change of a pixel; kick: draws a random first step, for a distance without a slope at x.
    """
    photos, rho = enter(images), settings[0]
    start = torch.zeros_like(photos)
    if kick is not None:  # drawn in parts of one size, so that a seed means the same on every device
        drawn = [torch.randn(part.shape, generator=kick) for part in photos.split(BATCH)]
        start = 0.01 * torch.cat(drawn).sign().to(photos)

    def cloaked_part(rows):
        x = photos[rows]
        return _fawkes_batch(x, start[rows], distance(x, rows), settings, limit, adapt=kick is not None)

    project = within(limit)
    cloaked = leave(_in_parts(cloaked_part, photos), images, project)
    while images.dtype != torch.float32 and (over := dssim(cloaked, photos) > rho).any():  # by the rounding
        nearer = leave(photos + 0.9 * (cloaked.float() - photos), images, project)
        cloaked = torch.where(over[:, None, None, None], nearer, cloaked)
    return cloaked


def _in_parts(function, photos):
    """The cloaked photos that a function makes of row numbers, all of them together."""
    parts = in_parts(function, torch.arange(len(photos)), together(BATCH, photos.device), "cloaking")
    return torch.cat([photos[:0], *parts])


def _fawkes_batch(x, start, distance, settings, limit, adapt):
    rho, steps, lr, exact = settings
    anchor = torch.atanh((2 * x - 1) * (1 - 1e-5))
    change = start.requires_grad_(True)
    weight = torch.ones(len(x), device=x.device)
    optimiser = torch.optim.Adadelta([change], lr=lr)
    best, farthest = x.clone(), torch.full((len(x),), -float("inf"), device=x.device)

    def image():
        moved = torch.tanh(anchor + change) / 2 + 0.5
        return torch.minimum(torch.maximum(moved, x - limit), x + limit)

    for step in range(steps):
        moved = image()
        far, cost = distance(moved), dssim(moved, x)
        better = (cost.detach() <= rho) & (far.detach() > farthest)
        best[better], farthest[better] = moved.detach()[better], far.detach()[better]
        loss = (PENALTY * (cost - rho).clamp_min(0).square() - weight * far).sum()
        change.grad = slope(loss, change, exact)  # and not that of whatever else has one
        optimiser.step()
        with torch.no_grad():
            # DSSIM grows with the square of a small change: back onto the budget
            change *= (rho / cost.clamp_min(1e-9)).sqrt().clamp_max(1)[:, None, None, None]
        if adapt:
            weight = torch.where(cost.detach() > rho, weight / 2, weight * 2).clamp(0.01, 100)
        elif step + 1 in (steps // 3, 2 * steps // 3):
            optimiser.param_groups[0]["lr"] *= 0.8
    return best


def lowkey(
    images: Tensor, extractors: Sequence[Extractor], *, steps: int = 50, alpha: float = 0.0025, price: float = 0.05,
    smooth: bool = True, seed: int = 0,
) -> Tensor:  # fmt: skip
    """LowKey: push the features away from the photo's, with and without a blur before the extractor, at a price.

    Maximises mean_j [|f_j(x') - f(x)|² / |f(x)|] - price * distance(x', x) by sign ascent from uniform noise of
    +-0.005. j runs over the extractors, each without and with a Gaussian blur before it. The distance is that of
    ``perceptual``. There is no eps: 0.005 + steps * alpha bounds the change.

    Parameters
    ----------
    images, extractors : as for all cloaks
    steps : iterations
    alpha : the change of each pixel in a step
    price : what a unit of the distance costs
    smooth : whether there are the terms with a blur (7 pixels wide, sigma 3)
    seed : of the noise
    """
    exact, photos, steps = _exact(extractors), enter(images), whole("steps", steps, 1)
    alpha, price, draw = number("alpha", alpha, 0, 1), number("price", price, 0), generator(seed)
    _, distance = perceptual(photos.device)
    noise = (0.01 * torch.rand(photos.shape, generator=draw) - 0.005).to(photos)

    def cloaked(rows):
        x = photos[rows]
        with torch.no_grad():
            clean = [features(e, x) for e in extractors]
        moved = (x + noise[rows]).clamp(0, 1)
        for _ in range(steps):
            moved = moved.detach().requires_grad_(True)
            views = [moved, gaussian_blur(moved, 7, 3.0)] if smooth else [moved]
            terms = [(features(e, v) - f).square().sum(1) for e, f in zip(extractors, clean) for v in views]
            gain = torch.stack(terms).mean(0) - price * distance(moved, x)
            moved = (moved + alpha * slope(gain, moved, exact).sign()).clamp(0, 1)
        return moved.detach()

    return leave(_in_parts(cloaked, photos), images, within(0.005 + steps * alpha))


def perceptual(device: torch.device | str = "cpu") -> tuple[str, Callable[[Tensor, Tensor], Tensor]]:
    """LowKey's distance and its name: LPIPS as in the paper if AlexNet's weights are here, else ``multiscale``.

    Returns ``(name, distance)``, a function of two batches of images to (N,). `faceadv weights fetch alexnet` gets
    the weights, 244 MB.
    """
    try:
        return "LPIPS", lpips.load(device)
    except FileNotFoundError:
        return "1 - multi-scale SSIM", multiscale


def multiscale(a: Tensor, b: Tensor) -> Tensor:
    """1 - mean SSIM at full, half and a quarter of the images' size, (N,), differentiable."""
    total = 0.0
    for i in range(SCALES):
        if i:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        total = total + 1 - 2 * dssim(a, b)
    return 1 - total / SCALES
