"""Face recognisers: chips in, embeddings out, with a distance and a threshold.

Resizing and normalisation are inside, so gradients and budgets are in pixels of [0, 1].
"""

import functools
import os

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from faceadv.errors import Invalid
from faceadv.images import check_images
from faceadv.networks import dlib as dlib_net
from faceadv.networks import facenet, mobile
from faceadv.precision import autocast
from faceadv.store import weights
from faceadv.store.paths import cache_root, nearest, replacing

NAMES = ("dlib", "mobile", "facenet-vggface2", "facenet-casia")
PRECISIONS = ("auto", "float32")


class Recogniser(nn.Module):
    """A frozen embedding network with a distance and a decision threshold.

    name       what was loaded
    threshold  two chips at a smaller distance are said to show one person
    precision  "auto": ``embed(..., fast=True)``, which attacks use, runs in bfloat16 where the hardware
               has it; "float32": everything in float32
    """

    def __init__(self, name, network, threshold, unit=False, precision="auto"):
        super().__init__()
        if precision not in PRECISIONS:
            raise Invalid(f'precision must be one of {", ".join(PRECISIONS)}, not "{precision}".')
        self.name, self.threshold, self.unit, self.precision = name, threshold, unit, precision
        self.network = network.requires_grad_(False).to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode=True):
        """Stays in evaluation mode: this network is never trained here."""
        return super().train(False)

    def embed(self, images, fast=False):
        """Embeddings (N, D) float32 of float images (N, 3, H, W) RGB in [0, 1], differentiable.

        fast: bfloat16 where ``precision`` and the hardware allow it; scores are always taken without.
        Raises ``ValueError`` for anything else than such images.
        """
        check_images(images)
        with autocast(images.device, fast and self.precision == "auto"):
            embeddings = self.network(images.float())
        embeddings = embeddings.float()
        return F.normalize(embeddings) if self.unit else embeddings

    def distance(self, a, b):
        """Euclidean distance (N,) between rows of embeddings; its gradient is 0, not NaN, where a = b."""
        squared = (a - b).square().sum(-1)
        return torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)

    def forward(self, images):
        """Same as ``embed``."""
        return self.embed(images)


def load(name, device="cpu", precision="auto"):
    """Load a recogniser: "dlib" and "mobile" ship with the packages, "facenet-…" must be fetched first.

    Raises ``ValueError`` for an unknown name, ``FileNotFoundError`` if weights are missing.
    """
    if name == "dlib":
        network, threshold, unit = dlib_net.load(), 0.6, False  # the author's threshold
    elif name == "mobile":
        (network, threshold), unit = mobile.load(), True
    elif name in NAMES:
        # ResGN's threshold is 1.1 on the squared distance
        network, threshold, unit = facenet.FaceNet(weights.find(name)), 1.1**0.5, True
    else:
        known = ", ".join(NAMES)
        raise Invalid(f'There is no recogniser "{name}"{nearest(name, NAMES)}; there are {known}.')
    return Recogniser(name, network, threshold, unit, precision).to(device)


@torch.no_grad()
def embed_all(recogniser, images, batch=32):
    """Embeddings (N, D) float32 on the CPU of many images, in batches and without gradients.

    images: a tensor as ``embed`` takes it, an 8-bit array or tensor (N, 3, H, W), or a FaceSet.
    """
    # a FaceSet's chips stay on the disk, its ``images`` would all be in memory
    images = images.chips if hasattr(images, "chips") else getattr(images, "images", images)
    device = next(recogniser.buffers(), next(recogniser.parameters(), torch.empty(0))).device
    starts = range(0, len(images), batch)
    slow = len(images) > 2000 and not os.environ.get("FACEADV_QUIET")
    bar = tqdm(starts, desc=f"embedding by {recogniser.name}", unit="batch", disable=not slow)
    return torch.cat([recogniser.embed(_floats(images[i : i + batch]).to(device)).cpu() for i in bar])


def embed_faces(recogniser, faces):
    """``embed_all`` of a FaceSet, kept in the cache under a hash of the chips and the network's weights."""
    key = joblib.hash([np.asarray(faces.chips), fingerprint(recogniser)])
    path = cache_root() / "embeddings" / f"{recogniser.name}-{key}.npy"
    if not path.exists():
        embeddings = embed_all(recogniser, faces.chips).numpy()
        with replacing(path) as part, open(part, "wb") as file:
            np.save(file, embeddings)
    return torch.from_numpy(np.load(path))


@functools.lru_cache(maxsize=8)
def fingerprint(network):
    """A hash of a network's weights, for keys of caches."""
    return joblib.hash([tensor.cpu().numpy() for tensor in network.state_dict().values()])


def _floats(chips):
    """8-bit chips as a float tensor; a float tensor as it is."""
    if not isinstance(chips, torch.Tensor):
        chips = torch.from_numpy(np.array(chips))  # a copy: torch warns of memory-mapped, read-only arrays
    return chips.float() / 255 if chips.dtype == torch.uint8 else chips
