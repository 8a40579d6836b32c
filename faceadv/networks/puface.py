"""PuFace: push cloaked photos back to the natural ones before a recogniser is trained on them.

Source: Wen 2024, PuFace (arXiv 2406.02253), abstract; the network is open there, a plain residual U-Net here.
"""

import torch
import torch.nn.functional as F
from torch import nn

from faceadv.store import weights


class PuFace(nn.Module):
    """A residual U-Net: (N, 3, H, W) in [0, 1] to the same; H and W must be multiples of 8.

    The image is folded to half its side and four times its channels; then widths[0] channels at half the side,
    widths[1] at a quarter, widths[2] at an eighth, and back. The result is a correction, 0 before training.
    """

    def __init__(self, widths=(48, 96, 192)):
        super().__init__()
        a, b, c = widths
        self.fold, self.unfold = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        self.down = nn.ModuleList([_pair(12, a), _pair(a, b), _pair(b, c)])
        self.up = nn.ModuleList([_pair(c + b, b), _pair(b + a, a)])
        self.tail = nn.Conv2d(a, 12, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        x = self.fold(images.contiguous(memory_format=torch.channels_last) * 2 - 1)
        first = self.down[0](x)
        second = self.down[1](F.avg_pool2d(first, 2))
        x = self.down[2](F.avg_pool2d(second, 2))
        x = self.up[0](torch.cat([F.interpolate(x, scale_factor=2.0), second], 1))
        x = self.up[1](torch.cat([F.interpolate(x, scale_factor=2.0), first], 1))
        return (images + self.unfold(self.tail(x)).float()).clamp(0, 1)


def _pair(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


def load():
    """The shipped PuFace, frozen. Errors as ``weights.load_safetensors``."""
    state = {key: value.float() for key, value in weights.load_safetensors("puface").items()}
    network = PuFace(tuple(state[f"down.{i}.0.weight"].shape[0] for i in range(3)))
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
