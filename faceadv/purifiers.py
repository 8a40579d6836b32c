"""Purifiers: chips in, chips out, with an adversarial perturbation made smaller. ``load(name)`` gives a module."""

import functools
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceadv import classic, ddnm, precision
from faceadv import images as image_ops
from faceadv.errors import Invalid, number, whole
from faceadv.networks import prior as prior_network
from faceadv.networks import puface, resgn
from faceadv.networks.common import checked, generator
from faceadv.store.paths import nearest

__all__ = ["Filter", "Randomization", "bit_depth", "blur", "jpeg", "load", "median", "total_variation"]


class Filter(nn.Module):
    """A function of images as a module that checks them: (N, 3, H, W) in [0, 1] to the same, ``Invalid`` for others."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(checked(images))


def jpeg(quality: int = 75) -> Filter:
    """JPEG at ``quality`` (1 to 95). Its rounding has no gradient: images come back detached."""
    quality = whole("quality", quality, 1, 95)
    return Filter(lambda images: image_ops.jpeg(images.detach(), quality))


def bit_depth(bits: int = 4) -> Filter:
    """Each colour rounded to ``bits`` bits (1 to 8). No gradient: images come back detached.

    Source: Xu, Evans and Qi 2018, Feature squeezing, section III.A.
    """
    levels = 2 ** whole("bits", bits, 1, 8) - 1
    return Filter(lambda images: (images.detach() * levels).round() / levels)


def blur(sigma: float = 1.0) -> Filter:
    """Gaussian blur; sigma in pixels, at least 0. Differentiable."""
    return Filter(functools.partial(classic.blur, sigma=number("sigma", sigma, 0)))


def median(size: int = 3) -> Filter:
    """The median of each ``size`` x ``size`` window (odd), the border repeated. Differentiable almost everywhere.

    Source: Xu, Evans and Qi 2018, Feature squeezing, section III.B.
    """
    if whole("size", size, 1) % 2 == 0:
        raise Invalid(f"size must be an odd number of at least 1, not {size!r}.")

    def middle(images):
        padded = F.pad(images, [size // 2] * 4, mode="replicate")
        return padded.unfold(2, size, 1).unfold(3, size, 1).flatten(4).median(4).values

    return Filter(middle)


def total_variation(weight: float = 0.05, steps: int = 20) -> Filter:
    """min over u of |u - x|² / 2 + weight TV(u), by ``steps`` steps of Chambolle's dual projection; differentiable.

    TV is isotropic, each colour on its own; weight is at least 1e-6. Source: Chambolle 2004, section 3; as a defence
    Guo et al. 2018, Countering adversarial images using input transformations, section 4.2, there on some pixels only.
    """
    weight, steps = number("weight", weight, 1e-6), whole("steps", steps, 1)

    def divergence(p):
        """The negative adjoint of the differences, with p = 0 outside."""
        rows, columns = p
        return -rows - columns + F.pad(rows[:, :, :-1], (0, 0, 1, 0)) + F.pad(columns[..., :-1], (1, 0))

    def smooth(images):
        p = images.new_zeros(2, *images.shape)
        for _ in range(steps):
            u = images + divergence(p)
            slope = torch.stack([F.pad(u.diff(dim=2), (0, 0, 0, 1)), F.pad(u.diff(dim=3), (0, 1))])
            # a square root has no slope at 0, where the images are flat
            length = (slope.square().sum(0) + 1e-12).sqrt()
            p = (p - 0.25 * slope) / (1 + 0.25 / weight * length)
        return (images + divergence(p)).clamp(0, 1)

    return Filter(smooth)


class Randomization(nn.Module):
    """Resize to a random side by nearest neighbour, pad with zeros at a random place; differentiable.

    The published sizes, 299 to a side in [310, 331) padded to 331, are scaled to the chip's: 112 to [116, 124) and
    124; the height follows the width. The result is resized to the chip's own sides again (bilinear), since some
    networks take no others. Each image draws its own numbers; ``seed`` fixes the series, and each call goes on in it.
    Source: Xie et al. 2018, Mitigating adversarial effects through randomization, section 3.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        self.generator = generator(seed)

    def forward(self, images: Tensor) -> Tensor:
        images = checked(images)
        height, width = images.shape[2:]
        low = round(width * 310 / 299)
        tall, wide = round(height * 331 / 299), max(low + 1, round(width * 331 / 299))
        padded = []
        for image in images:
            new = self._draw(low, wide)
            high = min(tall, round(new * height / width))
            left, top = self._draw(0, wide - new + 1), self._draw(0, tall - high + 1)
            resized = F.interpolate(image[None], (high, new), mode="nearest")
            padded.append(F.pad(resized, (left, wide - new - left, top, tall - high - top)))
        padded = torch.cat(padded) if padded else images
        return F.interpolate(padded, (height, width), mode="bilinear", align_corners=False)

    def _draw(self, low, high):
        return torch.randint(low, high, (1,), generator=self.generator).item()


PURIFIERS = {
    "jpeg": jpeg,
    "bit-depth": bit_depth,
    "blur": blur,
    "median": median,
    "total-variation": total_variation,
    "randomization": Randomization,
    "resgn": resgn.load,
    "puface": puface.load,
    **dict.fromkeys(("two-stage", "super-resolution", "colourisation"), ddnm.TwoStage),
    "diffpure": ddnm.DiffPure,
}
FIXED = {"super-resolution": {"stages"}, "colourisation": {"stages", "scale"}}  # options that a stage alone has not


def load(name: str, device: torch.device | str = "cpu", **options) -> nn.Module:
    """A purifier by name: a module from images (N, 3, H, W) in [0, 1] to the same, frozen, in evaluation mode.

    Parameters
    ----------
    name : one of ``PURIFIERS``
    device : where its networks are; "auto" is the GPU if there is one
    options : of the purifier, as in ``load("jpeg", quality=50)``; ``prior`` of the diffusions is a name for
        ``networks.prior.load``

    Raises
    ------
    Invalid : for an unknown name or option, and for an option's value that makes no sense
    """
    if name not in PURIFIERS:
        known = ", ".join(PURIFIERS)
        raise Invalid(f'There is no purifier "{name}"{nearest(name, PURIFIERS)}; there are {known}.')
    make = PURIFIERS[name]
    taken, prior = set(inspect.signature(make).parameters), ()
    if "unet" in taken:
        taken = taken - {"unet", "schedule"} | {"prior"}
    if wrong := options.keys() - (taken - FIXED.get(name, set())):
        raise Invalid(f'The purifier "{name}" has no option {", ".join(sorted(wrong))}.')
    if "prior" in taken:
        prior = prior_network.load(options.pop("prior", "shipped"))
    if name in FIXED:
        options["stages"] = name
    return make(*prior, **options).to(precision.device(device)).eval().requires_grad_(False)
