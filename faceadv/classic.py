"""De-identification as it was before adversarial examples: blur, pixels, a mask, noise, each with one strength.

All take images (N, 3, H, W) in [0, 1] and return the same; strength 0 changes nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from faceadv import metrics
from faceadv.errors import Invalid
from faceadv.images import check_images, gaussian_blur
from faceadv.networks.common import generator
from faceadv.store.paths import nearest

__all__ = ["METHODS", "at_ssim", "blur", "mask", "noise", "pixelate"]


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur; sigma in pixels."""
    _check(images, sigma)
    if sigma <= 0.05:  # too narrow to reach the next pixel
        return images.clone()
    return gaussian_blur(images, 2 * int(3 * sigma + 1) + 1, sigma)


def pixelate(images: Tensor, block: float) -> Tensor:
    """Mean over squares of ``block`` pixels a side; fractions of a pixel are allowed, up to 1 changes nothing."""
    _check(images, block)
    size = images.shape[2:]
    cells = [max(1, round(side / max(block, 1))) for side in size]
    return F.interpolate(F.adaptive_avg_pool2d(images, cells), size, mode="nearest")


def mask(images: Tensor, height: float) -> Tensor:
    """A black bar over the eyes of an aligned chip, ``height`` pixels high and three times as wide."""
    _check(images, height)
    high, wide = images.shape[2:]
    rows, columns = torch.arange(high)[:, None] + 0.5, torch.arange(wide)[None] + 0.5
    # the eyes lie at a share of 0.31 from the top (align.TEMPLATE)
    covered = ((rows - 0.31 * high).abs() < height / 2) & ((columns - 0.49 * wide).abs() < 1.5 * height)
    return torch.where(covered.to(images.device), torch.zeros_like(images), images)


def noise(images: Tensor, sigma: float, seed: int = 0) -> Tensor:
    """Gaussian noise, the result clipped to [0, 1].

    Parameters
    ----------
    images : (N, 3, H, W) in [0, 1]
    sigma : its standard deviation, in the same unit
    seed : of the noise
    """
    _check(images, sigma)
    drawn = torch.randn(images.shape, generator=generator(seed))
    return (images + sigma * drawn.to(images)).clamp(0, 1)


def _check(images, strength):
    check_images(images)
    if not 0 <= strength < float("inf"):
        raise Invalid(f"The strength must be a finite number of at least 0, not {strength!r}.")


METHODS = {"blur": (blur, 10.0), "pixelate": (pixelate, 28.0), "mask": (mask, 112.0), "noise": (noise, 0.5)}
SAMPLE, HALVINGS = 100, 16  # images and steps of the search for a strength


def at_ssim(name: str, images: Tensor, target: float) -> tuple[Tensor, float]:
    """The images de-identified with the strength at which their mean SSIM is closest to a target.

    The strength of "pixelate" and "mask" acts in whole cells and pixels, so that their SSIM is only near the target.

    Parameters
    ----------
    name : a method of ``METHODS``
    images : (N, 3, H, W) in [0, 1], at least one
    target : the SSIM, between 0 and 1

    Returns
    -------
    ``(images, strength)``; the strength is found by bisection on about ``SAMPLE`` of the images

    Raises
    ------
    Invalid : for other arguments than these
    """
    check_images(images)
    if name not in METHODS:
        raise Invalid(f'There is no method "{name}"{nearest(name, METHODS)}; there are {", ".join(METHODS)}.')
    if not 0 < target < 1 or not len(images):
        raise Invalid(f"The SSIM to reach must lie between 0 and 1, on one image or more: {target}, {len(images)}.")
    method, strongest = METHODS[name]
    low, high = 0.0, strongest
    sample = images[:: max(1, len(images) // SAMPLE)]

    def similar(strength):
        return metrics.ssim(method(sample, strength), sample).mean().item()

    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if similar(middle) > target else (low, middle)
    found = min((low, high), key=lambda strength: abs(similar(strength) - target))
    return method(images, found), found
