"""The recipe of the second recogniser: `faceadv train mobile`.

Loss: CosFace (Wang et al. 2018, equation 4), cross-entropy over s (cos θ_j - m [j = y]).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from faceadv import faces, pairs, recognisers, verification
from faceadv.networks.mobile import DIMENSION, MobileNet
from faceadv.store import weights
from faceadv.training import loop

__all__ = ["SETTINGS", "augment", "margin_loss", "photos", "split", "train", "write"]

SCALE, MARGIN = 32.0, 0.25
VALIDATION_PEOPLE = 300  # held out of the training people: they choose the threshold
SETTINGS = {"lfw": {"steps": 2600, "batch": 96, "lr": 2e-3, "people": None}}  # people: how many; None for all
SETTINGS["smoke"] = SETTINGS["orl"] = SETTINGS["lfw"] | {"steps": 20, "batch": 16, "people": 40}
SETTINGS["paper"] = SETTINGS["lfw"]


def split(lfw: faces.FaceSet, seed: int = 0) -> tuple[list[str], list[str]]:
    """LFW's training people in two parts: names to train on, and names that are held out for validation."""
    people = pairs.lfw_people(lfw, "train")
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {people[i] for i in order[:VALIDATION_PEOPLE]}
    return [p for p in people if p not in held_out], sorted(held_out)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random flip, similarity transform, light, grey, blur by down-scaling, and one erased rectangle.

    images (N, 3, 112, 112) in [0, 1]; the result has the same shape and range.
    """
    n = len(images)

    def uniform(low, high, *shape):
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    angle, scale = uniform(-0.15, 0.15), uniform(0.9, 1.12)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    a, b = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([a * flip, -b, uniform(-0.1, 0.1), b * flip, a, uniform(-0.1, 0.1)], 1).reshape(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    blurred = F.interpolate(F.avg_pool2d(images, 2), images.shape[2:], mode="bilinear", align_corners=False)
    images = torch.where(uniform(0, 1, 1, 1, 1) < 0.15, blurred, images)
    images = torch.where(uniform(0, 1, 1, 1, 1) < 0.2, images.mean(1, keepdim=True), images)
    images = (images - 0.5) * uniform(0.7, 1.3, 1, 1, 1) + 0.5 + uniform(-0.15, 0.15, 1, 1, 1)
    images = images * uniform(0.85, 1.15, 3, 1, 1)
    y, x = torch.meshgrid(torch.arange(112), torch.arange(112), indexing="ij")
    cy, cx = uniform(0, 112, 1, 1), uniform(0, 112, 1, 1)
    hy, hx = uniform(6, 24, 1, 1), uniform(6, 24, 1, 1)
    erased = ((y - cy).abs() < hy) & ((x - cx).abs() < hx) & (uniform(0, 1, 1, 1) < 0.5)
    return torch.where(erased[:, None], uniform(0, 1, 3, 1, 1), images).clamp(0, 1)


def margin_loss(embeddings: torch.Tensor, centres: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """CosFace, a scalar: cross-entropy over s (cos θ_j - m [j = y]).

    Parameters
    ----------
    embeddings, centres, labels : (N, D), (C, D) of the people, and (N,)
    """
    cosine = F.normalize(embeddings) @ F.normalize(centres).T
    return F.cross_entropy(SCALE * (cosine - MARGIN * F.one_hot(labels, len(centres))), labels)


def photos(
    profile: str = "lfw", root: loop.Place = None, seed: int = 0, device: loop.Device = "cpu"
) -> tuple[faces.FaceSet]:
    """What a profile learns from, the first argument of ``train``: LFW's training people without the held-out ones.

    Parameters
    ----------
    profile : a key of ``SETTINGS``, which says how many people
    root : folder with data sets; by default ``FACEADV_DATA``
    seed, device : the seed chooses whom to hold out; the device is not needed
    """
    lfw = faces.load("lfw", root)
    return (lfw.people(split(lfw, seed)[0][: SETTINGS[profile]["people"]]),)


def train(
    data: faces.FaceSet,
    settings: dict,
    *,
    out: loop.Place = None,
    resume: bool = False,
    seed: int = 0,
    device: loop.Device = "cpu",
) -> tuple[MobileNet, list[dict]]:
    """Train a network to tell people apart; returns ``(network, log)``, the network frozen.

    Parameters
    ----------
    data : photos of the people
    settings : "steps", "batch", "lr" (the peak); what is missing is as in the profile lfw
    out, resume, seed, device : as for ``loop.train``, with its errors
    """
    settings = loop.complete(settings, SETTINGS)
    chips, labels = np.asarray(data.chips), data.labels
    weight = 1 / torch.bincount(labels)[labels].float().sqrt()  # between one vote per photo and one vote per person
    torch.manual_seed(seed)
    network = MobileNet().to(device, memory_format=torch.channels_last).train()
    centres = nn.Parameter((torch.randn(len(data.names), DIMENSION) * 0.1).to(device))
    decay = [p for p in network.parameters() if p.ndim > 1]
    other = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": [*decay, centres], "weight_decay": 0.1}, {"params": other, "weight_decay": 0}]
    optimiser = torch.optim.AdamW(groups, settings["lr"])

    def step(number, draw):
        rows = torch.multinomial(weight, settings["batch"], replacement=True, generator=draw)
        images = augment(torch.from_numpy(chips[rows.numpy()]).float().div_(255), draw).to(device)
        embeddings = network(images.contiguous(memory_format=torch.channels_last))
        loss = margin_loss(embeddings.float(), centres, labels[rows].to(device))
        loop.descend(optimiser, loss, [*network.parameters(), centres], 5.0)
        return {"loss": loss.item()}

    modules = {"network": network, "centres": nn.ParameterList([centres])}
    plan = loop.Plan("mobile", settings, (chips, labels), modules, {"both": optimiser}, step)
    return network, loop.train(plan, out, resume, seed, device)


def write(state: dict, root: loop.Place = None) -> Path:
    """Choose the threshold on pairs of the held-out people and write the shipped file; returns its path.

    state, root: a checkpoint, and the folder with data sets. Raises ``Missing`` without LFW.
    """
    lfw = faces.load("lfw", root)
    network = MobileNet().eval()
    network.load_state_dict(state["modules"]["network"])
    held_out = lfw.people(split(lfw, state["run"]["seed"])[1])
    every = pairs.all_pairs(held_out)
    chosen = pairs.sample(every, min(1000, int(every.same.sum())))
    recogniser = recognisers.Recogniser("mobile", network, 1.0, unit=True)
    distances = verification.pair_distances(recogniser, recognisers.embed_all(recogniser, held_out.chips), chosen)
    threshold = torch.tensor(verification.best_threshold(distances, chosen.same))
    kept = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    return weights.ship("mobile", kept | {"threshold": threshold})
