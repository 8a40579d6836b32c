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
        x = F.interpolate(images, (160, 160), mode="bilinear", align_corners=False)
        return self.net((x * 255 - 127.5) / 128)
