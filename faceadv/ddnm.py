"""DDNM: restore an image from a linear measurement with a diffusion prior, exact where it was measured.

Source: Wang, Yu and Zhang 2023, Zero-shot image restoration using denoising diffusion null-space model (ICLR). The
null-space step follows the paper, for measurements without noise. The step to the next time (with eta) and time travel
follow the code that its authors published. Each predicted image is clipped to [-1, 1], as in DDPM's own sampling,
because otherwise a small prior's colours run away. Images are (N, 3, H, W). An operator is a pair of functions, A and
its pseudo-inverse A⁺, with A(A⁺(A(x))) = A(x). Torch's global random state stays as it is.

Parameters
----------
unet, schedule : a prior as ``networks.prior.load`` gives it; its images are squares of side S
steps : from 1 to the number of the schedule's times
eta : the part of the noise that is new in each step, from 0 to 1 (not the eta of DDIM)
travel_repeat : how often each step but the last is made; before each repetition the way goes back by one step
seeds, seed : one number per image, or the first of 0, 1, 2 … so that an image comes out the same alone and in a batch
scale : side of the blocks of pixels that super-resolution measures; it divides S
stages : "both", "super-resolution" or "colourisation"
time : where the diffusion of ``DiffPure`` stops, from 1 to the last of the schedule's times (999 of 1000)

Raises
------
Invalid : for other arguments than these, for other images, and for a prior that is not as ``load`` gives it
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceadv.errors import Invalid, number, whole
from faceadv.networks import prior
from faceadv.networks.common import checked, generator
from faceadv.precision import autocast, has_bfloat16
from faceadv.store import cache

if TYPE_CHECKING:  # takes seconds
    from diffusers import SchedulerMixin

__all__ = ["DiffPure", "Shortened", "TwoStage", "colourisation", "ddnm", "guess", "measured", "resized", "restored"]
__all__ += ["sample", "super_resolution", "times"]

Function = Callable[[Tensor], Tensor]
STAGES = ("both", "super-resolution", "colourisation")
FARTHEST = 4.0  # images in [-1, 1] measure less, even after a stage before and after bicubic interpolation


def super_resolution(scale: int) -> tuple[Function, Function]:
    """A: the mean of each block of scale x scale pixels; A⁺: its copies. H and W must be multiples of ``scale``."""
    whole("scale", scale, 1)

    def shrink(x):
        if x.shape[2] % scale or x.shape[3] % scale:
            raise Invalid(f"The sides must be multiples of the scale {scale}, not {x.shape[2]} x {x.shape[3]}.")
        return F.avg_pool2d(x, scale)

    return shrink, lambda small: small.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def colourisation() -> tuple[Function, Function]:
    """A: (R + G + B) / 3, (N, 1, H, W); A⁺: three copies of it."""
    return (lambda x: x.mean(1, keepdim=True)), (lambda grey: grey.expand(-1, 3, -1, -1))


def times(steps: int, travel_repeat: int = 1) -> list[tuple[int, int]]:
    """The steps' order, from steps - 1 down to 0. With travel_repeat > 1 it goes back by one step and down again.

    Each entry is (from, to) in units of steps; to = -1 is the image, to > from a travel back in time.
    """
    order = []
    for t in reversed(range(whole("steps", steps, 1))):
        back = [(t - 1, t), (t, t - 1)] if t else []
        order += [(t, t - 1), *back * (whole("travel_repeat", travel_repeat, 1) - 1)]
    return order


def ddnm(
    measured: Tensor, operator: tuple[Function, Function], unet: nn.Module, schedule: "SchedulerMixin", *,
    steps: int = 20, eta: float = 0.85, travel_repeat: int = 1, seeds: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """An image (N, 3, S, S) for each measurement y (N, …) in [-1, 1], whose own measurement is the same.

    Each step: x0 = (x_t - sqrt(1 - a_t) e) / sqrt(a_t); x0 <- x0 - A⁺(A x0 - y);
    x_s = sqrt(a_s) x0 + sqrt(1 - a_s) (eta xi + sqrt(1 - eta²) e).
    Differentiable in ``measured``; call it under ``torch.no_grad()`` if you need no gradient. The result can leave
    [-1, 1] a little.

    Parameters
    ----------
    measured : y, as the operator's A gives it of images in [-1, 1]
    operator : ``(A, A⁺)``
    unet, schedule, steps, eta, travel_repeat, seeds : see the top of this module
    """
    A, inverse = operator
    sums = schedule.alphas_cumprod.to(measured.device)
    _check(schedule, steps, eta)
    skip = len(sums) // steps
    seeds = range(len(measured)) if seeds is None else seeds
    copies = inverse(measured)
    if not copies.is_floating_point() or copies.ndim != 4 or copies.shape[1] != 3 or len(seeds) != len(copies):
        raise Invalid("measured must be a float tensor that the operator gives, and there must be one seed per image.")
    if copies.numel() and not copies.detach().abs().max() <= FARTHEST:  # not NaN either
        raise Invalid("measured must be of images in [-1, 1], and it holds values that are larger or not finite.")
    draws = [generator(s) for s in seeds]

    def at(t):
        return sums[t * skip] if t >= 0 else sums.new_tensor(1.0)

    x, predicted = _noise(draws, copies), None
    for now, then in times(steps, travel_repeat):
        if then > now:
            x = at(then).sqrt() * predicted + (1 - at(then)).sqrt() * _noise(draws, copies)
            continue
        e = guess(unet, x, now * skip, schedule)
        predicted = ((x - (1 - at(now)).sqrt() * e) / at(now).sqrt()).clamp(-1, 1)
        clean = predicted - inverse(A(predicted) - measured)
        spread = (1 - at(then)).sqrt()
        x = at(then).sqrt() * clean
        if then >= 0:
            x = x + spread * (eta * _noise(draws, copies) + (1 - eta**2) ** 0.5 * e)
    return x


def _noise(draws, like):
    """Normal numbers of the shape of ``like`` (N, …), each image's from its own generator."""
    return torch.stack([torch.randn(like.shape[1:], generator=draw) for draw in draws]).to(like.device)


def _check(schedule, steps, eta=0.0):
    prior.prediction(schedule)
    whole("steps", steps, 1, len(schedule.alphas_cumprod))
    number("eta", eta, 0, 1)


class _Purifier(nn.Module):
    """Images (N, 3, H, W) in [0, 1] to the same: made a square of side S in [-1, 1], restored, and resized again."""

    def __init__(self, unet: nn.Module, schedule: "SchedulerMixin", steps: int, seed: int):
        super().__init__()
        _check(schedule, steps)
        self.training = False  # itself; whether the UNet is in training mode is its owner's choice
        self.unet, self.schedule, self.side = unet, schedule, prior.side(unet)
        self.steps, self.seed = steps, whole("seed", seed, 0)

    def forward(self, images: Tensor) -> Tensor:
        images = checked(images)
        if not len(images):
            return images.clone()
        x = self.restore(resized(images, self.side) * 2 - 1)
        return resized((x.clamp(-1, 1) + 1) / 2, images.shape[2:]).clamp(0, 1)


class TwoStage(_Purifier):
    """Super-resolution, then colourisation: images (N, 3, H, W) in [0, 1] to the same. Differentiable.

    Stage 1 measures the means of ``scale`` x ``scale`` blocks of the image at the prior's side and restores; stage 2
    measures the grey of that and restores its colour. Image k of a call draws with seed + k.
    Source: the two-stage paper, section III; see notebook 06 for what it leaves open.

    Parameters
    ----------
    unet, schedule, scale, steps, eta, stages, seed : see the top of this module
    """

    def __init__(self, unet: nn.Module, schedule: "SchedulerMixin", scale: int = 2, steps: int = 20, eta: float = 0.85,
                 stages: str = "both", seed: int = 0):  # fmt: skip
        super().__init__(unet, schedule, steps, seed)
        if stages not in STAGES:
            raise Invalid(f'The stages are {", ".join(STAGES[:-1])} or {STAGES[-1]}, not "{stages}".')
        if self.side % whole("scale", scale, 1):
            raise Invalid(f"scale must divide {self.side}, the side of the prior's images, which {scale} does not.")
        self.scale, self.eta, self.stages = scale, number("eta", eta, 0, 1), stages

    def restore(self, x: Tensor) -> Tensor:
        """The stages themselves: (N, 3, S, S) in [-1, 1] to the same, with grey blocks as they were."""
        operators = {"super-resolution": super_resolution(self.scale), "colourisation": colourisation()}
        for stage, (name, operator) in enumerate(operators.items()):
            if self.stages in ("both", name):
                measured = operator[0](x)
                seeds = [self.seed + k + 1_000_003 * stage for k in range(len(x))]  # no noise twice
                x = ddnm(measured, operator, self.unet, self.schedule, steps=self.steps, eta=self.eta, seeds=seeds)
        return x


class Shortened(nn.Module):
    """A surrogate for an attack's gradient: the same stages in ``steps`` steps, with other noise at each call."""

    def __init__(self, two_stage: TwoStage, steps: int = 3):
        super().__init__()
        _check(two_stage.schedule, steps)
        self.short, self.calls, self.training = copy.copy(two_stage), 0, False
        self.short.steps = steps

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.short.seed = 1_000_000 + 1000 * self.calls  # far from the seeds that are judged
        return self.short(images)


def measured(two_stage: TwoStage) -> Function:
    """A function that enlarges what the stages measure of images (N, 3, H, W) to their size again, without a network.

    It is differentiable and cheap: an attack can use it in the place of the purifier.
    """

    def without_model(images):
        images = checked(images)
        x = resized(images, two_stage.side)
        if two_stage.stages != "colourisation":
            x = F.avg_pool2d(x, two_stage.scale)
        if two_stage.stages != "super-resolution":
            x = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        return resized(x, images.shape[2:]).clamp(0, 1)

    return without_model


class DiffPure(_Purifier):
    """Diffuse to a time, then denoise: images (N, 3, H, W) in [0, 1] to the same; image k draws with seed + k.

    Source: Nie et al. 2022, Diffusion models for adversarial purification, section 3.1, with DDIM's deterministic way
    back (Song et al. 2021) where they solve a stochastic differential equation. It has at most ``time`` steps.

    Parameters
    ----------
    unet, schedule, time, steps, seed : see the top of this module
    """

    def __init__(self, unet: nn.Module, schedule: "SchedulerMixin", time: int = 100, steps: int = 20, seed: int = 0):
        super().__init__(unet, schedule, steps, seed)
        self.time = whole("time", time, 1, len(schedule.alphas_cumprod) - 1)

    def restore(self, x: Tensor) -> Tensor:
        """The way there and back: (N, 3, S, S) in [-1, 1] to about the same."""
        sums = self.schedule.alphas_cumprod.to(x.device)
        noise = _noise([generator(self.seed + k) for k in range(len(x))], x)
        order = torch.linspace(self.time, 0, min(self.steps, self.time) + 1).long().tolist()
        x = sums[order[0]].sqrt() * x + (1 - sums[order[0]]).sqrt() * noise
        for now, then in itertools.pairwise(order):
            e = guess(self.unet, x, now, self.schedule)
            clean = ((x - (1 - sums[now]).sqrt() * e) / sums[now].sqrt()).clamp(-1, 1)
            x = clean if then == 0 else sums[then].sqrt() * clean + (1 - sums[then]).sqrt() * e
        return x


def restored(purifier: Function, images: Tensor, batch: int = 16) -> Tensor:
    """Images (N, 3, H, W) in [0, 1], purified without gradients in parts of ``batch``.

    Those of a diffusion are kept in the cache, part by part and in half precision (a 4000th at most is lost), so that a
    killed run goes on.

    Parameters
    ----------
    purifier : any; image k of a part draws the noise of image k of every part
    images : what is purified
    batch : how many at a time
    """
    with torch.no_grad():
        return torch.cat([_kept(purifier, part) for part in images.split(batch)]) if len(images) else images.clone()


def _kept(purifier, part):
    if not isinstance(purifier, _Purifier):
        return purifier(part)
    computed = [cache.versions(), part.device.type, has_bfloat16(part.device)]
    key = cache.key(purifier, str(purifier.schedule.config), Path(__file__), part, computed)
    kept = cache.array("restored", type(purifier).__name__, key, lambda: purifier(part).half().cpu().numpy())
    return torch.from_numpy(kept).to(part)


def sample(unet: nn.Module, schedule: "SchedulerMixin", count: int, steps: int = 50, seed: int = 0) -> Tensor:
    """Faces that nobody has, (count, 3, S, S) in [0, 1] on the CPU: noise, denoised by DDIM.

    Parameters
    ----------
    unet, schedule, steps : see the top of this module
    count : number of images
    seed : image k draws with seed + k
    """
    side, device = prior.side(unet), next(unet.parameters(), torch.empty(0)).device
    nothing = torch.full((whole("count", count, 1), 3, side, side), 0.5, device=device)  # 0 in the network's range
    with torch.no_grad():
        return DiffPure(unet, schedule, len(schedule.alphas_cumprod) - 1, steps, seed)(nothing).cpu()


def guess(unet: nn.Module, x: Tensor, t: int | Tensor, schedule: "SchedulerMixin | None" = None) -> Tensor:
    """The prior's guess of the noise in x (N, 3, S, S): float32, computed in bfloat16 where the hardware has it.

    A learned variance (three more channels) is left out.

    Parameters
    ----------
    unet : of a prior
    x : noisy images, about in [-1, 1] without their noise
    t : the time, one of the schedule's, or one for each image (N,)
    schedule : of the prior; needed if the UNet predicts the image or v, from which the noise follows
    """
    with autocast(x.device):
        out = unet(x.contiguous(memory_format=torch.channels_last), t).sample[:, :3].float()
    kind = prior.prediction(schedule)
    if kind == "epsilon":
        return out
    a = schedule.alphas_cumprod[t].to(x.device)
    return a.sqrt() * out + (1 - a).sqrt() * x if kind == "v_prediction" else (x - a.sqrt() * out) / (1 - a).sqrt()


def resized(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Bicubic, antialiased, to a side or to (height, width); the images themselves if they have that size."""
    size = torch.Size((size, size) if isinstance(size, int) else size)
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
