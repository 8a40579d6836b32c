"""DDNM: restore an image from a linear measurement with a diffusion prior, exact where it was measured.

Source: Wang, Yu and Zhang 2023, Zero-shot image restoration using denoising diffusion null-space model (ICLR): the
noise-free null-space step is the paper's, the step to the next time (eta) and time travel are its published code's.
Each predicted image is clipped to [-1, 1], as in DDPM's own sampling: without it a small prior's colours run away.
Images are (N, 3, H, W); an operator is a pair of functions (A, its pseudo-inverse) with A(A⁺(A(x))) = A(x).
"""

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from faceadv.errors import Invalid
from faceadv.precision import autocast


def super_resolution(scale):
    """A: the mean of each block of scale x scale pixels; A⁺: its copies. H and W must be multiples of ``scale``."""

    def enlarge(small):
        return small.repeat_interleave(scale, 2).repeat_interleave(scale, 3)

    return (lambda x: F.avg_pool2d(x, scale)), enlarge


def colourisation():
    """A: (R + G + B) / 3, (N, 1, H, W); A⁺: three copies of it."""
    return (lambda x: x.mean(1, keepdim=True)), (lambda grey: grey.expand(-1, 3, -1, -1))


def times(steps, travel_length=1, travel_repeat=1):
    """The steps' order: from steps - 1 down to 0, and, with travel_repeat > 1, every ``travel_length`` back and again.

    Each entry is (from, to) in units of steps; to = -1 is the image, to > from a travel back in time.
    """
    order, left = [], {j: travel_repeat - 1 for j in range(0, steps - travel_length, travel_length)}
    t = steps - 1
    while t >= 0:
        order.append((t, t - 1))
        t -= 1
        if left.get(t, 0) > 0:
            left[t] -= 1
            order.append((t, t + travel_length))
            t += travel_length
    return order


def ddnm(measured, operator, unet, schedule, *, steps=20, eta=0.85, travel_length=1, travel_repeat=1, seeds=None):
    """An image (N, 3, S, S) for each measurement (N, …), whose own measurement is the same; about in [-1, 1].

    unet: a ``UNet2DModel`` that predicts noise; schedule: a diffusers scheduler, whose cumulative alphas are used.
    Each step: x0 = (x_t - sqrt(1 - a_t) e) / sqrt(a_t); x0 <- x0 - A⁺(A x0 - y);
    x_s = sqrt(a_s) x0 + sqrt(1 - a_s) (eta xi + sqrt(1 - eta²) e). eta is not that of DDIM.
    seeds: one number an image (0 to N - 1 by default), so that an image comes out the same alone and in a batch.
    Differentiable in ``measured``; call it under ``torch.no_grad()`` otherwise. Raises ``ValueError`` for more steps
    than the schedule has.
    """
    A, inverse = operator
    device = measured.device
    sums = schedule.alphas_cumprod.to(device)
    if not 1 <= steps <= len(sums):
        raise Invalid(f"steps must lie between 1 and {len(sums)}, not {steps}.")
    skip = len(sums) // steps
    draws = [torch.Generator().manual_seed(int(s)) for s in (range(len(measured)) if seeds is None else seeds)]
    shape = inverse(measured).shape[1:]

    def noise():
        return torch.stack([torch.randn(shape, generator=draw) for draw in draws]).to(device)

    def at(t):
        return sums[t * skip] if t >= 0 else sums.new_tensor(1.0)

    x, predicted = noise(), None
    for now, then in times(steps, travel_length, travel_repeat):
        if then > now:
            x = at(then).sqrt() * predicted + (1 - at(then)).sqrt() * noise()
            continue
        e = guess(unet, x, now * skip)
        predicted = ((x - (1 - at(now)).sqrt() * e) / at(now).sqrt()).clamp(-1, 1)
        clean = predicted - inverse(A(predicted) - measured)
        spread = (1 - at(then)).sqrt()
        x = at(then).sqrt() * clean
        if then >= 0:
            x = x + spread * (eta * noise() + (1 - eta**2) ** 0.5 * e)
    return x


class TwoStage(nn.Module):
    """Super-resolution, then colourisation: images (N, 3, H, W) in [0, 1] to the same, by a diffusion prior of side S.

    Stage 1 measures the means of ``scale`` x ``scale`` blocks of the image at the prior's side and restores; stage 2
    measures the grey of that and restores its colour. stages: "both", "super-resolution" or "colourisation".
    The image comes back at its own side by bicubic interpolation. seed: image k of a call draws with seed + k.
    Differentiable. Source: the two-stage paper, section III; see notebook 06 for what it leaves open.
    """

    def __init__(self, unet, schedule, scale=2, steps=20, eta=0.85, stages="both", seed=0):
        super().__init__()
        if stages not in ("both", "super-resolution", "colourisation"):
            raise Invalid(f'The stages are both, super-resolution or colourisation, not "{stages}".')
        self.unet, self.schedule = unet, schedule
        self.scale, self.steps, self.eta, self.stages, self.seed = scale, steps, eta, stages, seed

    def forward(self, images):
        x = self.restore(resized(images, self.unet.config.sample_size) * 2 - 1)
        return resized((x.clamp(-1, 1) + 1) / 2, images.shape[-1]).clamp(0, 1)

    def restore(self, x):
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

    def __init__(self, two_stage, steps=3):
        super().__init__()
        self.short, self.calls = copy.copy(two_stage), 0
        self.short.steps = steps

    def forward(self, images):
        self.calls += 1
        self.short.seed = 1_000_000 + 1000 * self.calls  # far from the seeds that are judged
        return self.short(images)


def measured(two_stage):
    """What the stages measure of images (N, 3, H, W), enlarged without a model: a function, for an attack on that."""

    def without_model(images):
        x = resized(images, two_stage.unet.config.sample_size)
        if two_stage.stages != "colourisation":
            x = F.avg_pool2d(x, two_stage.scale)
        if two_stage.stages != "super-resolution":
            x = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        return resized(x, images.shape[-1]).clamp(0, 1)

    return without_model


class DiffPure(nn.Module):
    """Diffuse to a time, then denoise: images (N, 3, H, W) in [0, 1] to the same, by the same prior.

    time: where the diffusion stops, of 1000; steps: of DDIM's deterministic way back. seed as for ``TwoStage``.
    Source: Nie et al. 2022, Diffusion models for adversarial purification, section 3.1, with DDIM's deterministic way
    back (Song et al. 2021) where they solve a stochastic differential equation.
    """

    def __init__(self, unet, schedule, time=100, steps=20, seed=0):
        super().__init__()
        self.unet, self.schedule, self.time, self.steps, self.seed = unet, schedule, time, steps, seed

    def forward(self, images):
        x = resized(images, self.unet.config.sample_size) * 2 - 1
        sums = self.schedule.alphas_cumprod.to(x.device)
        draws = [torch.Generator().manual_seed(self.seed + k) for k in range(len(x))]
        noise = torch.stack([torch.randn(x.shape[1:], generator=draw) for draw in draws]).to(x)
        order = torch.linspace(self.time, 0, min(self.steps, self.time) + 1).long().tolist()
        x = sums[order[0]].sqrt() * x + (1 - sums[order[0]]).sqrt() * noise
        for now, then in itertools.pairwise(order):
            e = guess(self.unet, x, now)
            clean = ((x - (1 - sums[now]).sqrt() * e) / sums[now].sqrt()).clamp(-1, 1)
            x = clean if then == 0 else sums[then].sqrt() * clean + (1 - sums[then]).sqrt() * e
        return resized((x.clamp(-1, 1) + 1) / 2, images.shape[-1]).clamp(0, 1)


def sample(unet, schedule, count, steps=50, seed=0):
    """Faces that nobody has, (count, 3, S, S) in [0, 1]: noise, denoised by DDIM. Image k draws with seed + k."""
    side = unet.config.sample_size
    nothing = torch.full((count, 3, side, side), 0.5)  # 0 in the network's range
    with torch.no_grad():
        return DiffPure(unet, schedule, len(schedule.alphas_cumprod) - 1, steps, seed)(nothing)


def guess(unet, x, t):
    """The network's guess of the noise in x at time t, in bfloat16 where the hardware has it; float32."""
    with autocast(x.device):
        return unet(x.contiguous(memory_format=torch.channels_last), t).sample.float()


def resized(images, side):
    """Bicubic, antialiased; the images themselves if they have that side."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False)
