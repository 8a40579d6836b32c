"""FaceNet: facenet-pytorch's InceptionResnetV1 with its published weights."""

import torch.nn.functional as F
from torch import nn

from faceadv.errors import Invalid
from faceadv.store import weights


class FaceNet(nn.Module):
    """facenet-pytorch's InceptionResnetV1 with weights from a file as that project publishes them.

    Input: (N, 3, H, W) float32 RGB in [0, 1], resized to 160 and scaled to [-1, 1] inside.
    Output: (N, 512) of unit length. Raises ``ValueError`` for the weights of another network.
    """

    def __init__(self, path):
        super().__init__()
        from facenet_pytorch import InceptionResnetV1

        state = weights.read_state(path)
        # the published files hold a classifier head too
        state = {key: value for key, value in state.items() if not key.startswith("logits.")}
        self.net = InceptionResnetV1(pretrained=None)
        try:
            self.net.load_state_dict(state)
        except RuntimeError as e:
            raise Invalid(f"{path} does not hold the weights of InceptionResnetV1.") from e

    def forward(self, images):
        x = F.interpolate(images, (160, 160), mode="bilinear", align_corners=False)
        return self.net((x * 255 - 127.5) / 128)
