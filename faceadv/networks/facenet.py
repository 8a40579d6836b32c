"""FaceNet: facenet-pytorch's InceptionResnetV1 with its published weights."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from faceadv.networks import common
from faceadv.store import weights

__all__ = ["FaceNet"]


class FaceNet(nn.Module):
    """facenet-pytorch's InceptionResnetV1 with weights from a file as that project publishes them.

    Input: (N, 3, H, W) float32 RGB in [0, 1], resized to 160 and scaled to [-1, 1] inside; ``Recogniser.embed`` checks
    it. Output: (N, 512) of unit length. Raises ``Invalid`` for the weights of another network.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        from facenet_pytorch import InceptionResnetV1

        state = weights.read_state(path)
        state = {key: value for key, value in state.items() if not key.startswith("logits.")}  # a classifier's head
        said = f"{path} does not hold the weights of InceptionResnetV1."
        self.net = common.filled(InceptionResnetV1(pretrained=None), state, said)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.embedding(self.maps(images))

    def embedding(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, 512) of unit length from the last block's maps: their mean, through the last layer."""
        return F.normalize(self.net.last_bn(self.net.last_linear(maps.mean((2, 3)))))

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 1792, 3, 3): what the last block puts out. ``images`` as for ``forward``."""
        x = (F.interpolate(images, (160, 160), mode="bilinear", align_corners=False) * 255 - 127.5) / 128
        for name, layer in self.net.named_children():
            x = layer(x)
            if name == "block8":
                return x
