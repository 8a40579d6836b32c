"""The recipe of A3GN, against dlib's recogniser: `faceadv train a3gn`."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from faceadv import faces, pairs, recognisers
from faceadv.networks.a3gn import A3GN, Discriminator
from faceadv.precision import autocast, send
from faceadv.recognisers import Recogniser
from faceadv.store import weights
from faceadv.training import loop

__all__ = ["LOG", "MARGIN", "SETTINGS", "WEIGHTS", "generator_terms", "hinge", "photos", "train", "write"]

# If the discriminators have ten times this weight, the generator satisfies them before it learns whose face to make.
WEIGHTS = {"cosine": 10.0, "reconstruction": 50.0, "adversarial": 0.01, "instance": 0.01, "kl": 0.01}
# Mean absolute change that costs nothing (the hinge of AdvGAN, Xiao et al. 2018, equation 3). With a plain L1 loss the
# generator learns to change nothing, because the first small changes cost more than they gain.
MARGIN = 0.03
NETWORK = {"width": 32, "blocks": 4, "cvae": True, "attention": True, "begin": None}
SETTINGS = {"lfw": NETWORK | {"steps": 5000, "batch": 16, "lr": 1e-3, "factors": WEIGHTS, "margin": MARGIN}}
SETTINGS["smoke"] = SETTINGS["orl"] = SETTINGS["lfw"] | {"width": 8, "blocks": 2, "steps": 6, "batch": 4}
SETTINGS["paper"] = SETTINGS["lfw"] | {"width": 64, "blocks": 6, "steps": 100_000}
SHEET = 8  # faces on a sample sheet
LOG = weights.SHIPPED / "a3gn.log.jsonl"


def generator_terms(
    made: torch.Tensor,
    images: torch.Tensor,
    code: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    wanted: torch.Tensor,
    recogniser: Recogniser,
    judges: tuple[Discriminator | None, Discriminator | None] = (None, None),
    targets: torch.Tensor | None = None,
    margin: float = MARGIN,
) -> dict[str, torch.Tensor]:
    """The generator's losses as scalars by name.

    Parameters
    ----------
    made, images : G(x, z) and x, (N, 3, H, W) in [0, 1]
    code : what ``A3GN.code`` gives; "kl" is the divergence of q(z | y) from N(0, I)
    wanted : embeddings of the targets, (N, D); "cosine" is 1 - cos(F(G), F(y))
    recogniser : F
    judges : the normal and the instance discriminator; None leaves its loss out
    targets : the targets' photos (N, 3, H, W), for the instance discriminator
    margin : "reconstruction" is the mean absolute change beyond it
    """
    value = {"reconstruction": F.relu((made - images).abs().mean((1, 2, 3)) - margin).mean()}
    embeddings = recogniser.embed(made, fast=True).float()
    value["cosine"] = (1 - F.cosine_similarity(embeddings, wanted)).mean()
    normal, instance = judges
    if normal is not None:
        value["adversarial"] = -normal(made).mean()
    if instance is not None:
        value["instance"] = -instance(torch.cat([made, targets], 1)).mean()
    _, mean, log_variance = code
    if mean is not None:
        value["kl"] = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return value


def hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminators' loss: mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake))."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def photos(
    profile: str = "lfw", root: loop.Place = None, seed: int = 0, device: loop.Device = "cpu"
) -> tuple[faces.FaceSet, Recogniser]:
    """What every profile learns from, the first arguments of ``train``: LFW's training people, and the recogniser.

    Parameters
    ----------
    profile : a key of ``SETTINGS``; all learn from the same
    root : folder with data sets; by default ``FACEADV_DATA``
    seed, device : where the recogniser is; the seed is not needed
    """
    return loop.students(root), recognisers.load("dlib", device)


def train(
    data: faces.FaceSet,
    recogniser: Recogniser,
    settings: dict,
    *,
    out: loop.Place = None,
    resume: bool = False,
    seed: int = 0,
    device: loop.Device = "cpu",
) -> tuple[A3GN, list[dict]]:
    """Train a generator and its discriminators; returns ``(generator, log)``, the generator frozen.

    Parameters
    ----------
    data : the people; each batch draws sources and, for each, a target of another person
    recogniser : the one to attack
    settings : "steps", "batch", "lr" (the peak), "width", "blocks", "cvae" and "attention" (False: without), "factors"
        (weights of the losses; 0 leaves one out and its discriminator untrained), "margin" (the mean change that costs
        nothing), "begin" (a generator's state to start from); what is missing is as in the profile lfw
    out, resume, seed, device : as for ``loop.train``, with its errors; beside each checkpoint lies a sheet of samples
    """
    settings = loop.complete(settings, SETTINGS)
    chips, factors, seen = np.asarray(data.chips), settings["factors"], {}
    embeddings = recognisers.embed_faces(recogniser, data)
    modules, optimisers = _networks(settings, embeddings, seed, device)
    generator = modules["generator"]
    used = {n: modules[n] for n, loss in (("normal", "adversarial"), ("instance", "instance")) if factors.get(loss)}

    def step(number, draw):
        chosen = pairs.triples(data.labels, settings["batch"], draw)
        x, y, o = (send(chips[rows.numpy()], device).float().div_(255) for rows in chosen)
        wanted = embeddings[chosen[1]].to(device)
        with autocast(device):
            code = generator.code(wanted, draw)
            made = generator.generate(x, code[0])
            judges = used.get("normal"), used.get("instance")
            value = generator_terms(made, x, code, wanted, recogniser, judges, y, settings["margin"])
        loop.descend(optimisers["generator"], sum(factors.get(name, 0) * loss for name, loss in value.items()))
        made = made.detach()
        seen["images"] = x, made, y
        sides = {
            "normal": (x, made),
            # real: another photo of the target; fake: what was made for it, or somebody else
            "instance": (torch.cat([o, y], 1), torch.cat([torch.cat([made, y], 1), torch.cat([x, y], 1)])),
        }
        for name, discriminator in used.items():
            with autocast(device):
                value[f"{name} discriminator"] = hinge(*map(discriminator, sides[name]))
            loop.descend(optimisers[name], value[f"{name} discriminator"])
        return {name: loss.item() for name, loss in value.items()}

    def sheet():
        from torchvision.utils import make_grid  # takes seconds

        x, made, y = (images[:SHEET] for images in seen["images"])
        return make_grid(torch.cat([x, made, 0.5 + 5 * (made - x), y]), len(x))

    plan = loop.Plan("a3gn", settings, (chips, data.labels, recogniser), modules, optimisers, step, sheet=sheet)
    return generator, loop.train(plan, out, resume, seed, device)


def _networks(settings, embeddings, seed, device):
    """The generator, the discriminators and their optimisers, each by name."""
    torch.manual_seed(seed)
    width = settings["width"]
    generator = A3GN(embeddings.shape[1], width, settings["blocks"], settings["cvae"], settings["attention"])
    modules = {"generator": generator, "normal": Discriminator(3, width), "instance": Discriminator(6, width)}
    generator.mean.copy_(embeddings.mean(0))
    generator.spread.copy_(embeddings.std(0))
    if settings["begin"]:
        generator.load_state_dict(settings["begin"])
    optimisers = {}
    for name, module in modules.items():
        betas = (0.9 if name == "generator" else 0.5, 0.999)
        optimisers[name] = torch.optim.Adam(module.to(device).train().parameters(), settings["lr"], betas=betas)
    return modules, optimisers


def write(state: dict, root: loop.Place = None) -> Path:
    """Write the shipped file, with the generator's sizes, from a checkpoint; returns its path. root is not needed."""
    sizes = {key: torch.tensor(state["run"][key]) for key in ("width", "blocks")}
    return weights.ship("a3gn", state["modules"]["generator"] | sizes)
