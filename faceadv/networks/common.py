"""What networks and attacks share: reading shipped weights, checking images, and drawing random numbers."""

from collections.abc import Callable

from torch import Generator, Tensor, nn, random

from faceadv.errors import Invalid, whole
from faceadv.images import check_images
from faceadv.store import weights

__all__ = ["checked", "filled", "generator", "shipped"]


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
        except (LookupError, TypeError, ValueError, RuntimeError) as e:
            raise Invalid(said) from e
    return filled(network, state, said)


def filled(network: nn.Module, state: dict[str, Tensor], said: str, assign: bool = False) -> nn.Module:
    """The network with all the weights of a file, in evaluation mode, frozen.

    Parameters
    ----------
    network : it is changed
    state : its weights by name; only batch norm's counters may be missing, and torch adds them
    said : the message if a weight is missing, left over or of another shape
    assign : take the tensors themselves instead of copies

    Raises
    ------
    Invalid : for the weights of another network
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


def generator(seed: int) -> Generator:
    """A generator of random numbers on the CPU. Raises ``Invalid`` for a seed that is no whole number from 0 on."""
    return Generator().manual_seed(whole("seed", seed, 0, 2**63 - 1))
