"""VGG-Face, read from the file that is published for torch, as a backbone: chips in, fc7 features out.

Source: Parkhi, Vedaldi and Zisserman 2015, Deep face recognition; vgg_face_dag.pth, converted by S. Albanie.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from faceadv.errors import Invalid
from faceadv.networks.common import checked, filled
from faceadv.store import weights

__all__ = ["VGGFace"]

STAGES = [2, 2, 3, 3, 3]  # convolutions before each pooling
MEAN = (129.186279296875, 104.76238250732422, 93.59396362304688)  # RGB of 0 to 255


class VGGFace(nn.Module):
    """VGG-16 up to its second fully connected layer, frozen.

    Input: (N, 3, H, W) float32 RGB in [0, 1], resized to the network's side (224) and centred inside.
    Output: (N, 4096) fc7 features after ReLU; differentiable with respect to the images. ``Invalid`` for other images.
    path: the published file, or one of the same layout with other widths, by default the fetched one. Raises
    ``Missing`` saying how to get it, ``Invalid`` for the weights of another network.
    """

    def __init__(self, path: str | Path | None = None):
        super().__init__()
        path = path or weights.find("vgg-face")
        state = {key: value.float() for key, value in weights.read_state(path).items()}
        said = f"{path} does not hold the weights of VGG-Face."
        try:
            widths = [3, *(len(state[f"conv{stage}_1.bias"]) for stage in range(1, 6))]
            people, self.dimension = state["fc8.weight"].shape
            self.side = 32 * math.isqrt(state["fc6.weight"].shape[1] // widths[-1])
        except (LookupError, ValueError, ZeroDivisionError) as e:
            raise Invalid(said) from e
        with torch.device("meta"):  # the weights are the file's
            for stage, count in enumerate(STAGES, 1):
                for i in range(1, count + 1):
                    conv = nn.Conv2d(widths[stage - (i == 1)], widths[stage], 3, padding=1)
                    self.add_module(f"conv{stage}_{i}", conv)
            self.fc6 = nn.Linear(widths[-1] * (self.side // 32) ** 2, self.dimension)
            self.fc7, self.fc8 = nn.Linear(self.dimension, self.dimension), nn.Linear(self.dimension, people)
        filled(self, state, said, assign=True)
        del self.fc8

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(checked(images), (self.side, self.side), mode="bilinear", align_corners=False)
        x = 255 * x - x.new_tensor(MEAN)[:, None, None]
        for stage, count in enumerate(STAGES, 1):
            for i in range(1, count + 1):
                x = F.relu(self.get_submodule(f"conv{stage}_{i}")(x))
            x = F.max_pool2d(x, 2)
        return F.relu(self.fc7(F.relu(self.fc6(x.flatten(1)))))
