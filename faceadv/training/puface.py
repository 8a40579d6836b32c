"""The recipe of PuFace: `faceadv train puface`."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from faceadv import cloaks, recognisers
from faceadv.networks.puface import PuFace
from faceadv.precision import autocast, send
from faceadv.recognisers import Recogniser
from faceadv.store import weights
from faceadv.training import loop

__all__ = ["SETTINGS", "amplify", "cloaked_photos", "photos", "terms", "train", "write"]

# Weight of the feature loss. With 0.1 the network still returned its input after 600 steps, because returning the
# input already makes the image loss small.
BETA = 1.0
KAPPA = (1.0, 2.0)  # a cloak is amplified by a factor drawn from here; a LowKey cloak times 4 leaves no face
SETTINGS = {"lfw": {"widths": (48, 96, 192), "steps": 1600, "batch": 16, "lr": 1e-3, "beta": BETA, "kappa": KAPPA}}
SETTINGS["lfw"] |= {"photos": 960, "cloak_steps": 40}
SETTINGS["smoke"] = SETTINGS["orl"] = SETTINGS["lfw"] | {"photos": 8, "cloak_steps": 2, "steps": 6, "batch": 4}
SETTINGS["paper"] = SETTINGS["lfw"] | {"photos": 9525, "cloak_steps": None, "steps": 100_000, "batch": 32}
NATURAL = 0.5  # share of photos without a cloak
MODES = ("low", "mid", "high")
PART = 48  # photos that are cloaked alike


def amplify(images: torch.Tensor, cloaked: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """clip(x + factor (x_c - x)): cloaks made stronger, or none at factor 0.

    Parameters
    ----------
    images, cloaked : the photos x and their cloaked versions x_c, (N, 3, H, W) in [0, 1]
    factor : a number, or (N,) with one for each photo
    """
    factor = torch.as_tensor(factor, dtype=images.dtype, device=images.device).reshape(-1, 1, 1, 1)
    return (images + factor * (cloaked - images)).clamp(0, 1)


def terms(purified: torch.Tensor, natural: torch.Tensor, extractors: Sequence[Recogniser]) -> dict[str, torch.Tensor]:
    """The losses "image", mean |P - x|, and "feature", 1 - cos(F(P), F(x)) as a mean over the extractors F; scalars.

    Parameters
    ----------
    purified, natural : P and x, (N, 3, H, W) in [0, 1]
    extractors : the recognisers F
    """
    feature = 0.0
    for extractor in extractors:
        with torch.no_grad():
            wanted = extractor.embed(natural, fast=True)
        feature = feature + (1 - F.cosine_similarity(extractor.embed(purified, fast=True), wanted)).mean()
    return {"image": (purified - natural).abs().mean(), "feature": feature / len(extractors)}


def cloaked_photos(images: torch.Tensor, extractors: Sequence[Recogniser], steps: int | None) -> torch.Tensor:
    """Cloaked versions of images: LowKey and Fawkes in turn, Fawkes with each mode and extractor in turn.

    They are cached in parts of ``PART`` photos, so that a killed run goes on. Each part has another seed, far from
    those of the notebooks: otherwise a purifier could learn the noise that the cloaks start from.

    Parameters
    ----------
    images : (N, 3, H, W) float32 in [0, 1], as is the result
    extractors : the recognisers that the cloaks are made for
    steps : of each cloak's optimisation; None for the number that was published
    """
    parts = []
    for number, piece in enumerate(images.split(PART)):
        options = {"seed": 10_000 + number} | ({} if steps is None else {"steps": steps})
        if number % 2:
            cloak, used, label = cloaks.lowkey, extractors, cloaks.perceptual()[0]
        else:
            cloak, used, label = cloaks.fawkes, [extractors[number // 2 // len(MODES) % len(extractors)]], ""
            options["mode"] = MODES[number // 2 % len(MODES)]
        make = functools.partial(cloak, extractors=used, **options)
        parts.append(cloaks.cached(f"{cloak.__name__} {label} {options}", make, piece, used))
    return torch.cat(parts)


def photos(
    profile: str = "lfw", root: loop.Place = None, seed: int = 0, device: loop.Device = "cpu"
) -> tuple[np.ndarray, np.ndarray, list[Recogniser]]:
    """What a profile learns from: ``(natural, cloaked, extractors)``, the first arguments of ``train``.

    Parameters
    ----------
    profile : a key of ``SETTINGS``, which says how many photos there are
    root : folder with data sets; by default ``FACEADV_DATA``
    seed, device : the seed draws the photos; the device makes their cloaks
    """
    people, settings = loop.students(root), SETTINGS[profile]
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(seed))[: settings["photos"]]
    data = people[order.sort().values.numpy()]
    extractors = [recognisers.load(name, device) for name in ("dlib", "mobilefacenet")]
    cloaked = cloaked_photos(data.images.to(device), extractors, settings["cloak_steps"])
    return np.asarray(data.chips), (cloaked * 255).round().byte().cpu().numpy(), extractors


def train(
    natural: np.ndarray,
    cloaked: np.ndarray,
    extractors: Sequence[Recogniser],
    settings: dict,
    *,
    out: loop.Place = None,
    resume: bool = False,
    seed: int = 0,
    device: loop.Device = "cpu",
) -> tuple[PuFace, list[dict]]:
    """Train PuFace on pairs of photos; returns ``(network, log)``, the network frozen.

    Parameters
    ----------
    natural, cloaked : the photos and their cloaked versions, (N, 3, 112, 112) uint8
    extractors : the recognisers of the feature loss
    settings : "steps", "batch", "lr" (the peak), "widths", "beta" (weight of the feature loss; None: no image loss),
        "kappa" (range of amplification; (1, 1): none); what is missing is as in the profile lfw
    out, resume, seed, device : as for ``loop.train``, with its errors
    """
    settings = loop.complete(settings, SETTINGS)
    batch, beta, kappa = settings["batch"], settings["beta"], settings["kappa"]
    torch.manual_seed(seed)
    network = PuFace(tuple(settings["widths"])).to(device).train()
    optimiser = torch.optim.Adam(network.parameters(), settings["lr"])

    def step(number, draw):
        chosen = torch.randint(len(natural), (batch,), generator=draw)
        x, c = (send(a[chosen.numpy()], device).float().div_(255) for a in (natural, cloaked))
        factor = kappa[0] + (kappa[1] - kappa[0]) * torch.rand(batch, generator=draw)
        factor = torch.where(torch.rand(batch, generator=draw) < NATURAL, torch.zeros(batch), factor)
        flip = torch.rand(batch, generator=draw) < 0.5
        amplified = amplify(x, c, factor)
        x, amplified = (torch.where(flip.to(device)[:, None, None, None], a.flip(3), a) for a in (x, amplified))
        with autocast(device):
            value = terms(network(amplified), x, extractors)
        loop.descend(optimiser, value["feature"] if beta is None else value["image"] + beta * value["feature"])
        return {name: loss.item() for name, loss in value.items()}

    data = natural, cloaked, list(extractors)
    plan = loop.Plan("puface", settings, data, {"network": network}, {"network": optimiser}, step)
    return network, loop.train(plan, out, resume, seed, device)


def write(state: dict, root: loop.Place = None) -> Path:
    """Write the shipped file, with the network's widths, from a checkpoint; returns its path. root is not needed."""
    return weights.ship("puface", state["modules"]["network"] | {"widths": torch.tensor(state["run"]["widths"])})
