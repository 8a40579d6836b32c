"""ResGN: a residual generative network that cleans adversarial perturbations.

Source: Su, Sun, Fan, Lu and Liu 2019, Cleaning adversarial perturbations via residual generative network for face
verification (ICASSP), figure 1; what the paper leaves open follows SRResNet (Ledig et al. 2017).
"""

import torch
from torch import nn

from faceadv.networks.common import checked, shipped

__all__ = ["ResGN", "load"]


class ResGN(nn.Module):
    """SRResNet without up-sampling: head, residual blocks with batch norm, global skip, tail.

    (N, 3, H, W) in [0, 1] to the same; H and W must be multiples of ``shrink``. Raises ``Invalid`` for other images.
    The tail gives a correction to the image, 0 before training. (SRResNet's gives the image itself, through a tanh.)
    Thousands of steps suffice for that, instead of a thousand epochs.

    Parameters
    ----------
    blocks, width : 16 and 64 as in SRResNet
    shrink : 1 as in the paper; 2 works on the image folded to half its side and four times its channels (FFDNet, Zhang
        et al. 2018), which costs a quarter
    """

    def __init__(self, blocks: int = 16, width: int = 64, shrink: int = 1):
        super().__init__()
        self.fold, self.unfold = nn.PixelUnshuffle(shrink), nn.PixelShuffle(shrink)
        channels = 3 * shrink**2
        self.head = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList(_block(width) for _ in range(blocks))
        self.end = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.tail = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = checked(images, self.fold.downscale_factor)
        x = images.contiguous(memory_format=torch.channels_last)
        head = x_in = self.head(self.fold((x - 0.5) * 2))
        for block in self.blocks:
            x_in = x_in + block(x_in)
        correction = self.unfold(self.tail(head + self.end(x_in)))
        return (images + correction.float()).clamp(0, 1)


def load() -> ResGN:
    """The shipped ResGN, trained on LFW's training people against dlib, frozen. Errors as ``common.shipped``."""
    return shipped("resgn", lambda state: ResGN(**{key: int(state.pop(key)) for key in ("blocks", "width", "shrink")}))


def _block(width):
    def one():
        return nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    return nn.Sequential(*one(), nn.ReLU(inplace=True), *one())
