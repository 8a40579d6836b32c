"""Cloaks: perturbations on photos that will later train a recogniser. Fawkes and LowKey.

Extractors are recognisers (``recognisers.load``); features are their embeddings scaled to unit length. All functions
take images (N, 3, H, W) in [0, 1] and return the same, and are deterministic in ``seed``.
Sources: Shan et al. 2020 (Fawkes), Cherepanova et al. 2021 (LowKey); constants of their published code.
"""

import functools
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from faceadv import recognisers
from faceadv.errors import Invalid
from faceadv.images import check_images
from faceadv.networks import lpips
from faceadv.store.paths import cache_root, nearest, replacing

# budget of DSSIM, steps, learning rate of Adadelta
FAWKES_03 = {"min": (0.002, 20, 40.0), "low": (0.003, 50, 35.0), "mid": (0.005, 200, 20.0), "high": (0.008, 500, 10.0)}
FAWKES_10 = {"low": (0.004, 40, 25.0), "mid": (0.012, 75, 20.0), "high": (0.017, 150, 15.0)}
PENALTY = 1e6  # weight of the squared excess over the budget
CLIP = 15 / 255  # v1.0 changes no pixel by more
FARTHEST = 20  # v0.3 draws its target among so many


def dssim(a, b):
    """Structural dissimilarity (1 - SSIM) / 2 per image, (N,), differentiable. Source: Fawkes, section 5.2.

    ``metrics.ssim``'s number, many times faster with its gradient: the Gaussian windows are two products of matrices.
    """
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


def features(extractor, images, fast=True):
    """Embeddings of unit length (N, D)."""
    return F.normalize(extractor.embed(images, fast=fast))


def cached(label, make, images, extractors):
    """``make(images)`` as a user would publish it, in 8 bits; made once and kept in the cache.

    label: what is made, with its settings; the images, the extractors' weights and this module's text count as well.
    """
    key = hashlib.sha256(Path(__file__).read_bytes() + label.encode())
    key.update((images * 255).round().byte().cpu().numpy().tobytes())
    for extractor in extractors:
        key.update(recognisers.fingerprint(extractor).encode())
    path = cache_root() / "cloaks" / f"{key.hexdigest()[:32]}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        done = (make(images) * 255).round().byte().cpu().numpy()
        with replacing(path) as part, open(part, "wb") as file:
            np.save(file, done)
    return torch.from_numpy(np.load(path)).to(images.device).float().div_(255)


def fawkes(images, extractors, *, mode="mid", steps=None, seed=0, batch=32):
    """Fawkes v1.0: move the features as far as the budget of DSSIM allows, in any direction.

    Maximises sum_m |f_m(x') - f_m(x)|² / |f_m(x)| - c max(DSSIM - rho, 0)² in tanh space by Adadelta. It starts at
    small random signs (at x itself the features have no slope); the weight of the features is halved where the budget
    is exceeded and doubled where it is not reached. After a step that exceeds it the change is shrunk back to it, which
    the published code leaves to the penalty. Each image keeps its best iterate within the budget.
    Raises ``ValueError`` for another mode than "low", "mid", "high".
    """
    rho, count, lr = _mode(mode, FAWKES_10)

    def distance(part, rows):
        with torch.no_grad():
            clean = [features(e, part) for e in extractors]
        return lambda x: sum((features(e, x) - f).square().sum(1) for e, f in zip(extractors, clean))

    return _fawkes(images, distance, rho, steps or count, lr, batch, clip=CLIP, kick=seed)


def fawkes_targeted(images, extractors, targets, *, mode="mid", steps=None, batch=32):
    """Fawkes v0.3: move the features to t = f(x) + 2 (mean of the target's - mean of the person's own).

    Minimises sum_m |f_m(x') - t_m| / |t_m| + c max(DSSIM - rho, 0)²; the learning rate falls to 0.8 of itself every
    third of the steps. targets: per extractor the shifts (N, D) as ``target_shifts`` gives them.
    Raises ``ValueError`` for another mode than "min", "low", "mid", "high".
    """
    rho, count, lr = _mode(mode, FAWKES_03)

    def distance(part, rows):
        with torch.no_grad():
            wanted = [features(e, part) + shift[rows].to(part) for e, shift in zip(extractors, targets)]
        return lambda x: -sum((features(e, x) - t).norm(dim=1) / t.norm(dim=1) for e, t in zip(extractors, wanted))

    return _fawkes(images, distance, rho, steps or count, lr, batch)


def target_shifts(own, public, labels, seed=0):
    """Where v0.3 sends a person: per extractor 2 (target's mean - own mean), repeated for the N photos, (N, D).

    own: per extractor the ``features`` (N, D) of one person's photos; public: those (M, D) of photos of other people
    with labels (M,), of whom the target is drawn among the ``FARTHEST`` from the person's mean by the first extractor.
    """
    means = [torch.stack([f[labels == person].mean(0) for person in labels.unique()]) for f in public]
    far = (means[0] - own[0].mean(0)).norm(dim=1).argsort(descending=True)[:FARTHEST]
    target = far[torch.randint(len(far), (1,), generator=torch.Generator().manual_seed(seed)).item()]
    return [(2 * (m[target] - mine.mean(0))).expand(len(mine), -1) for m, mine in zip(means, own)]


def _mode(mode, modes):
    if mode not in modes:
        raise Invalid(f'The mode must be one of {", ".join(modes)}, not "{mode}"{nearest(mode, modes)}.')
    return modes[mode]


def _fawkes(images, distance, rho, steps, lr, batch, clip=None, kick=None):
    """Adadelta on -distance + c max(DSSIM - rho, 0)² in tanh space, batch by batch.

    clip: the largest change of a pixel; kick: the seed of a random first step, for a distance without a slope at x.
    """
    check_images(images)
    bar = tqdm(
        torch.arange(len(images)).split(batch),
        desc="cloaking",
        unit="batch",
        disable=bool(os.environ.get("FACEADV_QUIET")),
    )
    generator = torch.Generator().manual_seed(kick or 0)
    done = []
    for rows in bar:
        x = images[rows]
        start = torch.zeros_like(x) if kick is None else 0.01 * torch.randn(x.shape, generator=generator).sign().to(x)
        done.append(_fawkes_batch(x, start, distance(x, rows), rho, steps, lr, clip, adapt=kick is not None))
    return torch.cat(done) if done else images.clone()


def _fawkes_batch(x, start, distance, rho, steps, lr, clip, adapt):
    anchor = torch.atanh((2 * x - 1) * (1 - 1e-5))
    change = start.requires_grad_(True)
    weight = torch.ones(len(x), device=x.device)
    optimiser = torch.optim.Adadelta([change], lr=lr)
    best, farthest = x.clone(), torch.full((len(x),), -float("inf"), device=x.device)

    def image():
        moved = torch.tanh(anchor + change) / 2 + 0.5
        return moved if clip is None else torch.minimum(torch.maximum(moved, x - clip), x + clip)

    for step in range(steps):
        moved = image()
        far, cost = distance(moved), dssim(moved, x)
        better = (cost.detach() <= rho) & (far.detach() > farthest)
        best[better], farthest[better] = moved.detach()[better], far.detach()[better]
        loss = (PENALTY * (cost - rho).clamp_min(0).square() - weight * far).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            # DSSIM grows with the square of a small change: back onto the budget
            change *= (rho / cost.clamp_min(1e-9)).sqrt().clamp_max(1)[:, None, None, None]
        if adapt:
            weight = torch.where(cost.detach() > rho, weight / 2, weight * 2).clamp(0.01, 100)
        elif step + 1 in (steps // 3, 2 * steps // 3):
            optimiser.param_groups[0]["lr"] *= 0.8
    return best


def lowkey(images, extractors, *, steps=50, alpha=0.0025, price=0.05, smooth=True, seed=0, batch=32):
    """LowKey: push the features away from the photo's, with and without a blur before the extractor, at a price.

    Maximises mean_j [|f_j(x') - f(x)|² / |f(x)|] - price * distance(x', x) by sign ascent of ``alpha`` from
    uniform noise of +-0.005; j runs over the extractors, each plain and, with ``smooth``, behind a Gaussian blur of
    sigma 3 and 7 pixels. There is no eps; steps * alpha bounds the change. The distance is that of
    ``perceptual``.
    """
    check_images(images)
    _, distance = perceptual(images.device)
    generator = torch.Generator().manual_seed(seed)
    noise = (0.01 * torch.rand(images.shape, generator=generator) - 0.005).to(images)
    done = []
    starts = range(0, len(images), batch)
    for i in tqdm(starts, desc="cloaking", unit="batch", disable=bool(os.environ.get("FACEADV_QUIET"))):
        x = images[i : i + batch]
        with torch.no_grad():
            clean = [features(e, x) for e in extractors]
        moved = (x + noise[i : i + batch]).clamp(0, 1)
        for _ in range(steps):
            moved = moved.detach().requires_grad_(True)
            views = [moved, gaussian_blur(moved, 7, [3.0, 3.0])] if smooth else [moved]
            terms = [(features(e, v) - f).square().sum(1) for e, f in zip(extractors, clean) for v in views]
            gain = torch.stack(terms).mean(0) - price * distance(moved, x)
            (g,) = torch.autograd.grad(gain.sum(), moved)
            moved = (moved + alpha * g.sign()).clamp(0, 1)
        done.append(moved.detach())
    return torch.cat(done) if done else images.clone()


def perceptual(device="cpu"):
    """LowKey's distance and its name: LPIPS as in the paper if AlexNet's weights are here, else ``multiscale``.

    Returns ``(name, distance)``, a function of two batches of images to (N,). `faceadv weights fetch alexnet` gets
    the weights, 244 MB.
    """
    try:
        return "LPIPS", lpips.load(device)
    except FileNotFoundError:
        return "1 - multi-scale SSIM", multiscale


def multiscale(a, b, scales=3):
    """1 - mean SSIM over ``scales`` halvings of the images, per image (N,), differentiable."""
    total = 0.0
    for i in range(scales):
        total = total + 1 - 2 * dssim(a, b)
        if i + 1 < scales:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return 1 - total / scales
