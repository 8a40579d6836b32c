"""Purifiers: chips in, chips out, with an adversarial perturbation made smaller. ``load(name)`` gives a module."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from faceadv import classic, ddnm
from faceadv import images as image_ops
from faceadv.errors import Invalid
from faceadv.images import check_images
from faceadv.networks import prior as prior_network
from faceadv.networks import puface, resgn
from faceadv.store.paths import nearest


class Jpeg(nn.Module):
    """JPEG at ``quality`` (1 to 95). Its rounding has no gradient: images come back detached."""

    def __init__(self, quality=75):
        super().__init__()
        self.quality = quality

    def forward(self, images):
        check_images(images)
        return image_ops.jpeg(images.detach(), self.quality)


class BitDepth(nn.Module):
    """Each colour rounded to ``bits`` bits (1 to 8). No gradient: images come back detached.

    Source: Xu, Evans and Qi 2018, Feature squeezing, section III.A.
    """

    def __init__(self, bits=4):
        super().__init__()
        if bits not in range(1, 9):
            raise Invalid(f"bits must be a whole number from 1 to 8, not {bits!r}.")
        self.levels = 2**bits - 1

    def forward(self, images):
        check_images(images)
        return (images.detach() * self.levels).round() / self.levels


class Blur(nn.Module):
    """Gaussian blur; sigma in pixels. Differentiable."""

    def __init__(self, sigma=1.0):
        super().__init__()
        self.sigma = sigma

    def forward(self, images):
        check_images(images)
        return classic.blur(images, self.sigma)


class Median(nn.Module):
    """The median of each ``size`` x ``size`` window (odd), the border repeated. Differentiable almost everywhere.

    Source: Xu, Evans and Qi 2018, Feature squeezing, section III.B.
    """

    def __init__(self, size=3):
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise Invalid(f"size must be an odd number of at least 1, not {size!r}.")
        self.size = size

    def forward(self, images):
        check_images(images)
        padded = F.pad(images, [self.size // 2] * 4, mode="replicate")
        return padded.unfold(2, self.size, 1).unfold(3, self.size, 1).flatten(4).median(4).values


class TotalVariation(nn.Module):
    """min over u of |u - x|² / 2 + weight TV(u), by ``steps`` steps of Chambolle's dual projection; differentiable.

    TV is isotropic, each colour on its own. Source: Chambolle 2004, section 3; as a defence
    Guo et al. 2018, Countering adversarial images using input transformations, section 4.2, there on some pixels only.
    """

    def __init__(self, weight=0.05, steps=20):
        super().__init__()
        self.weight, self.steps = weight, steps

    def forward(self, images):
        check_images(images)
        p = images.new_zeros(2, *images.shape)
        for _ in range(self.steps):
            u = images + self._divergence(p)
            slope = torch.stack([F.pad(u.diff(dim=2), (0, 0, 0, 1)), F.pad(u.diff(dim=3), (0, 1))])
            # a square root has no slope at 0, where the images are flat
            length = (slope.square().sum(0) + 1e-12).sqrt()
            p = (p - 0.25 * slope) / (1 + 0.25 / self.weight * length)
        return (images + self._divergence(p)).clamp(0, 1)

    @staticmethod
    def _divergence(p):
        """The negative adjoint of the differences, with p = 0 outside."""
        rows, columns = p
        return -rows - columns + F.pad(rows[:, :, :-1], (0, 0, 1, 0)) + F.pad(columns[..., :-1], (1, 0))


class Randomization(nn.Module):
    """Resize to a random side by nearest neighbour, pad with zeros at a random place; differentiable.

    The published sizes, 299 to a side in [310, 331) padded to 331, are scaled to the chip's: 112 to [116, 124) and
    124. The result is resized to the chip's own side again (bilinear), since some networks take no other. Each image
    draws its own numbers; ``seed`` fixes the series, and each call goes on in it.
    Source: Xie et al. 2018, Mitigating adversarial effects through randomization, section 3.
    """

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, images):
        check_images(images)
        side = images.shape[-1]
        low, high = round(side * 310 / 299), round(side * 331 / 299)
        padded = []
        for image in images:
            new = torch.randint(low, high, (1,), generator=self.generator).item()
            left, top = torch.randint(high - new + 1, (2,), generator=self.generator).tolist()
            resized = F.interpolate(image[None], (new, new), mode="nearest")
            padded.append(F.pad(resized, (left, high - new - left, top, high - new - top)))
        return F.interpolate(torch.cat(padded), (side, side), mode="bilinear", align_corners=False)


def _two_stage(stages="both", prior="shipped", **options):
    return ddnm.TwoStage(*prior_network.load(prior), stages=stages, **options)


def _diffpure(prior="shipped", **options):
    return ddnm.DiffPure(*prior_network.load(prior), **options)


PURIFIERS = {
    "jpeg": Jpeg,
    "bit-depth": BitDepth,
    "blur": Blur,
    "median": Median,
    "total-variation": TotalVariation,
    "randomization": Randomization,
    "resgn": resgn.load,
    "puface": puface.load,
    "two-stage": _two_stage,
    "super-resolution": functools.partial(_two_stage, "super-resolution"),
    "colourisation": functools.partial(_two_stage, "colourisation"),
    "diffpure": _diffpure,
}


def load(name, device="cpu", **options):
    """A purifier by name: a module from images (N, 3, H, W) in [0, 1] to the same, frozen, in evaluation mode.

    Options go to the purifier: ``load("jpeg", quality=50)``. Raises ``ValueError`` for an unknown name.
    """
    if name not in PURIFIERS:
        known = ", ".join(PURIFIERS)
        raise Invalid(f'There is no purifier "{name}"{nearest(name, PURIFIERS)}; there are {known}.')
    return PURIFIERS[name](**options).to(device).eval().requires_grad_(False)
