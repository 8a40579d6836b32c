"""Attacks that know the purifier: gradients through it, averaged over its randomness.

Source: Athalye, Carlini and Wagner 2018, Obfuscated gradients give a false sense of security, section 4.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch

from faceadv.errors import whole
from faceadv.objectives import Objective, answer, evaluating
from faceadv.precision import autocast, has_bfloat16
from faceadv.precision import device as chosen
from faceadv.recognisers import Recogniser
from faceadv.store import cache

__all__ = ["differentiable", "kept", "purified", "straight_through", "through"]


def through(purifier: Callable, objective: Objective, samples: int = 1) -> Objective:
    """The objective as it is behind a purifier: its loss is the mean over ``samples`` purifications of the images.

    An image counts as reached if more than half of its purifications reach the objective. The purifier computes in
    float32 if the objective does.

    Parameters
    ----------
    purifier : a differentiable module or function from images to images
    objective : what the images should reach after purification
    samples : purifications per call; with more than one of a purifier that draws random numbers this is EOT

    Raises
    ------
    Invalid : for another number of samples; when called, for a purifier in training mode
    """
    samples, fast = whole("samples", samples, 1), getattr(objective, "fast", True)

    def behind(images, rows, exact=False):
        evaluating(purifier)
        losses, hits = 0.0, 0
        for _ in range(samples):
            with autocast(images.device, fast and not exact):
                purified = purifier(images.float()).float()
            loss, reached = answer(objective(purified, rows, exact), len(images))
            losses, hits = losses + loss.float() / samples, hits + reached.int()
        return losses, 2 * hits > samples

    behind.fast = fast
    return behind


def straight_through(purifier: Callable, stand_in: Callable | None = None) -> Callable:
    """BPDA: a purifier whose gradient is that of a differentiable stand-in, by default the identity.

    When called, it raises ``Invalid`` if one of the two is in training mode. Source: as above, section 4.1.
    """

    def behind(images):
        evaluating(purifier, stand_in)
        with torch.no_grad():
            clean = purifier(images)
        near = images if stand_in is None else stand_in(images)
        return near + (clean - near).detach()

    return behind


def purified(recogniser: Recogniser, purifier: Callable) -> SimpleNamespace:
    """A recogniser behind a differentiable purifier: an extractor for cloaks, with the gradient through both.

    It computes in float32 if the recogniser does. Its ``embed`` raises ``Invalid`` for a purifier in training mode.
    """
    precision = getattr(recogniser, "precision", "auto")

    def embed(images, fast=False):
        evaluating(purifier)
        with autocast(images.device, fast and precision == "auto"):
            clean = purifier(images.float()).float()
        return recogniser.embed(clean, fast=fast)

    return SimpleNamespace(name=f"{recogniser.name} behind a purifier", embed=embed, precision=precision)


def kept(label: str, make: Callable[[], torch.Tensor], facts: list, device: torch.device | str = "cpu") -> torch.Tensor:
    """The images of a slow attack, (N, 3, H, W): what ``make()`` returns, made once and kept in the cache.

    Parameters
    ----------
    label : what it is, in the name of its folder
    make : the attack
    facts : all that the images depend on, as ``store.cache.key`` takes it; libraries and the device are added
    device : where the images are wanted
    """
    versions = [cache.versions(), torch.device(device).type, has_bfloat16(device)]
    images = cache.array("attacks", label, cache.key(label, facts, versions), lambda: make().cpu().numpy())
    return torch.from_numpy(images).to(device)


def differentiable(purifier: Callable) -> bool:
    """Whether a purifier, a function of images (N, 3, H, W) in [0, 1], has a gradient that is not 0 everywhere.

    It may take images of the CPU, or of the device that is there: a network of its own lies on one of them.
    """
    return any(_has_slope(purifier, place) for place in dict.fromkeys([torch.device("cpu"), chosen()]))


def _has_slope(purifier, place):
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 112, 112, generator=draw).to(place).requires_grad_(True)
    try:
        made = purifier(x)
        (slope,) = torch.autograd.grad((made * torch.rand(made.shape, generator=draw).to(place)).sum(), x)
    except RuntimeError:  # torch's, for an output without a graph, and for a network on another device
        return False
    return bool(slope.isfinite().all() and slope.abs().max() > 0)
