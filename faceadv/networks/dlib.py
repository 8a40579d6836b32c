"""dlib's face recognition ResNet, read straight from dlib's own file and run in torch.

Source: Davis King, dlib_face_recognition_resnet_model_v1 (public domain), 99.38 % on LFW by its author.
"""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from faceadv.errors import Invalid, Missing

# (channels, blocks, whether the first block halves the image)
STAGES = [(32, 3, False), (64, 4, True), (128, 3, True), (256, 3, True), (256, 1, True)]
SIDE = 150
MEAN = (122.782, 117.001, 104.298)
# SHA-256 of every byte of the file that is not a weight: layer names, counts, shapes, settings
SKELETON = "e2f5042ef6e91b64c0c41cd443e2a85ef13c9ce9853d581bcdc6b170687a1c29"
LONGEST_GAP = 512  # more bytes than any layer's settings take between two tensors


def find_dat():
    """Path of the file inside the wheel of face-recognition-models. Raises ``FileNotFoundError``.

    The package is found, not imported: importing it needs ``pkg_resources``, which is gone.
    """
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None:
        raise Missing("The package face-recognition-models is missing: install requirements.txt.")
    return Path(spec.submodule_search_locations[0]) / "models" / "dlib_face_recognition_resnet_model_v1.dat"


def layer_shapes():
    """(out, in, kernel, halves) of the 29 convolutions in file order, from the image on."""
    shapes, width = [(32, 3, 7, True)], 32
    for channels, blocks, halves in STAGES:
        for block in range(blocks):
            shapes += [(channels, width, 3, halves and block == 0), (channels, channels, 3, False)]
            width = channels
    return shapes


def read_dat(path):
    """Read the tensors of dlib's file, strictly: each count and shape, and every byte that is not a weight.

    Returns ``(convolutions, fc)``: a list of 29 dicts with weight (out, in, k, k), bias (out,), gamma (out,)
    and beta (out,), and the (256, 128) matrix of the last layer, all float32.
    Raises ``FileNotFoundError``, or ``ValueError`` in one sentence for a truncated, altered or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise Missing(f"{path} does not exist; it comes with the package face-recognition-models 0.3.0.")
    data = path.read_bytes()
    position, skeleton = 0, hashlib.sha256()

    def tensor(what, *shape):
        nonlocal position
        header = _tensor_header(*shape)
        start = data.find(header, position, position + LONGEST_GAP)
        if start < 0:
            raise Invalid(
                f"{path} is not dlib's face recognition network: no tensor of shape {shape} for {what} "
                f"after byte {position}."
            )
        begin = start + len(header)
        end = begin + 4 * int(np.prod(shape))
        if end > len(data):
            raise Invalid(f"{path} is truncated: it ends at byte {len(data)}, inside {what}.")
        skeleton.update(data[position:begin])
        position = end
        values = np.frombuffer(data, "<f4", offset=begin, count=int(np.prod(shape))).copy()
        if not np.isfinite(values).all():
            raise Invalid(f"{path} is damaged: {what} holds values that are not finite.")
        return torch.from_numpy(values)

    convolutions = []
    for i, (out, inputs, kernel, _) in enumerate(layer_shapes()):
        size = inputs * kernel * kernel
        filters = tensor(f"convolution {i}", out * size + out, 1, 1, 1)
        affine = tensor(f"affine {i}", 2 * out, 1, 1, 1)
        convolutions.append(
            {
                "weight": filters[: out * size].reshape(out, inputs, kernel, kernel),
                "bias": filters[out * size :],
                "gamma": affine[:out],
                "beta": affine[out:],
            }
        )
    fc = tensor("the last layer", 256, 128, 1, 1).reshape(256, 128)
    skeleton.update(data[position:])
    if skeleton.hexdigest() != SKELETON:
        raise Invalid(f"{path} is damaged or foreign: what surrounds its weights is not as dlib wrote it.")
    return convolutions, fc


def _tensor_header(*shape):
    """dlib's serialisation of a tensor's version, 2, and four sizes: length byte, little-endian bytes."""
    lengths = [(n, (n.bit_length() + 7) // 8) for n in (2, *shape)]
    return b"".join(bytes([length]) + n.to_bytes(length, "little") for n, length in lengths)


class DlibResNet(nn.Module):
    """The network with its affine layers folded into the convolutions, frozen.

    Input: (N, 3, H, W) float32 RGB in [0, 1], of any size, resized to 150 and normalised inside.
    Output: (N, 128), compared by Euclidean distance; differentiable with respect to the images.
    """

    def __init__(self, convolutions, fc):
        super().__init__()
        folded = []
        for c, (out, inputs, kernel, halves) in zip(convolutions, layer_shapes()):
            conv = nn.Conv2d(inputs, out, kernel, stride=2 if halves else 1, padding=0 if halves else 1)
            conv.weight.data = c["weight"] * c["gamma"][:, None, None, None]
            conv.bias.data = c["bias"] * c["gamma"] + c["beta"]
            folded.append(conv)
        self.convs = nn.ModuleList(folded)
        self.register_buffer("fc", fc)
        # normalisation: (255 x - mean) / 256
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1) / 255)
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.embedding(self.maps(images))

    def embedding(self, maps):
        """(N, 128) from the last residual block's maps: their mean, through the last layer."""
        return maps.mean((2, 3)) @ self.fc

    def maps(self, images):
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


def load(path=None):
    """The pretrained network, read from ``path`` (default: the wheel). Errors as in ``read_dat``."""
    return DlibResNet(*read_dat(path or find_dat()))
