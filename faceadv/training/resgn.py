"""The recipe of ResGN, against dlib's recogniser: `faceadv train resgn`."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from faceadv import attacks, faces, recognisers
from faceadv.errors import Invalid
from faceadv.networks.resgn import ResGN
from faceadv.networks.vgg_face import VGGFace
from faceadv.precision import autocast, send
from faceadv.recognisers import Recogniser
from faceadv.store import weights
from faceadv.store.paths import nearest
from faceadv.training import loop

__all__ = ["ABLATION", "FIXED", "LOG", "PARTS", "SETTINGS", "TERMS", "WARM", "adversarial", "balance", "different"]
__all__ += ["photos", "read_log", "terms", "texture_network", "train", "trained", "write"]

TERMS = ("pixel", "texture", "verification")
SETTINGS = {"lfw": {"blocks": 8, "width": 64, "shrink": 2, "steps": 9000, "batch": 16, "lr": 1e-3}}
SETTINGS["lfw"] |= {"losses": (TERMS,), "fixed": None, "texture": "recogniser"}
SETTINGS["smoke"] = SETTINGS["lfw"] | {"blocks": 2, "width": 16, "steps": 12, "batch": 8}
SETTINGS["orl"] = SETTINGS["lfw"] | {"blocks": 2, "width": 32, "steps": 60}
SETTINGS["paper"] = SETTINGS["lfw"] | {"blocks": 16, "shrink": 1, "steps": 400_000, "texture": "vgg-face"}
ABLATION = {"blocks": 4, "width": 32, "shrink": 2, "batch": 16}  # one network for each set of losses, notebook 03
# A training has three parts, in each of which the learning rate rises and falls once. In the first a batch has one kind
# of attack and one eps, and batch norm sees the batch's own means. The network learns fast that way, but from means
# that tell how the batch was attacked, and does worse in use. In the other parts attacks are mixed within the batch,
# and batch norm uses its running means, as in use.
PARTS = (21, 14, 10)  # their lengths, in proportion
# In this share of the first part only the pixel loss counts; then the other losses join. (The paper: 10 epochs.)
# At the end of a much longer warm-up the gradient of the pixel loss is small. Since the weights of the other losses are
# in proportion to it, they were 14 times smaller then.
WARM = 1 / 12
DODGING = 0.65  # share of the examples that dodge; they are harder, because their pairs are closer to the threshold
CLEAN = 0.15  # share of the examples that are not attacked
ITERATED = 1 / 3  # share of a mixed batch that is attacked by PGD; the rest is attacked by FGSM
MEASURED = 10  # gradient norms are averaged over so many steps at the end of the warm-up
LOG = weights.SHIPPED / "resgn.log.jsonl"
FIXED = {"pixel": 1.0, "texture": 1e4, "verification": 1e2}  # of the paper's lab, for other features than ours


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
    texture: torch.nn.Module | None = None,
    names: Sequence[str] = TERMS,
) -> dict[str, torch.Tensor]:
    """The losses of equations 2 to 4 as scalars by name.

    The pair (cleaned, legitimate) is always of one person, so equation 4 is -log(1 - s(d)).

    Parameters
    ----------
    cleaned, legitimate : (N, 3, H, W) in [0, 1]
    recogniser : the one to protect
    texture : a network whose output is compared (in the paper VGG-Face's second fully connected layer); by default
        ``recogniser.network.maps``, the maps of its last residual block
    names : which losses
    """
    value = {"pixel": F.mse_loss(cleaned, legitimate)}
    if set(names) != {"pixel"}:
        with torch.no_grad():
            target, wanted = _features(legitimate, recogniser, texture)
        got, embeddings = _features(cleaned, recogniser, texture)
        same = 1 - different((embeddings - wanted).square().sum(1), recogniser.threshold**2)
        value["texture"] = F.mse_loss(got.float(), target.float())
        value["verification"] = -same.clamp_min(1e-6).log().mean()
    return {name: value[name] for name in names}


def _features(images, recogniser, texture):
    """Texture features and embeddings (N, D) float32; one forward pass gives both if texture is None."""
    if texture is None:
        maps = recogniser.network.maps(images)
        return maps, recogniser.network.embedding(maps).float()
    return texture(images), recogniser.embed(images, fast=True)


def balance(losses: dict[str, torch.Tensor], parameters: Sequence[torch.Tensor]) -> dict[str, float]:
    """The gradient norm of each loss in the parameters: weights in inverse proportion give each an equal say."""
    norms = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        norms[name] = torch.stack([g.float().square().sum() for g in gradients if g is not None]).sum().sqrt().item()
    return norms


def adversarial(
    images: torch.Tensor,
    labels: torch.Tensor,
    embeddings: torch.Tensor,
    rows: torch.Tensor,
    recogniser: Recogniser,
    draw: torch.Generator,
    mixed: bool = True,
) -> torch.Tensor:
    """Fresh adversarial examples of some images of a set, of the same shape and range.

    A share of ``DODGING`` dodges another photo of its person (its own mirror image if there is no other), the others
    impersonate a random other person; a share of ``CLEAN`` stays as it is. eps is 2 to 10 / 255, PGD takes 5 or 10
    steps. With ``mixed`` a share of ``ITERATED`` is attacked by PGD and the rest by FGSM, each image with its own eps;
    without it the whole batch is attacked alike, by FGSM in three of five batches.

    Parameters
    ----------
    images : (N, 3, H, W) in [0, 1]
    labels, embeddings : of the whole set, (M,) and (M, D)
    rows : (N,), the places of the images in the set
    recogniser : the one to attack
    draw : where all random numbers come from
    mixed : see above
    """
    dodge = torch.rand(len(rows), generator=draw) < DODGING
    references, alone = torch.empty(len(rows), embeddings.shape[1]), []
    for i, (row, away) in enumerate(zip(rows.tolist(), dodge.tolist())):
        candidates = torch.where((labels == labels[row]) == away)[0]
        candidates = candidates[candidates != row]
        if len(candidates):
            references[i] = embeddings[candidates[torch.randint(len(candidates), (1,), generator=draw)[0]]]
        else:
            alone.append(i)
    if alone:
        with torch.no_grad():
            references[alone] = recogniser.embed(images[alone].flip(3), fast=True).cpu()
    references, sign = references.to(images.device), torch.where(dodge, -1.0, 1.0).to(images.device)

    def attack(part):  # its objective, whose rows are counted within the part
        def objective(x, which, exact=False):
            squared = (recogniser.embed(x, fast=not exact) - references[part[which]]).square().sum(1)
            return sign[part[which]] * squared, torch.zeros(len(x), dtype=torch.bool, device=x.device)

        return objective

    steps = (5, 10)[torch.randint(2, (1,), generator=draw).item()]
    share = ITERATED if mixed else float(torch.rand(1, generator=draw).item() < 0.4)
    iterated, once = torch.arange(len(rows), device=images.device).tensor_split([round(share * len(rows))])
    moved = images.clone()
    eps = (2 + 8 * torch.rand(1, generator=draw).item()) / 255
    seed = torch.randint(2**31, (1,), generator=draw).item()
    if len(iterated):
        moved[iterated] = attacks.pgd(images[iterated], attack(iterated), eps=eps, steps=steps, seed=seed)
    if len(once):
        noise = (attacks.fgsm(images[once], attack(once), eps=1 / 255) - images[once]).sign()
        eps = 2 * 5 ** torch.rand(len(once) if mixed else 1, 1, 1, 1, generator=draw) / 255
        moved[once] = (images[once] + eps.to(images.device) * noise).clamp(0, 1)
    clean = torch.rand(len(rows), generator=draw) < CLEAN
    return torch.where(clean.to(images.device)[:, None, None, None], images, moved)


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
    settings : "steps", "batch", "lr" (the peak), "blocks", "width", "shrink"; "losses" (tuples of ``TERMS``), "fixed"
        (their weights; None: inverse to the gradient norms, measured at the end of a warm-up in which pixels alone
        count), "texture" (see ``texture_network``); what is missing is as in the profile lfw
    out, resume, seed, device : as for ``loop.train``, with its errors
    """
    settings = loop.complete(settings, SETTINGS)
    chips, steps, fixed = np.asarray(data.chips), settings["steps"], settings["fixed"]
    texture, embeddings = texture_network(settings["texture"], device), recognisers.embed_faces(recogniser, data)
    ends = [round(steps * sum(PARTS[: i + 1]) / sum(PARTS)) for i in range(len(PARTS))]
    warm, first = max(1, int(WARM * ends[0])), max(1, ends[0])
    losses = {"+".join(names): tuple(names) for names in settings["losses"]}
    networks = {name: _network(settings, first, seed).to(device) for name in losses}
    optimisers = {name: torch.optim.Adam(network.parameters(), settings["lr"]) for name, network in networks.items()}
    norms = {name: dict.fromkeys(TERMS, 0.0) for name in losses}

    def one(name, number, attacked, legitimate):
        measuring = warm - min(MEASURED, warm) <= number < warm and not fixed
        counted = ("pixel",) if number < warm else losses[name]
        networks[name].train(number < first)
        with autocast(device):
            cleaned = networks[name](attacked)
            value = terms(cleaned, legitimate, recogniser, texture, TERMS if measuring else counted)
        if measuring:
            for term, length in balance(value, list(networks[name].parameters())).items():
                norms[name][term] += length
        if number == first:
            optimisers[name].state.clear()  # moments of another task
        factors = fixed if fixed and number >= warm else _factors(norms[name])
        loop.descend(optimisers[name], sum(factors[term] * value[term] for term in counted))
        return {f"{name}: {term}": loss.item() for term, loss in value.items()}

    def step(number, draw):
        chosen = torch.randint(len(chips), (settings["batch"],), generator=draw)
        legitimate = send(chips[chosen.numpy()], device).float().div_(255)
        attacked = adversarial(legitimate, data.labels, embeddings, chosen, recogniser, draw, number >= first)
        return {key: loss for name in losses for key, loss in one(name, number, attacked, legitimate).items()}

    def rate(number):
        begun, end = next((a, b) for a, b in itertools.pairwise([0, *ends]) if number < b)
        return loop.one_cycle(number - begun, end - begun, settings["lr"])

    plan = loop.Plan("resgn", settings, (chips, data.labels, recogniser), networks, optimisers, step, rate, norms)
    return list(networks.values()), loop.train(plan, out, resume, seed, device)


def _network(settings, first, seed):
    torch.manual_seed(seed)
    network = ResGN(settings["blocks"], settings["width"], settings["shrink"])
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = min(0.1, 12 / first)  # long enough not to depend on the last few batches' attacks
    return network


def _factors(norms):
    """1 for pixels, for the others what makes their gradients as long as the pixels' (1 until they are measured)."""
    return {name: norms["pixel"] / norm if norm else 1.0 for name, norm in norms.items()}


def texture_network(name: str, device: loop.Device = "cpu") -> VGGFace | None:
    """The network of a texture: None for "recogniser" (its last maps), VGG-Face's fc7 for "vgg-face".

    Raises ``Invalid`` for another name, ``Missing`` saying how to get VGG-Face.
    """
    if name not in ("recogniser", "vgg-face"):
        raise Invalid(f'The texture is recogniser or vgg-face, not "{name}"{nearest(name, ["vgg-face"])}.')
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
