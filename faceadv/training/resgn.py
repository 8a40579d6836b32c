"""Train ResGN on LFW's training people against dlib: `faceadv train resgn`."""

import itertools

import numpy as np
import torch
import torch.nn.functional as F

from faceadv import attacks, recognisers
from faceadv.errors import Invalid
from faceadv.networks.resgn import ResGN
from faceadv.networks.vgg_face import VGGFace
from faceadv.precision import autocast
from faceadv.store import weights
from faceadv.store.paths import cache_root, nearest
from faceadv.training import loop

TERMS = ("pixel", "texture", "verification")
SETTINGS = {
    "smoke": {"blocks": 2, "width": 16, "shrink": 2, "steps": 12, "batch": 8},
    "orl": {"blocks": 2, "width": 32, "shrink": 2, "steps": 60, "batch": 16},
    "lfw": {"blocks": 8, "width": 64, "shrink": 2, "steps": 9000, "batch": 16},
    "paper": {"blocks": 16, "width": 64, "shrink": 1, "steps": 400_000, "batch": 16, "texture": "vgg-face"},
}
ABLATION = {"blocks": 4, "width": 32, "shrink": 2, "batch": 16}  # one network per set of losses, notebook 03
# A training has three parts, in each of which the learning rate rises and falls once. In the first a batch has one kind
# of attack and one eps, and batch norm sees the batch's own means. It learns fast so, but from means that say how the
# batch was attacked, and does worse in use. In the others attacks are mixed within the batch, and batch norm uses its
# running means, as in use.
PARTS = (21, 14, 10)  # their lengths, in proportion
# This share of the first part is pixel loss only, before the other terms join (the paper: 10 epochs). After a much
# longer one the pixels' gradient is small, and the balance gives the other terms a fourteenth.
WARM = 1 / 12
DODGING = 0.65  # share of the examples that dodge, which are the harder ones: pairs lie closer to the threshold
CLEAN = 0.15  # share of the examples that are not attacked
ITERATED = 1 / 3  # share of a mixed batch that is attacked by PGD, the rest by FGSM
MEASURED = 10  # steps at its end over which gradient norms are averaged
MEAN = 50  # steps of a row of the shipped log
LOG = weights.SHIPPED / "resgn.log.jsonl"
FIXED = {"pixel": 1.0, "texture": 1e4, "verification": 1e2}  # of the paper's lab, for other features than ours


def different(squared, tau, top=4.0):
    """s(d), the pair's probability of being different, from squared distances (N,): 0 at 0, 1/2 at tau, 1 at top.

    Two straight pieces, as CleverHans' FaceNet example, from which ResGN's verification loss takes its softmax; 4 is
    the largest squared distance of unit embeddings. tau is the squared threshold.
    """
    near = 0.5 * squared / tau
    far = 0.5 + 0.5 * (squared - tau) / (top - tau)
    return torch.where(squared <= tau, near, far).clamp(0, 1)


def terms(cleaned, legitimate, recogniser, texture=None, names=TERMS):
    """The losses of equations 2 to 4 that ``names`` has, as a dict of scalars.

    cleaned, legitimate: (N, 3, H, W) in [0, 1]; texture: a network whose output is compared (VGG-Face's second fully
    connected layer in the paper), by default ``recogniser.network.maps``, the maps of its last residual block.
    The pair (cleaned, legitimate) is always of one person, so equation 4 is -log(1 - s(d)).
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


def balance(losses, parameters):
    """The gradient norm of each loss in the parameters: weights in inverse proportion give each an equal say."""
    norms = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        norms[name] = torch.stack([g.float().square().sum() for g in gradients if g is not None]).sum().sqrt().item()
    return norms


def adversarial(images, labels, embeddings, rows, recogniser, draw, mixed=True):
    """Fresh adversarial examples of images (N, 3, H, W), rows of a set with ``labels`` and ``embeddings``.

    A share of ``DODGING`` dodges another photo of its person (its own mirror image if it has no other), the rest
    impersonates a random other; a share of ``CLEAN`` stays as it is. eps is 2 to 10 / 255, PGD takes 5 or 10 steps.
    mixed: a share of ``ITERATED`` is attacked by PGD, the rest by FGSM, each image with its own eps; without it all are
    attacked alike, by FGSM in three batches of five. draw: the generator of all.
    """
    dodge = torch.rand(len(rows), generator=draw) < DODGING
    references = []
    for row, away in zip(rows.tolist(), dodge.tolist()):
        candidates = torch.where((labels == labels[row]) == away)[0]
        candidates = candidates[candidates != row]
        if len(candidates):
            pick = candidates[torch.randint(len(candidates), (1,), generator=draw)]
            references.append(embeddings[pick[0]])
        else:
            references.append(None)
    alone = [i for i, reference in enumerate(references) if reference is None]
    if alone:
        with torch.no_grad():
            mirrored = recogniser.embed(images[alone].flip(3), fast=True).cpu()
        for i, reference in zip(alone, mirrored):
            references[i] = reference
    references = torch.stack(references).to(images.device)
    sign = torch.where(dodge, -1.0, 1.0).to(images.device)

    def objective(x, which, exact=False):
        squared = (recogniser.embed(x, fast=not exact) - references[which]).square().sum(1)
        return sign[which] * squared, torch.zeros(len(x), dtype=torch.bool, device=x.device)

    steps = (5, 10)[torch.randint(2, (1,), generator=draw).item()]
    share = ITERATED if mixed else float(torch.rand(1, generator=draw).item() < 0.4)
    iterated, once = torch.arange(len(rows), device=images.device).tensor_split([round(share * len(rows))])
    moved = images.clone()
    eps = (2 + 8 * torch.rand(1, generator=draw).item()) / 255
    seed = torch.randint(2**31, (1,), generator=draw).item()
    if len(iterated):
        moved[iterated] = attacks.pgd(images[iterated], _of(objective, iterated), eps=eps, steps=steps, seed=seed)
    if len(once):
        noise = (attacks.fgsm(images[once], _of(objective, once), eps=1 / 255) - images[once]).sign()
        eps = 2 * 5 ** torch.rand(len(once) if mixed else 1, 1, 1, 1, generator=draw) / 255
        moved[once] = (images[once] + eps.to(images.device) * noise).clamp(0, 1)
    clean = torch.rand(len(rows), generator=draw) < CLEAN
    return torch.where(clean.to(images.device)[:, None, None, None], images, moved)


def _of(objective, part):
    """The objective of some of its rows, which are counted anew."""
    return lambda x, rows, exact=False: objective(x, part[rows], exact)


def train(
    chips,
    labels,
    recogniser,
    *,
    steps,
    batch,
    blocks,
    width,
    shrink,
    losses=(TERMS,),
    fixed=None,
    texture=None,
    out=None,
    resume=False,
    seed=0,
    device="cpu",
    every=100,
    lr=1e-3,
):
    """Train a ResGN for each set of ``losses``, side by side on the same batches from the same start.

    Returns ``(networks, log)``: the networks, frozen in evaluation mode, and a list of dicts, one a step, whose keys
    are "step" and "NAMES: TERM" for each set and term, as "pixel+texture: pixel".

    chips (N, 3, 112, 112) uint8 array and labels (N,) of the training people; losses: tuples of ``TERMS``.
    fixed: their weights as a dict, by default inverse to their gradient norms, measured at the end of a warm-up in
    which pixels alone count. out: a folder for ``last.pt`` (every ``every`` steps) and ``log.jsonl``; with ``resume``
    a killed run goes on from there and ends with the same weights.
    """
    embeddings = recognisers.embed_all(recogniser, chips)
    ends = [round(steps * sum(PARTS[: i + 1]) / sum(PARTS)) for i in range(len(PARTS))]
    warm, first = max(1, int(WARM * ends[0])), ends[0]
    measured = min(MEASURED, warm)
    networks = []
    for _ in losses:
        torch.manual_seed(seed)
        network = ResGN(blocks, width, shrink).to(device)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = min(0.1, 12 / first)  # long enough not to depend on the last few batches' attacks
        networks.append(network)
    optimisers = [torch.optim.Adam(network.parameters(), lr) for network in networks]
    norms = [dict.fromkeys(TERMS, 0.0) for _ in losses]
    start, rows = 0, []
    state = loop.begin(out, resume)
    if state:
        start, norms = state["step"], state["norms"]
        for network, optimiser, weights_, moments in zip(networks, optimisers, state["networks"], state["optimisers"]):
            network.load_state_dict(weights_)
            optimiser.load_state_dict(moments)
    for step in loop.progress(start, steps):
        draw = loop.generator(seed, step)
        chosen = torch.randint(len(chips), (batch,), generator=draw)
        legitimate = torch.from_numpy(chips[chosen.numpy()]).to(device).float().div_(255)
        attacked = adversarial(legitimate, labels, embeddings, chosen, recogniser, draw, step >= first)
        begun, end = next((a, b) for a, b in itertools.pairwise([0, *ends]) if step < b)
        row = {"step": step + 1}
        for network, optimiser, names, norm in zip(networks, optimisers, losses, norms):
            measuring = warm - measured <= step < warm and not fixed
            counted = ("pixel",) if step < warm else names
            network.train(step < first)
            with autocast(device):
                cleaned = network(attacked)
                value = terms(cleaned, legitimate, recogniser, texture, TERMS if measuring else counted)
            if measuring:
                for name, length in balance(value, list(network.parameters())).items():
                    norm[name] += length
            total = sum(_weight(name, norm, fixed, step < warm) * value[name] for name in counted)
            if step == first:
                optimiser.state.clear()  # moments of another task
            for group in optimiser.param_groups:
                group["lr"] = loop.one_cycle(step - begun, end - begun, lr)
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            row |= {f"{'+'.join(names)}: {term}": loss.item() for term, loss in value.items()}
        rows.append(row)
        if out:
            loop.log(out / "log.jsonl", row)
            if (step + 1) % every == 0 or step + 1 == steps:
                state = {
                    "step": step + 1,
                    "networks": [network.state_dict() for network in networks],
                    "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                    "norms": norms,
                    "size": {"blocks": blocks, "width": width, "shrink": shrink},
                }
                loop.save(out / "last.pt", state)
    return [network.eval().requires_grad_(False) for network in networks], rows


def texture_network(name, device="cpu"):
    """What ``train`` takes as ``texture``: None for "recogniser" (its last maps), VGG-Face's fc7 for "vgg-face".

    Raises ``ValueError`` for another name, ``FileNotFoundError`` saying how to get VGG-Face.
    """
    if name not in ("recogniser", "vgg-face"):
        raise Invalid(
            f'The texture is one of recogniser, vgg-face, not "{name}"{nearest(name, ["recogniser", "vgg-face"])}.'
        )
    return VGGFace().to(device) if name == "vgg-face" else None


def _weight(name, norms, fixed, warming):
    """The factor of a loss: 1 for pixels, for the others what makes their gradients as long as the pixels'."""
    if fixed and not warming:
        return fixed[name]
    return norms["pixel"] / norms[name] if norms[name] else 1.0


def main(profile="lfw", resume=False, root=None, out=None, seed=0):
    """Train with the profile's size, checkpointing every 100 steps; returns the folder with the checkpoint and log."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"texture": "recogniser"} | SETTINGS[profile]
    texture = texture_network(settings.pop("texture"), device)
    out = out or cache_root() / "train" / f"resgn-{profile}"
    data = loop.students(root)
    recogniser = recognisers.load("dlib", device)
    train(
        np.array(data.chips),
        data.labels,
        recogniser,
        out=out,
        resume=resume,
        seed=seed,
        device=device,
        texture=texture,
        **settings,
    )
    return out


def trained(folder):
    """The network of a run, finished or not, frozen in evaluation mode."""
    state = loop.resume(folder / "last.pt")
    network = ResGN(**state["size"])
    network.load_state_dict(state["networks"][0])
    return network.eval().requires_grad_(False)


def read_log(path=LOG):
    """The rows of a log, by default of the run that ships: a list of dicts, the mean of every ``MEAN`` steps a row."""
    return loop.read_log(path, 1 if path == LOG else MEAN)


def ship(profile="lfw", out=None):
    """Write the shipped file and log from a finished run's checkpoint; returns the file's path."""
    out = out or cache_root() / "train" / f"resgn-{profile}"
    state = loop.resume(out / "last.pt")
    tensors = {key: v for key, v in state["networks"][0].items() if not key.endswith("num_batches_tracked")}
    loop.write_log(weights.SHIPPED / LOG.name, read_log(out / "log.jsonl"))
    return weights.ship("resgn", tensors | {key: torch.tensor(v) for key, v in state["size"].items()})
