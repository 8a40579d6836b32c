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

from faceadv.store import weights

CODE = 64  # numbers of the target's latent code
# No pixel moves farther than this. Without a bound the generator paints faces away before it learns whose face to make.
BOUND = 0.1


class Attention(nn.Module):
    """Self-attention over all places of (N, C, H, W), added with a weight that starts at 0 (SAGAN, equation 3)."""

    def __init__(self, channels):
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        attended = self.maps(x) @ self.value(x).flatten(2).transpose(1, 2)
        return x + self.gamma * attended.transpose(1, 2).reshape(x.shape)

    def maps(self, x):
        """Where each place looks: (N, H W, H W), rows sum to 1."""
        query, key = self.query(x).flatten(2), self.key(x).flatten(2)
        return (query.transpose(1, 2) @ key / query.shape[1] ** 0.5).softmax(-1)


class CVAE(nn.Module):
    """The target as a latent code: mean and log variance of q(z | y), each (N, CODE).

    It sees the target through the recogniser's eyes: its input is the embedding (N, D), standardised.
    """

    def __init__(self, dimension, code=CODE):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(dimension, 256), nn.SiLU(), nn.Linear(256, 2 * code))

    def forward(self, embeddings):
        return self.body(embeddings).chunk(2, 1)


class A3GN(nn.Module):
    """The generator: encoder, the target's code, residual blocks with attention, decoder.

    ``network(images, embeddings)``: images (N, 3, H, W) in [0, 1], H and W multiples of 4, and embeddings (N, D) of
    the targets by the recogniser under attack; the attacked images, (N, 3, H, W) in [0, 1]. The decoder gives a
    correction to the image within ``BOUND``, 0 before training. Without ``cvae`` the embedding takes the code's place,
    without ``attention`` the two attention layers are left out. Embeddings are standardised by the buffers ``mean`` and
    ``spread``, for what all faces share is most of an embedding.
    """

    def __init__(self, dimension=128, width=32, blocks=4, cvae=True, attention=True):
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

    def code(self, embeddings, draw=None):
        """``(z, mean, log variance)``: the mean itself, or a sample with the generator ``draw``; (N, CODE) each."""
        standard = (embeddings - self.mean) / self.spread
        if self.cvae is None:
            return standard, None, None
        mean, log_variance = self.cvae(standard)
        if draw is None:
            return mean, mean, log_variance
        noise = torch.randn(mean.shape, generator=draw).to(mean)
        return mean + (log_variance / 2).exp() * noise, mean, log_variance

    def forward(self, images, embeddings):
        return self.generate(images, self.code(embeddings)[0])

    def generate(self, images, z):
        """The attacked images for a code z."""
        first = self.head((images * 2 - 1).contiguous(memory_format=torch.channels_last))
        x = self.down(first)
        plan = self.plan(z).view(len(z), -1, 7, 7)  # where on the face the target wants what
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
    """PatchGAN with spectral norm: images (N, inputs, H, W) in [0, 1] to a map of scores, one a patch.

    inputs 3 is the normal discriminator (a photo or made), 6 the instance discriminator (this image beside the target:
    another photo of the target, or not).
    """

    def __init__(self, inputs=3, width=32):
        super().__init__()
        sizes = [(4 * inputs, width), (width, 2 * width), (2 * width, 4 * width)]
        layers = [nn.PixelUnshuffle(2)]
        for a, b in sizes:
            layers += [spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)), nn.LeakyReLU(0.2, inplace=True)]
        self.body = nn.Sequential(*layers, spectral_norm(nn.Conv2d(4 * width, 1, 3, padding=1)))
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.body((images * 2 - 1).contiguous(memory_format=torch.channels_last)).float()


def load():
    """The shipped generator, frozen. Errors as ``weights.load_safetensors``."""
    state = {key: value.float() for key, value in weights.load_safetensors("a3gn").items()}
    network = A3GN()
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def _convolution(inputs, outputs, kernel, stride=1):
    padding = (kernel - 1) // 2
    return (
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False),
        nn.InstanceNorm2d(outputs, affine=True),
        nn.ReLU(inplace=True),
    )
