"""ResGN: a residual generative network that cleans adversarial perturbations, and its joint loss.

Source: Su, Sun, Fan, Lu and Liu 2019, Cleaning adversarial perturbations via residual generative network for face
verification (ICASSP), figure 1 and equations 1 to 4; what the paper leaves open follows SRResNet (Ledig et al. 2017).
"""

import torch
import torch.nn.functional as F
from torch import nn

from faceadv import weights

TERMS = ("pixel", "texture", "verification")


class ResGN(nn.Module):
    """SRResNet without up-sampling: head, residual blocks with batch norm, global skip, tail.

    (N, 3, H, W) in [0, 1] to the same; H and W must be multiples of ``shrink``. blocks, width: 16 and 64 in SRResNet.
    shrink: 1 as in the paper; 2 works on the image folded to half its side and four times its channels (FFDNet, Zhang
    et al. 2018), which costs a quarter. The tail gives a correction to the image, 0 before training, where SRResNet
    gives the image itself through a tanh: thousands of steps suffice, not a thousand epochs.
    """

    def __init__(self, blocks=16, width=64, shrink=1):
        super().__init__()
        self.fold, self.unfold = nn.PixelUnshuffle(shrink), nn.PixelShuffle(shrink)
        channels = 3 * shrink**2
        self.head = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList(_block(width) for _ in range(blocks))
        self.end = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.tail = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        x = images.contiguous(memory_format=torch.channels_last)
        head = x_in = self.head(self.fold((x - 0.5) * 2))
        for block in self.blocks:
            x_in = x_in + block(x_in)
        correction = self.unfold(self.tail(head + self.end(x_in)))
        return (images + correction.float()).clamp(0, 1)


def load():
    """The shipped ResGN, trained on LFW's training people against dlib, frozen. Errors as ``load_safetensors``."""
    state = weights.load_safetensors("resgn")
    network = ResGN(**{key: int(state.pop(key)) for key in ("blocks", "width", "shrink")})
    network.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)  # counters do not ship
    return network.eval().requires_grad_(False)


def _block(width):
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
    )


def different(squared, tau, top=4.0):
    """s(d), the pair's probability of being different, from squared distances (N,): 0 at 0, 1/2 at tau, 1 at top.

    Two straight pieces, as CleverHans' FaceNet example, from which ResGN's verification loss takes its softmax; 4 is
    the largest squared distance of unit embeddings. tau is the squared threshold.
    """
    near = 0.5 * squared / tau
    far = 0.5 + 0.5 * (squared - tau) / (top - tau)
    return torch.where(squared <= tau, near, far).clamp(0, 1)


def terms(cleaned, legitimate, recogniser, texture=None, names=TERMS):
    """The losses of equations 2 to 4 that ``names`` has, as a dict of scalars.

    cleaned, legitimate: (N, 3, H, W) in [0, 1]; texture: a network whose output is compared (VGG-Face's second fully
    connected layer in the paper), by default ``recogniser.network.maps``, the maps of its last residual block.
    The pair (cleaned, legitimate) is always of one person, so equation 4 is -log(1 - s(d)).
    """
    value = {"pixel": F.mse_loss(cleaned, legitimate)}
    if set(names) != {"pixel"}:
        with torch.no_grad():
            target, wanted = _features(legitimate, recogniser, texture)
        got, embeddings = _features(cleaned, recogniser, texture)
        same = 1 - different((embeddings - wanted).square().sum(1), recogniser.threshold**2)
        value["texture"] = F.mse_loss(got.float(), target.float())
        value["verification"] = -same.clamp_min(1e-6).log().mean()
    return {name: value[name] for name in names}


def _features(images, recogniser, texture):
    """Texture features and embeddings (N, D) float32; one forward pass gives both if texture is None."""
    if texture is None:
        maps = recogniser.network.maps(images)
        return maps, recogniser.network.embedding(maps).float()
    return texture(images), recogniser.embed(images, fast=True)


def balance(losses, parameters):
    """The gradient norm of each loss in the parameters: weights in inverse proportion give each an equal say."""
    norms = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        norms[name] = torch.stack([g.float().square().sum() for g in gradients if g is not None]).sum().sqrt().item()
    return norms
