"""What networks and purifiers share: reading shipped weights, and checking images and options."""

import math
from collections.abc import Callable
from numbers import Integral, Real

from torch import Tensor, nn, random

from faceadv.errors import Invalid
from faceadv.images import check_images
from faceadv.store import weights

__all__ = ["checked", "filled", "number", "shipped", "whole"]


def shipped(name: str, build: Callable[[dict], nn.Module]) -> nn.Module:
    """The network of ``models/NAME.safetensors`` in float32 and evaluation mode, frozen.

    build: makes the network for the file's tensors and removes (``pop``) those that are no weights. Raises ``Invalid``
    if a weight is missing, left over or of another shape, and what ``weights.load_safetensors`` raises.
    """
    state = weights.load_safetensors(name)
    said = f'The shipped weights "{name}" are not those of its network: restore {name}.safetensors from the repository.'
    with random.fork_rng(devices=[]):  # random weights are drawn first, and torch's global state stays as it is
        try:
            network = build(state)
        except (LookupError, ValueError, RuntimeError) as e:
            raise Invalid(said) from e
    return filled(network, state, said)


def filled(network: nn.Module, state: dict[str, Tensor], said: str, assign: bool = False) -> nn.Module:
    """The network with all weights of ``state``, in evaluation mode, frozen; ``Invalid(said)`` if they are others.

    Only batch norm's counters may be missing, which torch adds. assign: take the tensors themselves, no copies.
    """
    try:
        network.load_state_dict(state, assign=assign)
    except RuntimeError as e:
        raise Invalid(said) from e
    return network.eval().requires_grad_(False)


def checked(images: Tensor, multiple: int = 1) -> Tensor:
    """The images (N, 3, H, W) in [0, 1] as float32. Raises ``Invalid`` for others, or sides that are no multiples."""
    check_images(images)
    height, width = images.shape[2:]
    if height % multiple or width % multiple:
        raise Invalid(f"The sides of the images must be multiples of {multiple}, not {height} x {width}.")
    return images.float()


def whole(name: str, value: int, low: int, high: float = math.inf) -> int:
    """The option ``name`` as an int. Raises ``Invalid`` unless it is a whole number from ``low`` to ``high``."""
    return int(_option(name, value, low, high, Integral, "whole number"))


def number(name: str, value: float, low: float, high: float = math.inf) -> float:
    """The option ``name`` as a float. Raises ``Invalid`` unless it is a finite number from ``low`` to ``high``."""
    return float(_option(name, value, low, high, Real, "number"))


def _option(name, value, low, high, kind, what):
    if isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high and value != math.inf:
        return value
    limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    raise Invalid(f"{name} must be a {what} {limits}, not {value!r}.")
