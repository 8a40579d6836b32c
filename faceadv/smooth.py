"""Smooth stand-ins for defences that round: an attacker differentiates these, and the defence itself judges.

A rounding has no slope. In its place stands r(x) = round(x) + (x - round(x))³, which is near it and has one. Source:
Shin and Song 2017, JPEG-resistant adversarial images. JPEG's tables are those of ITU-T T.81, annex K, scaled by the
quality as in the Independent JPEG Group's library.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from faceadv.errors import whole
from faceadv.networks.common import checked

__all__ = ["STAND_INS", "bit_depth", "jpeg", "rounded"]

LUMINANCE = """16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99"""
CHROMINANCE = """17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99"""
# from red, green and blue in [0, 255] to one luminance and two chrominances
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def rounded(x: Tensor) -> Tensor:
    """A number near the rounded one, with the slope 3 (x - round(x))²."""
    whole_part = x.detach().round()
    return whole_part + (x - whole_part) ** 3


def bit_depth(bits: int = 4) -> Callable[[Tensor], Tensor]:
    """In the place of ``purifiers.bit_depth``: images (N, 3, H, W) in [0, 1] to the same."""
    levels = 2 ** whole("bits", bits, 1, 8) - 1
    return lambda images: rounded(checked(images) * levels) / levels


def jpeg(quality: int = 75) -> Callable[[Tensor], Tensor]:
    """In the place of ``purifiers.jpeg``: images (N, 3, H, W) in [0, 1] to the same, chroma at half the resolution."""
    tables = _tables(whole("quality", quality, 1, 95))

    def compressed(images):
        images = checked(images)
        height, width = images.shape[2:]
        x = F.pad(255 * images, (0, -width % 16, 0, -height % 16), mode="replicate")
        to_ycc = torch.tensor(TO_YCC).to(x)
        ycc = torch.einsum("cd,ndhw->nchw", to_ycc, x) - torch.tensor([128.0, 0, 0]).to(x).view(1, 3, 1, 1)
        light = _quantised(ycc[:, :1], tables[0].to(x))
        colour = _quantised(F.avg_pool2d(ycc[:, 1:], 2), tables[1].to(x))
        colour = F.interpolate(colour, scale_factor=2, mode="bilinear", align_corners=False)
        back = torch.linalg.inv(to_ycc)
        made = torch.einsum("cd,ndhw->nchw", back, torch.cat([light + 128, colour], 1))
        return (made[:, :, :height, :width] / 255).clamp(0, 1)

    return compressed


STAND_INS = {"jpeg": jpeg, "bit-depth": bit_depth}  # by the purifier's name


def _quantised(planes, table):
    """Planes (N, C, H, W) through the cosine transform of 8 x 8 blocks, divided by the table, rounded, and back."""
    n, c, height, width = planes.shape
    basis = _basis().to(planes)
    blocks = planes.reshape(n, c, height // 8, 8, width // 8, 8).permute(0, 1, 2, 4, 3, 5)
    blocks = basis.T @ (rounded(basis @ blocks @ basis.T / table) * table) @ basis
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(planes.shape)


@functools.cache
def _basis():
    """The orthonormal cosine transform of 8 numbers, (8, 8)."""
    k, n = torch.arange(8.0)[:, None], torch.arange(8.0)
    basis = torch.cos((2 * n + 1) * k * math.pi / 16) / 2
    basis[0] /= 2**0.5
    return basis


@functools.cache
def _tables(quality):
    """The two tables of a quality, (8, 8) each."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    light = torch.tensor([float(v) for v in LUMINANCE.split()]).view(8, 8)
    colour = torch.full((8, 8), 99.0)
    colour[:4] = torch.tensor([float(v) for v in CHROMINANCE.split()]).view(4, 8)
    return [((table * scale + 50) / 100).floor().clamp(1, 255) for table in (light, colour)]
