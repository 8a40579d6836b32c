"""LPIPS: the distance of two images in AlexNet's features, weighted as people judged.

Source: Zhang et al. 2018, The unreasonable effectiveness of deep features as a perceptual metric, equation 1. The
weights of the judgement come with torchmetrics, AlexNet's own are fetched: `faceadv weights fetch alexnet`.
"""

import functools
from collections.abc import Callable

import torch

from faceadv.networks.common import checked
from faceadv.store import weights

__all__ = ["load"]


def load(device: torch.device | str = "cpu") -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of two batches of images (N, 3, H, W) in [0, 1] to distances (N,), differentiable, 0 for equal ones.

    Raises ``Missing`` if AlexNet's weights are not here, ``Invalid`` for other weights and, when called, other images.
    """
    network = _network(weights.find("alexnet"), torch.empty(0, device=device).device)  # "cuda" is "cuda:0" then
    return lambda a, b: network(checked(a), checked(b), normalize=True).flatten()


@functools.lru_cache(maxsize=1)  # the file has 244 MB, and each call of a cloak asks for it
def _network(path, device):
    from torchmetrics.functional.image.lpips import _LPIPS  # takes seconds

    state = weights.read_state(path)
    # with AlexNet's trunk as random numbers, torchmetrics does not try to download it
    network = _LPIPS(net="alex", pnet_rand=True)
    trunk = {name: state["features." + name.split(".", 1)[1]] for name in network.net.state_dict()}
    network.net.load_state_dict(trunk)
    return network.eval().requires_grad_(False).to(device)
