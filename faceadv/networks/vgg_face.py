"""VGG-Face, read from the file that is published for torch, as a backbone: chips in, fc7 features out.

Source: Parkhi, Vedaldi and Zisserman 2015, Deep face recognition; vgg_face_dag.pth, converted by S. Albanie.
"""

import math

import torch.nn.functional as F
from torch import nn

from faceadv.errors import Invalid
from faceadv.store import weights

STAGES = [2, 2, 3, 3, 3]  # convolutions before each pooling
CONVOLUTIONS = [f"conv{stage}_{i}" for stage, count in enumerate(STAGES, 1) for i in range(1, count + 1)]
MEAN = (129.186279296875, 104.76238250732422, 93.59396362304688)  # RGB of 0 to 255


def _shapes(widths, hidden, people, side):
    """Shape of each tensor of the file, for other sizes too."""
    shapes, inputs = {}, 3
    for stage, count in enumerate(STAGES, 1):
        for i in range(1, count + 1):
            shapes[f"conv{stage}_{i}"], inputs = (widths[stage - 1], inputs, 3, 3), widths[stage - 1]
    shapes["fc6"] = (hidden, inputs * (side // 32) ** 2)
    shapes |= {"fc7": (hidden, hidden), "fc8": (people, hidden)}
    return {
        f"{name}.{key}": s if key == "weight" else s[:1] for name, s in shapes.items() for key in ("weight", "bias")
    }


SHAPES = _shapes((64, 128, 256, 512, 512), 4096, 2622, 224)  # as published


class VGGFace(nn.Module):
    """VGG-16 up to its second fully connected layer, frozen.

    Input: (N, 3, H, W) float32 RGB in [0, 1], resized to the network's side (224) and centred inside.
    Output: (N, 4096) fc7 features after ReLU; differentiable with respect to the images.
    path: the published file, or one of the same layout with other widths, by default the fetched one. Raises
    ``FileNotFoundError`` saying how to get it, ``ValueError`` for the weights of another network.
    """

    def __init__(self, path=None):
        super().__init__()
        path = path or weights.find("vgg-face")
        state = weights.read_state(path)
        try:
            widths = [state[f"conv{stage}_1.weight"].shape[0] for stage in range(1, 6)]
            hidden, inputs = state["fc6.weight"].shape
            self.side = 32 * math.isqrt(inputs // widths[-1])
            expected = _shapes(widths, hidden, state["fc8.weight"].shape[0], self.side)
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as e:
            raise Invalid(f"{path} does not hold the weights of VGG-Face.") from e
        if {key: tuple(value.shape) for key, value in state.items()} != expected:
            raise Invalid(f"{path} does not hold the weights of VGG-Face.")
        self.dimension = hidden
        for name in (*CONVOLUTIONS, "fc6", "fc7"):
            for key in ("weight", "bias"):
                self.register_buffer(f"{name}_{key}", state[f"{name}.{key}"].float())

    def forward(self, images):
        x = F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False)
        x = 255 * x - x.new_tensor(MEAN)[:, None, None]
        for name in CONVOLUTIONS:
            x = F.relu(F.conv2d(x, *self._layer(name), padding=1))
            if name.endswith(f"_{STAGES[int(name[4]) - 1]}"):
                x = F.max_pool2d(x, 2)
        x = F.relu(F.linear(x.flatten(1), *self._layer("fc6")))
        return F.relu(F.linear(x, *self._layer("fc7")))

    def _layer(self, name):
        return getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
