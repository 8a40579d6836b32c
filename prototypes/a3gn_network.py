"""A3GN: a network that turns any face into one that recognisers take for a given other face, in one forward pass.

Source: Song, Wu and Yang 2018, Attacks on state-of-the-art face recognition using attentional adversarial attack
generative network (arXiv 1811.12026; Multimedia Tools and Applications 80, 2021). The paper's text names the parts: a
conditional variational autoencoder that reads the target's face, attention that learns the correspondences between the
two faces, and two discriminators. Sizes are open there and are ours.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from faceadv.errors import Invalid
from faceadv.networks.common import checked, shipped

__all__ = ["A3GN", "CODE", "VAE", "CrossAttention", "Discriminator", "load", "places"]

CODE = 128  # numbers of the target's latent code
WAVES = (1, 2, 4, 8)  # periods over the face of the positional terms


@functools.lru_cache(maxsize=8)
def places(height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Sines and cosines of each place's coordinates, (1, 4 len(WAVES), H, W): what tells attention where it looks."""
    y, x = torch.meshgrid(*((torch.arange(n, device=device) + 0.5) / n for n in (height, width)), indexing="ij")
    angles = math.pi * torch.stack([wave * axis for wave in WAVES for axis in (y, x)])
    return torch.cat([angles.sin(), angles.cos()])[None]


class CrossAttention(nn.Module):
    """Each place of the source looks at the places of the target, with several heads; what it sees is added.

    Queries come from the source, keys and values from the target (Vaswani et al. 2017). Content and place are projected
    apart. Queries and keys have unit length, so the learned temperature alone says how sharp the maps are (Henry et al.
    2020). Their projections start equal: at first a place looks where the target is like it.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key = (nn.Conv2d(channels + 4 * len(WAVES), channels, 1) for _ in range(2))
        self.key.load_state_dict(self.query.state_dict())
        self.value, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(12.0)))

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Both (N, C, H, W), with one H and W or with two."""
        query, key = self._looks(source, target)
        seen = F.scaled_dot_product_attention(query, key, self._split(self.value(target)), scale=1.0)
        return source + self.out(seen.transpose(1, 2).flatten(2).transpose(1, 2).reshape(source.shape))

    def maps(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Where each place of the source looks: (N, heads, H W of the source, H W of the target), rows sum to 1."""
        query, key = self._looks(source, target)
        return (query.float() @ key.float().transpose(2, 3)).softmax(-1)

    def _looks(self, source, target):
        query, key = (
            F.normalize(self._split(layer(self._placed(x))).float(), dim=3)
            for layer, x in ((self.query, source), (self.key, target))
        )
        return query * self.temperature.exp(), key

    def _placed(self, x):
        where = places(*x.shape[2:], x.device).expand(len(x), -1, -1, -1)
        return torch.cat([F.instance_norm(x), where.to(x)], 1)

    def _split(self, x):
        """(N, C, H, W) to (N, heads, H W, C / heads), the last one together in memory, as fast attention wants it."""
        return x.flatten(2).transpose(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2).contiguous()


class VAE(nn.Module):
    """The target's face as a latent code: from features (N, C, H, W) mean and log variance of q(z | y), (N, CODE) each.

    The log variance is kept within [-8, 8]. The features are brought to 7 x 7 places, each with its own weights: an
    average over the face would forget what is where.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(channels, channels, 4, stride=2), *_convolution(channels, 64, 4, stride=2)
        )
        self.head = nn.Linear(64 * 7 * 7, 2 * CODE)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small = F.adaptive_avg_pool2d(self.body(features), 7)
        mean, log_variance = self.head(small.flatten(1)).float().chunk(2, 1)
        return mean, 8 * (log_variance / 8).tanh()


class A3GN(nn.Module):
    """The generator: one encoder for both faces, the target's code, cross-attention, residual blocks, decoder.

    ``network(images, targets, embeddings)`` gives the attacked images (N, 3, H, W) in [0, 1]. images, targets:
    (N, 3, H, W) in [0, 1], H and W multiples of 4; embeddings: those of the targets, (N, D), if the network was built
    for them. Raises ``Invalid`` for other inputs. The decoder gives a correction to the image, 0 before training.

    Parameters
    ----------
    dimension : D; 0 for a network that knows the target by its face alone. Embeddings are standardised by the buffers
        ``mean`` and ``spread``, because most of an embedding is what all faces share.
    width, blocks : a quarter of the channels in the residual blocks, and how many of these there are
    heads : of each of the two attention layers, before the blocks and in their middle; 0 leaves attention out
    bound : no pixel changes by more than this; 0 for no bound
    """

    def __init__(self, dimension: int = 0, width: int = 32, blocks: int = 4, heads: int = 4, bound: float = 0.0):
        super().__init__()
        wide, code = 4 * width, CODE + (CODE if dimension else 0)
        self.bound = bound
        self.head = nn.Sequential(nn.PixelUnshuffle(2), *_convolution(12, 2 * width, 3))
        self.down = nn.Sequential(*_convolution(2 * width, wide, 4, stride=2))
        self.vae = VAE(wide)
        self.known = nn.Sequential(nn.Linear(dimension, 256), nn.SiLU(), nn.Linear(256, CODE)) if dimension else None
        self.blocks = nn.ModuleList(_Residual(wide, code) for _ in range(blocks))
        spots = sorted({0, blocks // 2}) if heads else []
        self.attention = nn.ModuleDict({str(i): CrossAttention(wide, heads) for i in spots})
        self.up = nn.Sequential(*_convolution(wide, 2 * width, 3))
        self.tail = nn.Conv2d(4 * width, 12, 3, padding=1)
        self.unfold = nn.PixelShuffle(2)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("spread", torch.ones(dimension))
        self.to(memory_format=torch.channels_last)

    def forward(
        self, images: torch.Tensor, targets: torch.Tensor, embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        images, targets, dimension = checked(images, 4), checked(targets, 4), len(self.mean)
        if images.shape != targets.shape:
            raise Invalid(f"Each image needs a target of its size: {tuple(images.shape)}, {tuple(targets.shape)}.")
        if embeddings is not None and not dimension:
            raise Invalid("This network knows its targets by their faces alone: give it no embeddings.")
        shape = len(images), dimension
        if dimension and (embeddings is None or embeddings.shape != shape or not embeddings.isfinite().all()):
            raise Invalid(f"embeddings must be finite numbers of shape {shape}, one row per target.")
        return self.generate(images, targets, embeddings)[0].clamp(0, 1)  # what the rounding of a sum left over

    def generate(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        embeddings: torch.Tensor | None = None,
        draw: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """``(made, z, mean, log variance)`` without a check of the inputs, which would make a GPU wait.

        z (N, CODE) is the mean of q(z | y), or a sample of it with ``draw``, a generator where the images are.
        """
        first, own, theirs = self.features(images, targets)
        mean, log_variance = self.vae(theirs)
        z = mean
        if draw is not None:
            z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=draw, device=mean.device)
        code = z
        if self.known is not None:
            code = torch.cat([z, self.known((embeddings.to(self.mean) - self.mean) / self.spread).float()], 1)
        x = own
        for i, block in enumerate(self.blocks):
            if str(i) in self.attention:
                x = self.attention[str(i)](x, theirs)
            x = block(x, code)
        x = self.up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        correction = self.unfold(self.tail(torch.cat([x, first], 1))).float()
        if self.bound:
            correction = self.bound * (correction / self.bound).tanh()
        made = images + correction
        # the gradient goes through the clamp as if it were not there: else pixels that went too far never come back
        return made + (made.clamp(0, 1) - made).detach(), z, mean, log_variance

    def features(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Features of the source at a half (N, 2 width, …) and a quarter of its size, and the target's at a quarter."""
        both = (torch.cat([images, targets]) * 2 - 1).contiguous(memory_format=torch.channels_last)
        first = self.head(both)
        own, theirs = self.down(first).chunk(2)
        return first[: len(images)], own, theirs

    @torch.no_grad()
    def maps(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Where the first attention layer looks: (N, heads, H W / 16, H W / 16), a row for each place of the source."""
        _, own, theirs = self.features(checked(images, 4), checked(targets, 4))
        return self.attention["0"].maps(own, theirs)


class _Residual(nn.Module):
    """Two convolutions with instance norm, scaled and shifted by the code (AdaIN)."""

    def __init__(self, width, code):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.style = nn.Linear(code, 4 * width)
        nn.init.normal_(self.style.weight, std=0.05)
        nn.init.zeros_(self.style.bias)

    def forward(self, x, code):
        a, b, c, d = self.style(code).to(x)[:, :, None, None].chunk(4, 1)
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
    return shipped("a3gn", build)


def build(state: dict[str, torch.Tensor]) -> A3GN:
    """A network of the sizes that a file of weights names; they are removed from ``state``."""
    width, blocks, heads = (int(state.pop(key)) for key in ("width", "blocks", "heads"))
    return A3GN(len(state["mean"]), width, blocks, heads, round(float(state.pop("bound")), 4))


def _convolution(inputs, outputs, kernel, stride=1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False)
    return conv, nn.InstanceNorm2d(outputs, affine=True), nn.ReLU(inplace=True)
