"""MobileFaceNet: a small recogniser of bottlenecks with depthwise convolutions, trained on MS1M.

Source: Chen et al. 2018 (arXiv 1804.07573); the weights are those of sirius-ai/MobileFaceNet_TF
(``models/mobilefacenet.md``).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceadv import align
from faceadv.networks.common import shipped
from faceadv.networks.mobilenet import Same

__all__ = ["TEMPLATE", "MobileFaceNet", "load"]

SIDE = 112
# where ArcFace's crops have the eyes, the nose and the corners of the mouth, in pixels
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
# (channels inside, channels out, stride, how many) of the bottlenecks
BLOCKS = [(128, 64, 2, 1), (128, 64, 1, 4), (256, 128, 2, 1), (256, 128, 1, 6), (512, 128, 2, 1), (256, 128, 1, 2)]


class Bottleneck(nn.Module):
    """Widen, filter each channel by itself, narrow without a nonlinearity; a skip connection at stride 1."""

    def __init__(self, inputs: int, inside: int, out: int, stride: int):
        super().__init__()
        widen = Same(inputs, inside, 1), nn.PReLU(inside)
        filters = Same(inside, inside, 3, stride, groups=inside), nn.PReLU(inside)
        self.layers, self.skips = nn.Sequential(*widen, *filters, Same(inside, out, 1)), stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.skips else self.layers(x)


class MobileFaceNet(nn.Module):
    """The network, its batch norms folded into the convolutions.

    Input: (N, 3, H, W) float32 RGB in [0, 1], chips of any size, warped to ArcFace's template and normalised inside;
    ``Recogniser.embed`` checks it. Output: (N, 192), not of unit length; differentiable with respect to the images.
    """

    def __init__(self):
        super().__init__()
        layers, width = [Same(3, 64, 3, 2), nn.PReLU(64), Same(64, 64, 3, groups=64), nn.PReLU(64)], 64
        for inside, out, stride, count in BLOCKS:
            for _ in range(count):
                layers.append(Bottleneck(width, inside, out, stride))
                width = out
        self.layers = nn.Sequential(*layers, Same(width, 512, 1), nn.PReLU(512))
        self.filters = nn.Conv2d(512, 512, 7, groups=512)  # instead of the mean: each place has its own weight
        self.last = nn.Linear(512, 192)
        places = align.grid(align.similarity(TEMPLATE), (SIDE, SIDE), (align.SIZE, align.SIZE))
        self.register_buffer("places", places, persistent=False)
        self.padding = "zeros"  # as an attribute it is in the keys of caches, which kept embeddings with another one

    def forward(self, images: Tensor) -> Tensor:
        return self.embedding(self.maps(images))

    def embedding(self, maps: Tensor) -> Tensor:
        """(N, 192) from the last maps: their weighted sums, through the last layer."""
        return self.last(self.filters(maps).flatten(1))

    def maps(self, images: Tensor) -> Tensor:
        """Maps (N, 512, 7, 7) of the last layer before the sums, of images (N, 3, H, W) in [0, 1]."""
        return self.layers(self.warp((255 * images - 127.5) / 128).contiguous(memory_format=torch.channels_last))

    def warp(self, x: Tensor) -> Tensor:
        """Normalised images as ArcFace crops them, (N, 3, 112, 112), with 0, a middle grey, beyond their borders."""
        places = self.places.expand(len(x), -1, -1, -1)
        return F.grid_sample(x, places, padding_mode=self.padding, align_corners=False)


def load() -> MobileFaceNet:
    """The shipped network, frozen. Errors as ``common.shipped``."""
    return shipped("mobilefacenet", lambda _: MobileFaceNet()).to(memory_format=torch.channels_last)
