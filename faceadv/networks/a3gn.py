"""A3GN: a network that turns any face into one that a recogniser takes for a given other face, in one forward pass.

Source: Song, Wu and Yang 2018, Attacks on state-of-the-art face recognition using attentional adversarial attack
generative network (arXiv 1811.12026; Multimedia Tools and Applications 80, 2021). The paper's text names the parts;
sizes and weights are open there and are ours, after image-to-image practice of 2018 (Zhu et al. 2017, Zhang et al.
2019).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from faceadv.errors import Invalid
from faceadv.networks.common import checked, shipped

__all__ = ["A3GN", "BOUND", "CODE", "CVAE", "Attention", "Discriminator", "load"]

CODE = 64  # numbers of the target's latent code
# No pixel changes by more than this. Without a bound the generator learns to erase faces before it learns whose face to
# make.
BOUND = 0.1


class Attention(nn.Module):
    """Self-attention over all places of (N, C, H, W), added with a weight that starts at 0 (SAGAN, equation 3)."""

    def __init__(self, channels: int):
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = self.maps(x) @ self.value(x).flatten(2).transpose(1, 2)
        return x + self.gamma * attended.transpose(1, 2).reshape(x.shape)

    def maps(self, x: torch.Tensor) -> torch.Tensor:
        """Where each place looks: (N, H W, H W), rows sum to 1."""
        query, key = self.query(x).flatten(2), self.key(x).flatten(2)
        return (query.transpose(1, 2) @ key / query.shape[1] ** 0.5).softmax(-1)


class CVAE(nn.Module):
    """The target as a latent code: mean and log variance of q(z | y), each (N, CODE).

    It knows the target only as the recogniser does: its input is the embedding (N, D), standardised.
    """

    def __init__(self, dimension: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(dimension, 256), nn.SiLU(), nn.Linear(256, 2 * CODE))

    def forward(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.body(embeddings).chunk(2, 1)


class A3GN(nn.Module):
    """The generator: encoder, the target's code, residual blocks with attention, decoder.

    ``network(images, embeddings)`` gives the attacked images (N, 3, H, W) in [0, 1]. images: (N, 3, H, W) in [0, 1], H
    and W multiples of 4; embeddings: those (N, D) of the targets by the recogniser under attack. Raises ``Invalid`` for
    other inputs. The decoder gives a correction to the image within ``BOUND``, 0 before training. Embeddings are
    standardised by the buffers ``mean`` and ``spread``, because most of an embedding is what all faces share.

    Parameters
    ----------
    dimension : D
    width, blocks : a quarter of the channels in the residual blocks, and how many of these there are
    cvae : without it the embedding takes the code's place
    attention : without it the two attention layers are left out
    """

    def __init__(self, dimension: int = 128, width: int = 32, blocks: int = 4, cvae: bool = True,
                 attention: bool = True):  # fmt: skip
        super().__init__()
        wide = 4 * width
        self.head = nn.Sequential(nn.PixelUnshuffle(2), *_convolution(12, 2 * width, 3))
        self.down = nn.Sequential(*_convolution(2 * width, wide, 4, stride=2))
        self.cvae = CVAE(dimension) if cvae else None
        code = CODE if cvae else dimension
        self.plan = nn.Linear(code, 7 * 7 * width)
        self.mix = nn.Sequential(nn.Conv2d(wide + width, wide, 1), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList(_Residual(wide, code) for _ in range(blocks))
        places = {blocks // 2 - 1, blocks - 1} if attention else set()
        self.attention = nn.ModuleDict({str(i): Attention(wide) for i in sorted(places)})
        self.up = nn.Sequential(*_convolution(wide, 2 * width, 3))
        self.tail = nn.Conv2d(4 * width, 12, 3, padding=1)
        self.unfold = nn.PixelShuffle(2)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("spread", torch.ones(dimension))
        self.to(memory_format=torch.channels_last)

    def code(self, embeddings: torch.Tensor, draw: torch.Generator | None = None) -> tuple[torch.Tensor | None, ...]:
        """``(z, mean, log variance)``: z is the mean itself, or a sample with the generator ``draw``; (N, CODE) each.

        Without a CVAE z is the standardised embedding, (N, D), and the others are None.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.mean) or not embeddings.isfinite().all():
            raise Invalid(f"embeddings must be finite numbers of shape (N, {len(self.mean)}), one row per target.")
        standard = (embeddings.to(self.mean.device) - self.mean) / self.spread
        if self.cvae is None:
            return standard, None, None
        mean, log_variance = self.cvae(standard)
        if draw is None:
            return mean, mean, log_variance
        noise = torch.randn(mean.shape, generator=draw).to(mean)
        return mean + (log_variance / 2).exp() * noise, mean, log_variance

    def forward(self, images: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        return self.generate(images, self.code(embeddings)[0])

    def generate(self, images: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The attacked images for a code z (N, …) as ``code`` gives it."""
        images = checked(images, 4)
        if len(images) != len(z):
            raise Invalid(f"Each image needs one embedding of its target, and for {len(images)} there are {len(z)}.")
        first = self.head((images * 2 - 1).contiguous(memory_format=torch.channels_last))
        x = self.down(first)
        plan = self.plan(z).view(len(z), -1, 7, 7)  # what the target asks for at each place of the face
        x = self.mix(torch.cat([x, F.interpolate(plan.to(x), x.shape[2:], mode="bilinear")], 1))
        for i, block in enumerate(self.blocks):
            x = block(x, z)
            if str(i) in self.attention:
                x = self.attention[str(i)](x)
        x = self.up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        correction = self.unfold(self.tail(torch.cat([x, first], 1)))
        return (images + BOUND * correction.float().tanh()).clamp(0, 1)


class _Residual(nn.Module):
    """Two convolutions with instance norm, scaled and shifted by the code (AdaIN)."""

    def __init__(self, width, code):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.style = nn.Linear(code, 4 * width)
        nn.init.normal_(self.style.weight, std=0.1)
        nn.init.zeros_(self.style.bias)

    def forward(self, x, z):
        a, b, c, d = self.style(z.to(x))[:, :, None, None].chunk(4, 1)
        h = F.relu((1 + a) * F.instance_norm(self.first(x)) + b)
        return x + (1 + c) * F.instance_norm(self.second(h)) + d


class Discriminator(nn.Module):
    """PatchGAN with spectral norm: images (N, inputs, H, W) in [0, 1] to a map of scores, one per patch.

    inputs: 3 for the normal discriminator (is this a photo, or was it made?), 6 for the instance discriminator, which
    sees an image beside the target (is this another photo of the target, or not?).
    """

    def __init__(self, inputs: int = 3, width: int = 32):
        super().__init__()
        sizes = [(4 * inputs, width), (width, 2 * width), (2 * width, 4 * width)]
        layers = [nn.PixelUnshuffle(2)]
        for a, b in sizes:
            layers += [spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)), nn.LeakyReLU(0.2, inplace=True)]
        self.body = nn.Sequential(*layers, spectral_norm(nn.Conv2d(4 * width, 1, 3, padding=1)))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body((images * 2 - 1).contiguous(memory_format=torch.channels_last)).float()


def load() -> A3GN:
    """The shipped generator, frozen. Errors as ``common.shipped``."""
    # older files do not have their sizes, which were as these
    return shipped("a3gn", lambda s: A3GN(len(s["mean"]), int(s.pop("width", 32)), int(s.pop("blocks", 4))))


def _convolution(inputs, outputs, kernel, stride=1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False)
    return conv, nn.InstanceNorm2d(outputs, affine=True), nn.ReLU(inplace=True)
