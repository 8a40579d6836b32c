"""What helps an attack to transfer to networks that it does not know: diverse inputs and smoothed gradients.

``attacks.mifgsm`` has both as options; ``objectives.ensemble`` is the third help, several networks at once.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from faceadv.errors import Invalid, whole
from faceadv.networks.common import generator

__all__ = ["LEAST", "PROBABILITY", "diverse", "odd", "shrink", "smooth"]

PROBABILITY = 0.5  # of an image to be shrunk at a step
LEAST = 0.9  # of its side, the smallest size


def diverse(steps: int, count: int, seed: int) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Diverse inputs (DI): a function of (step, images, rows) that shrinks some of the images at random.

    Each image is shrunk with ``PROBABILITY`` at each step, to a side between ``LEAST`` of its own and the whole, and
    put anywhere on black. All random numbers are drawn at once, so that an image sees the same in any batch.
    Source: Xie et al. 2019, algorithm 1, with sizes below that of the image, because a recogniser resizes them anyway.

    Parameters
    ----------
    steps, count : how many steps and images there are
    seed : of what is drawn
    """
    numbers = torch.rand(4, steps, count, generator=generator(seed))
    tables = {}  # by device

    def see(step, images, rows):
        table = tables.setdefault(images.device, numbers.to(images.device))
        chance, size, *corner = table[:, step, rows]
        shrunk = shrink(images, 1 - (1 - LEAST) * size, torch.stack(corner, 1))
        return torch.where((chance < PROBABILITY)[:, None, None, None], shrunk, images)

    return see


def shrink(images: Tensor, scale: Tensor, corner: Tensor) -> Tensor:
    """Images (N, C, H, W) shrunk bilinearly, each on black of the same size; differentiable in the images.

    Parameters
    ----------
    images : of any float type
    scale : (N,), the new side by the old one, in (0, 1]
    corner : (N, 2) in [0, 1]: how much of the free room lies to the left of the image, and above it
    """
    shift = (1 - scale)[:, None] * (2 * corner - 1)  # of its middle, in halves of a side
    larger = torch.eye(2, device=scale.device) / scale[:, None, None]
    theta = torch.cat([larger, -(shift / scale[:, None])[:, :, None]], 2)
    places = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, places.to(images), padding_mode="zeros", align_corners=False)


def odd(side: int) -> int:
    """The side of a kernel that has a middle. Raises ``Invalid`` unless it is odd and positive."""
    if whole("smoothing", side, 1) % 2 == 0:
        raise Invalid(f"smoothing must be odd, because the kernel has a middle: {side} is not.")
    return int(side)


def smooth(gradient: Tensor, side: int) -> Tensor:
    """Translation invariance (TI): each channel (N, C, H, W) smoothed by a Gaussian, with 0 beyond the border.

    The mean gradient of an image moved by a few pixels in all directions is nearly this.
    Source: Dong et al. 2019, equation 7; three standard deviations to each side as in its authors' code.

    Parameters
    ----------
    gradient : what is smoothed
    side : of the kernel, as ``odd`` takes it; 1 leaves the gradient as it is
    """
    if side == 1:
        return gradient
    kernel = (-torch.linspace(-3, 3, side).square() / 2).exp()
    kernel, channels = (kernel / kernel.sum()).to(gradient), gradient.shape[1]
    down, right = (kernel.reshape(shape).expand(channels, *shape) for shape in ((1, side, 1), (1, 1, side)))
    down = F.conv2d(gradient, down, padding=(side // 2, 0), groups=channels)
    return F.conv2d(down, right, padding=(0, side // 2), groups=channels)
