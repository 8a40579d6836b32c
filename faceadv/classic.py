"""De-identification as it was before adversarial examples: blur, pixels, a mask, noise, each with one strength.

All take images (N, 3, H, W) in [0, 1] and return the same; strength 0 changes nothing.
"""

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from faceadv import metrics
from faceadv.errors import Invalid
from faceadv.images import check_images


def blur(images, sigma):
    """Gaussian blur; sigma in pixels."""
    if sigma <= 0.05:  # narrower than a pixel's neighbourhood shows
        return images.clone()
    return gaussian_blur(images, 2 * int(3 * sigma + 1) + 1, [float(sigma)] * 2)


def pixelate(images, block):
    """Mean over squares of ``block`` pixels a side; fractions of a pixel are allowed, up to 1 changes nothing."""
    size = images.shape[2:]
    cells = [max(1, round(side / max(block, 1))) for side in size]
    return F.interpolate(F.adaptive_avg_pool2d(images, cells), size, mode="nearest")


def mask(images, height):
    """A black bar over the eyes of an aligned chip, ``height`` pixels high and three times as wide."""
    high, wide = images.shape[2:]
    rows, columns = torch.arange(high)[:, None] + 0.5, torch.arange(wide)[None] + 0.5
    # the eyes lie at a share of 0.31 from the top (align.TEMPLATE)
    covered = ((rows - 0.31 * high).abs() < height / 2) & ((columns - 0.49 * wide).abs() < 1.5 * height)
    return torch.where(covered.to(images.device), torch.zeros_like(images), images)


def noise(images, sigma, seed=0):
    """Gaussian noise of standard deviation ``sigma`` in [0, 1], clipped."""
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + sigma * drawn.to(images)).clamp(0, 1)


METHODS = {"blur": (blur, 10.0), "pixelate": (pixelate, 28.0), "mask": (mask, 112.0), "noise": (noise, 0.5)}
SAMPLE = 100


def at_ssim(name, images, target, steps=16):
    """The images de-identified by METHODS[name] with the strength, by bisection, whose mean SSIM is closest to target.

    Returns ``(images, strength)``, sought on about ``SAMPLE`` of the images. ``ValueError`` unless 0 < target < 1.
    The strength of "pixelate" and "mask" moves in whole cells and pixels, so that their SSIM is only near.
    """
    check_images(images)
    if not 0 < target < 1:
        raise Invalid(f"The SSIM to reach must lie between 0 and 1, not {target}.")
    method, strongest = METHODS[name]
    low, high = 0.0, strongest
    sample = images[:: max(1, len(images) // SAMPLE)]

    def similar(strength):
        return metrics.ssim(method(sample, strength), sample).mean().item()

    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if similar(middle) > target else (low, middle)
    found = min((low, high), key=lambda strength: abs(similar(strength) - target))
    return method(images, found), found
