"""PuFace: push cloaked photos back to the natural ones before a recogniser is trained on them.

Source: Wen 2024, PuFace (arXiv 2406.02253), abstract; the network is open there, a plain residual U-Net here.
"""

import torch
import torch.nn.functional as F
from torch import nn

from faceadv.networks.common import checked, shipped

__all__ = ["PuFace", "load"]


class PuFace(nn.Module):
    """A residual U-Net: (N, 3, H, W) in [0, 1] to the same; H and W must be multiples of 8. ``Invalid`` for others.

    The image is folded to half its side and four times its channels; then widths[0] channels at half the side,
    widths[1] at a quarter, widths[2] at an eighth, and back. The result is a correction, 0 before training.
    """

    def __init__(self, widths: tuple[int, int, int] = (48, 96, 192)):
        super().__init__()
        a, b, c = widths
        self.fold, self.unfold = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        self.down = nn.ModuleList([_pair(12, a), _pair(a, b), _pair(b, c)])
        self.up = nn.ModuleList([_pair(c + b, b), _pair(b + a, a)])
        self.tail = nn.Conv2d(a, 12, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = checked(images, 8)
        x = self.fold(images.contiguous(memory_format=torch.channels_last) * 2 - 1)
        first = self.down[0](x)
        second = self.down[1](F.avg_pool2d(first, 2))
        x = self.down[2](F.avg_pool2d(second, 2))
        x = self.up[0](torch.cat([F.interpolate(x, scale_factor=2.0), second], 1))
        x = self.up[1](torch.cat([F.interpolate(x, scale_factor=2.0), first], 1))
        return (images + self.unfold(self.tail(x)).float()).clamp(0, 1)


def _pair(inputs, outputs):
    def one(channels):
        return nn.Conv2d(channels, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()

    return nn.Sequential(*one(inputs), *one(outputs))


def load() -> PuFace:
    """The shipped PuFace, frozen. Errors as ``common.shipped``."""
    return shipped("puface", lambda state: PuFace(tuple(state.pop("widths").tolist())))
