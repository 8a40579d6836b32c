"""The recipe of ResGN, against dlib's recogniser: `faceadv train resgn`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from faceadv import attacks, faces, objectives, recognisers
from faceadv.errors import Invalid
from faceadv.networks.resgn import ResGN
from faceadv.networks.vgg_face import VGGFace
from faceadv.precision import autocast, send
from faceadv.recognisers import Recogniser
from faceadv.store import cache, progress, weights
from faceadv.store.paths import nearest
from faceadv.training import loop

__all__ = ["ABLATION", "BUDGETS", "DODGING", "KINDS", "LOG", "PART", "SETTINGS", "TERMS", "TEXTURES", "WEIGHTS"]
__all__ += ["batches", "build", "different", "learner", "photos", "read_log", "stored", "terms", "texture_network"]
__all__ += ["train", "trained", "write"]

TERMS = ("pixel", "texture", "verification")
# alpha, beta and gamma of equation 1: after 30 steps of pixels alone they make the three gradients about equally long
WEIGHTS = {"pixel": 1000.0, "texture": 80.0, "verification": 20.0}
TEXTURES = {"recogniser": 80.0, "mobilefacenet": 3.5}  # beta depends on the scale of the features
SETTINGS = {"lfw": {"blocks": 8, "width": 64, "shrink": 2, "steps": 9000, "batch": 16, "lr": 1e-3, "stored": 6}}
SETTINGS["lfw"] |= {"clean": 0.15, "losses": (TERMS,), "weights": WEIGHTS, "texture": "recogniser"}
SETTINGS["smoke"] = SETTINGS["lfw"] | {"blocks": 2, "width": 16, "steps": 12, "batch": 8, "stored": 1}
SETTINGS["orl"] = SETTINGS["lfw"] | {"blocks": 2, "width": 32, "steps": 60, "stored": 1}
SETTINGS["paper"] = SETTINGS["lfw"] | {"blocks": 16, "shrink": 1, "steps": 400_000, "texture": "vgg-face"}
ABLATION = {"blocks": 8, "width": 48, "shrink": 2, "batch": 16}  # one network for each set of losses, notebook 03
# The attacks of the stored variants, in turn. Half of them take one step, as the paper's probably did.
KINDS = ("FGSM", "PGD-10", "I-FGSM", "PGD-5", "FGSM", "FGSM")
BUDGETS = (2, 10)  # from and to, in levels of 255: whole ones, so that rounding to 8 bits keeps them
DODGING = 0.65  # share of the attacks that dodge; they are harder, because their pairs are closer to the threshold
PART = 256  # photos that are attacked at a time, by one kind of attack and with one budget
LOG = weights.SHIPPED / "resgn.log.jsonl"


def different(squared: torch.Tensor, tau: float) -> torch.Tensor:
    """s(d), a pair's probability of being different, from squared distances (N,): 0 at 0, 1/2 at tau, 1 at 4.

    Two straight pieces, as in CleverHans' FaceNet example, from which ResGN's verification loss takes its softmax. tau
    is the squared threshold; 4 is the largest squared distance of unit embeddings.
    """
    near = 0.5 * squared / tau
    far = 0.5 + 0.5 * (squared - tau) / (4.0 - tau)
    return torch.where(squared <= tau, near, far).clamp(0, 1)


def terms(
    cleaned: torch.Tensor,
    legitimate: torch.Tensor,
    recogniser: Recogniser,
    texture: Callable | None = None,
    names: Sequence[str] = TERMS,
) -> dict[str, torch.Tensor]:
    """The losses of equations 2 to 4 as scalars by name.

    The pair (cleaned, legitimate) is always of one person, so equation 4 is -log(1 - s(d)).

    Parameters
    ----------
    cleaned, legitimate : (N, 3, H, W) in [0, 1]
    recogniser : the one to protect
    texture : gives the features that are compared (in the paper VGG-Face's second fully connected layer); by default
        ``recogniser.network.maps``, the maps of its last residual block
    names : which losses
    """
    value = {}
    if "pixel" in names:
        value["pixel"] = F.mse_loss(cleaned, legitimate)
    if set(names) - {"pixel"}:
        with torch.no_grad():
            target, wanted = _features(legitimate, recogniser, texture, names)
        got, embeddings = _features(cleaned, recogniser, texture, names)
    if "texture" in names:
        value["texture"] = F.mse_loss(got.float(), target.float())
    if "verification" in names:
        same = 1 - different((embeddings - wanted).square().sum(1), recogniser.threshold**2)
        value["verification"] = -same.clamp_min(1e-6).log().mean()
    return {name: value[name] for name in names}


def _features(images, recogniser, texture, names):
    """Texture features and embeddings (N, D) float32; one forward pass gives both if texture is None."""
    if texture is None:
        maps = recogniser.network.maps(images)
        return maps, recogniser.network.embedding(maps).float()
    return (
        texture(images) if "texture" in names else None,
        recogniser.embed(images, fast=True) if "verification" in names else None,
    )


def stored(data: faces.FaceSet, recogniser: Recogniser, count: int) -> list[np.ndarray]:
    """Adversarial examples of all photos, made once and kept in the cache: ``count`` arrays (N, 3, H, W) uint8.

    They do not depend on the generator (a *static* attack), so all networks can learn from the same ones. The arrays
    are memory-mapped. Photos are attacked in random groups of ``PART``; each group has one budget and one goal:
    ``DODGING`` of the photos dodge another photo of their person (their own mirror image if there is none), the others
    impersonate another person. The attack of an array is one of ``KINDS``.

    Parameters
    ----------
    data : whose photos
    recogniser : the one to attack
    count : how many examples of each photo
    """
    device = recognisers.device_of(recogniser)
    facts = [cache.versions(), device.type, recognisers.fingerprint(recogniser), recogniser.unit, recogniser.threshold]
    key = cache.key(*facts, data.chips, data.labels, BUDGETS, DODGING, PART)

    def make(folder, number):
        file = np.lib.format.open_memmap(folder / "array.npy", "w+", np.uint8, data.chips.shape)
        _attack(file, data, recogniser, number, device)
        file.flush()

    homes = [
        cache.entry("attacks", f"{data.name}-{i}-{kind}", cache.key(key, i, kind), lambda folder, i=i: make(folder, i))
        for i, kind in enumerate(KINDS[i % len(KINDS)] for i in range(count))
    ]
    return [np.load(home / "array.npy", mmap_mode="r") for home in homes]


def _attack(made, data, recogniser, number, device):
    """Write one example of each photo into ``made``."""
    embeddings, draw = recognisers.embed_faces(recogniser, data), loop.generator(number, len(data))
    order = torch.randperm(len(data), generator=draw)
    cut = round(DODGING * len(data))
    parts = [("dodging", part) for part in order[:cut].split(PART)]
    parts += [("impersonation", part) for part in order[cut:].split(PART)]
    for goal, part in progress.bar(parts, desc=f"attacking, {KINDS[number % len(KINDS)]}", unit="group"):
        x = send(np.asarray(data.chips[part.numpy()]), device).float().div_(255)
        partners = torch.tensor([_partner(row, data.labels, goal == "dodging", draw) for row in part.tolist()])
        references, alone = embeddings[partners], partners == part
        if alone.any():
            references[alone] = recognisers.embed_all(recogniser, x[alone.to(device)].flip(3))
        objective = getattr(objectives, goal)(recogniser, references)
        eps = torch.randint(BUDGETS[0], BUDGETS[1] + 1, (1,), generator=draw).item() / 255
        seed = torch.randint(2**31, (1,), generator=draw).item()
        moved = _run(KINDS[number % len(KINDS)], x, objective, eps, seed)
        made[part.numpy()] = moved.mul(255).round().byte().cpu().numpy()


def _partner(row, labels, same, draw):
    """A random photo of the same or of another person; the photo itself if there is none."""
    others = torch.where((labels == labels[row]) == same)[0]
    others = others[others != row]
    return others[torch.randint(len(others), (1,), generator=draw)].item() if len(others) else row


def _run(kind, x, objective, eps, seed):
    name, _, steps = kind.partition("-")
    batch = PART if x.device.type == "cuda" else 64
    if name == "FGSM":
        return attacks.fgsm(x, objective, eps=eps, batch=batch)
    if name == "I":  # I-FGSM
        return attacks.ifgsm(x, objective, eps=eps, steps=5, batch=batch)
    return attacks.pgd(x, objective, eps=eps, steps=int(steps), seed=seed, batch=batch)


def batches(
    chips: np.ndarray, examples: Sequence[np.ndarray], settings: dict, device: loop.Device = "cpu"
) -> Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]]:
    """A function of a random generator that draws ``(attacked, legitimate)``, (N, 3, H, W) in [0, 1] each.

    A share of the attacked images is legitimate too; half of all pairs are mirrored.

    Parameters
    ----------
    chips : the photos, (M, 3, H, W) uint8
    examples : of ``stored``
    settings : "batch", and "clean", the share of images that are not attacked
    device : where the batches are wanted
    """
    sources = [*examples, chips]

    def draw_batch(draw):
        count = settings["batch"]
        rows = torch.randint(len(chips), (count,), generator=draw).numpy()
        which = torch.randint(len(examples), (count,), generator=draw)
        which[torch.rand(count, generator=draw) < settings["clean"]] = len(examples)
        mirrored = torch.rand(count, 1, 1, 1, generator=draw) < 0.5
        attacked = np.stack([sources[i][row] for i, row in zip(which.tolist(), rows)])
        pair = send(np.concatenate([attacked, chips[rows]]), device).float().div_(255)
        pair = torch.where(mirrored.repeat(2, 1, 1, 1).to(device), pair.flip(3), pair)
        return pair[:count], pair[count:]

    return draw_batch


def build(settings: dict, seed: int = 0) -> ResGN:
    """The network before training: settings "blocks", "width" and "shrink"; the seed draws its weights."""
    torch.manual_seed(seed)
    return ResGN(settings["blocks"], settings["width"], settings["shrink"])


def learner(
    network: ResGN, optimiser: torch.optim.Optimizer, recogniser: Recogniser, texture: Callable | None,
    factors: dict[str, float], device: loop.Device = "cpu",
) -> Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]:  # fmt: skip
    """A function of ``(attacked, legitimate)`` that makes one step of training and returns the losses, detached.

    Parameters
    ----------
    network, optimiser : what learns
    recogniser, texture : as for ``terms``
    factors : the weight of each loss that counts, equation 1
    device : where
    """
    network.train()

    def learn(attacked, legitimate):
        with autocast(device):
            value = terms(network(attacked), legitimate, recogniser, texture, tuple(factors))
            total = sum(factor * value[name] for name, factor in factors.items())
        loop.descend(optimiser, total)
        return {name: loss.detach() for name, loss in value.items()}

    return learn


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
    data: faces.FaceSet, recogniser: Recogniser, settings: dict, *, out: loop.Place = None, resume: bool = False,
    seed: int = 0, device: loop.Device = "cpu",
) -> tuple[list[ResGN], list[dict]]:  # fmt: skip
    """Train a ResGN for each set of losses, side by side on the same batches from the same start.

    Returns ``(networks, log)``: the networks, frozen, and the log, whose keys are "step" and "NAMES: TERM" for each set
    and term, for example "pixel+texture: pixel".

    Parameters
    ----------
    data : the people to learn from
    recogniser : the one to protect
    settings : "steps", "batch", "lr" (the peak), "blocks", "width", "shrink"; "stored" (adversarial examples of each
        photo, see ``stored``), "clean" (share of a batch that is not attacked), "losses" (tuples of ``TERMS``),
        "weights" (of the losses, equation 1), "texture" (see ``texture_network``); what is missing is as in the profile
        lfw
    out, resume, seed, device : as for ``loop.train``, with its errors
    """
    settings = loop.complete(settings, SETTINGS)
    texture = texture_network(settings["texture"], device)
    chips = np.asarray(data.chips)
    draw_batch = batches(chips, stored(data, recogniser, settings["stored"]), settings, device)
    losses = {"+".join(names): {name: settings["weights"][name] for name in names} for names in settings["losses"]}
    networks = {name: build(settings, seed).to(device) for name in losses}
    optimisers = {name: torch.optim.Adam(network.parameters(), settings["lr"]) for name, network in networks.items()}
    learners = {
        name: learner(networks[name], optimisers[name], recogniser, texture, factors, device)
        for name, factors in losses.items()
    }

    def step(number, draw):
        batch = draw_batch(draw)
        made = {name: learn(*batch) for name, learn in learners.items()}
        return {f"{name}: {term}": loss.item() for name, value in made.items() for term, loss in value.items()}

    plan = loop.Plan("resgn", settings, (chips, data.labels, recogniser), networks, optimisers, step)
    return list(networks.values()), loop.train(plan, out, resume, seed, device)


def texture_network(name: str, device: loop.Device = "cpu") -> Callable | None:
    """What gives the features of the texture loss.

    None for "recogniser" (``terms`` takes its last maps); for "mobilefacenet" the last maps of a network that is not
    attacked; for "vgg-face" VGG-Face's fc7, as in the paper. Raises ``Invalid`` for another name, ``Missing`` saying
    how to get VGG-Face.
    """
    names = ("recogniser", "mobilefacenet", "vgg-face")
    if name not in names:
        raise Invalid(f'The texture is one of {", ".join(names)}, not "{name}"{nearest(name, names)}.')
    if name == "mobilefacenet":
        return recognisers.load(name, device).network.maps
    return VGGFace().to(device) if name == "vgg-face" else None


def trained(folder: str | Path) -> ResGN:
    """The network of a run, finished or not, frozen. Errors as for ``loop.checkpoint``."""
    state = loop.checkpoint(folder)
    network = ResGN(**{key: state["run"][key] for key in ("blocks", "width", "shrink")})
    network.load_state_dict(next(iter(state["modules"].values())))
    return network.eval().requires_grad_(False)


def read_log(path: loop.Place = LOG) -> list[dict]:
    """The rows of a log, by default of the run that ships; each is the mean of ``loop.MEAN`` steps."""
    return loop.read_log(path, 1 if path == LOG else loop.MEAN)


def write(state: dict, root: loop.Place = None) -> Path:
    """Write the shipped file, with the network's sizes, from a checkpoint; returns its path. root is not needed."""
    tensors = next(iter(state["modules"].values()))
    sizes = {key: torch.tensor(state["run"][key]) for key in ("blocks", "width", "shrink")}
    return weights.ship("resgn", {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")} | sizes)
