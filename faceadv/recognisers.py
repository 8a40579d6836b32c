"""Face recognisers: chips in, embeddings out, with a distance and a threshold.

Resizing and normalisation are inside, so gradients and budgets are in pixels of [0, 1].
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from faceadv import precision as devices
from faceadv.errors import Invalid
from faceadv.faces import FaceSet
from faceadv.images import believing, check_images
from faceadv.metrics import finite
from faceadv.networks import dlib, facenet, frbench, mobilefacenet, mobilenet
from faceadv.precision import autocast, in_parts, together
from faceadv.store import cache, weights
from faceadv.store.paths import nearest

__all__ = ["NAMES", "PRECISIONS", "Recogniser", "device_of", "embed_all", "embed_faces", "fingerprint", "known", "load"]

NAMES = ("dlib", "mobilefacenet", "mobilenet-vggface2", "facenet-vggface2", "facenet-casia")
PRECISIONS = ("auto", "float32")
BATCH = 32
MANY = 2000  # images from which on a progress bar is shown


class Recogniser(nn.Module):
    """A frozen embedding network with a distance and a decision threshold.

    Parameters
    ----------
    name : what was loaded
    network : (N, 3, H, W) float32 in [0, 1] to (N, D)
    threshold : two chips at a smaller distance are said to show one person
    unit : whether embeddings are scaled to unit length
    precision : "auto": with ``embed(fast=True)``, as in attacks, bfloat16 where the hardware has it; "float32": never
    """

    def __init__(self, name: str, network: nn.Module, threshold: float, unit: bool = False, precision: str = "auto"):
        super().__init__()
        if precision not in PRECISIONS:
            raise Invalid(f'precision must be one of {", ".join(PRECISIONS)}, not "{precision}".')
        self.name, self.threshold, self.unit, self.precision = name, threshold, unit, precision
        self.network = network.requires_grad_(False).to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> "Recogniser":
        """Stays in evaluation mode: this network is never trained here."""
        return super().train(False)

    def embed(self, images: torch.Tensor, fast: bool = False) -> torch.Tensor:
        """Embeddings (N, D) float32 of float images (N, 3, H, W) RGB in [0, 1], differentiable.

        fast: compute in bfloat16 where ``precision`` and the hardware allow it. Everything that is scored is computed
        without it, in float32, whatever the type of the images. Raises ``Invalid`` for anything but such images, and
        for embeddings that are not finite.
        """
        check_images(images)
        with autocast(images.device, fast and self.precision == "auto"):
            embeddings = self.network(images.float())
        embeddings = embeddings.float()
        embeddings = F.normalize(embeddings) if self.unit else embeddings
        return embeddings if believing() else finite(embeddings, "embeddings")

    def distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Euclidean distance (N,) between rows of embeddings, where a is; its gradient is 0, not NaN, where a = b.

        Raises ``Invalid`` for a distance that is not finite.
        """
        squared = (a - b.to(a.device)).square().sum(-1)
        return finite(torch.where(squared == 0, 1.0, squared).sqrt() * (squared != 0), "distances")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Same as ``embed``."""
        return self.embed(images)


def load(name: str, device: str | torch.device = "cpu", precision: str = "auto") -> Recogniser:
    """Load a recogniser: "facenet-…" must be fetched first, "frbench:…" fetches itself, the others ship.

    Parameters
    ----------
    name : one of ``NAMES``, or "frbench:BACKBONE_LOSS_DATA" for one of the package frbench (``networks.frbench``)
    device : where it computes
    precision : see ``Recogniser``

    Raises
    ------
    Invalid : for an unknown name
    Missing : if its weights are not there, or the package of its network
    Failed : if frbench's download fails
    """
    device = devices.device(device)
    if name == "dlib":
        network, threshold, unit = dlib.load(), 0.6, False  # the author's threshold
    # the next two thresholds accept 0.1 % of the 45 million pairs of different people among LFW's training people
    # (``training.loop.students``), not ORL's or View 1's test people; View 2 has some of them, but chooses its own
    elif name == "mobilefacenet":
        network, threshold, unit = mobilefacenet.load(), 1.021, True
    elif name == "mobilenet-vggface2":
        network, threshold, unit = mobilenet.load(), 0.855, True
    elif name in NAMES:
        # ResGN's threshold is 1.1 on the squared distance
        network, threshold, unit = facenet.FaceNet(weights.find(name)), 1.1**0.5, True
    elif known(name):
        network, threshold, unit = frbench.FRBench(name), 1.1, True  # nobody publishes one: choose your own
    else:
        raise Invalid(f'There is no recogniser "{name}"{nearest(name, NAMES)}; there are {", ".join(NAMES)}.')
    return Recogniser(name, network, threshold, unit, precision).to(device)


def known(name: str) -> bool:
    """Whether ``load`` has a network of that name, fetched or not; of frbench's, any is taken for one."""
    return name in NAMES or name.startswith(frbench.PREFIX)


@torch.no_grad()
def embed_all(
    recogniser: Recogniser, images: torch.Tensor | np.ndarray | FaceSet, batch: int | None = None
) -> torch.Tensor:
    """Embeddings (N, D) float32 on the CPU of many images, without gradients.

    Parameters
    ----------
    recogniser : one of ``load``
    images : a tensor as ``embed`` takes it, an 8-bit array or tensor (N, 3, H, W), or a FaceSet
    batch : how many are embedded at once, by default 32, on a GPU 256
    """
    images = getattr(images, "chips", images)  # they stay on the disk; a FaceSet's ``images`` would all be in memory
    device = device_of(recogniser)
    batch = together(BATCH, device) if batch is None else batch
    said = f"embedding by {recogniser.name}" if len(images) > MANY else ""

    def embedded(rows):
        return recogniser.embed(_floats(images[rows[0] : rows[-1] + 1]).to(device)).cpu()

    if not len(images):
        return recogniser.embed(_floats(images).to(device)).cpu()
    return torch.cat(in_parts(embedded, torch.arange(len(images)), batch, said))


def embed_faces(recogniser: Recogniser, faces: FaceSet) -> torch.Tensor:
    """``embed_all`` of a FaceSet, kept in the cache by a hash of chips, weights and where it is computed."""
    device = device_of(recogniser).type
    where = f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else device  # sums round otherwise
    key = cache.key(cache.versions(), where, recogniser.unit, fingerprint(recogniser), faces.chips)
    name = recogniser.name.replace(":", "-")  # which no file may have in its name on Windows
    made = cache.array("embeddings", name, key, lambda: embed_all(recogniser, faces.chips).numpy())
    return torch.from_numpy(made)


def fingerprint(network: nn.Module) -> str:
    """A hash of a network's weights as they are now, for keys of caches."""
    return cache.key(network)


def device_of(network: nn.Module) -> torch.device:
    """Where a network computes."""
    return next(network.parameters(), next(network.buffers(), torch.empty(0))).device


def _floats(chips):
    """8-bit chips as a float tensor; a float tensor as it is."""
    if not isinstance(chips, torch.Tensor):
        chips = torch.from_numpy(np.array(chips))  # a copy: torch warns of memory-mapped, read-only arrays
    return chips.float() / 255 if chips.dtype == torch.uint8 else chips
