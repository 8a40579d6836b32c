"""The second recogniser: a compact residual network trained here on LFW's training people, and shipped.

Like MobileFaceNet (Chen et al. 2018) it ends in a global depthwise convolution instead of pooling and uses PReLU;
its blocks are plain residual ones, which a CPU runs faster than depthwise bottlenecks of the same accuracy.
"""

import torch
from torch import nn

from faceadv.networks.common import shipped

__all__ = ["DIMENSION", "Block", "MobileNet", "load"]

DIMENSION = 128
STAGES = [(48, 1), (96, 2), (160, 2)]  # (channels, blocks); each stage halves the image


def _conv(inputs, out, kernel, stride=1):
    return [nn.Conv2d(inputs, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out)]


class Block(nn.Module):
    """Two 3x3 convolutions and a skip connection."""

    def __init__(self, inputs: int, out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(*_conv(inputs, out, 3, stride), nn.PReLU(out), *_conv(out, out, 3))
        self.skip = nn.Sequential(*_conv(inputs, out, 1, stride)) if stride > 1 or inputs != out else nn.Identity()
        self.out = nn.PReLU(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(x) + self.skip(x))


class MobileNet(nn.Module):
    """(N, 3, 112, 112) in [0, 1], which ``Recogniser.embed`` checks, to (N, 128), not normalised to unit length."""

    def __init__(self):
        super().__init__()
        width = 24
        layers = [*_conv(3, width, 3, 2), nn.PReLU(width)]
        for channels, blocks in STAGES:
            for i in range(blocks):
                layers.append(Block(width, channels, 2 if i == 0 else 1))
                width = channels
        layers += [nn.Conv2d(width, width, 7, groups=width, bias=False), nn.BatchNorm2d(width), nn.Flatten()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, DIMENSION))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images * 2 - 1)


def load() -> tuple[MobileNet, float]:
    """The shipped network and its threshold on the distance of unit embeddings, which the people held out of training
    chose: ``(network, threshold)``. Errors as ``common.shipped``."""
    thresholds = []

    def build(state):
        thresholds.append(state.pop("threshold").item())
        return MobileNet()

    return shipped("mobile", build), *thresholds
