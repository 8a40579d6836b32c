"""Train ResGN on LFW's training people against dlib: `faceadv train resgn`."""

import os

import numpy as np
import torch
from tqdm import trange

from faceadv import attacks, faces, pairs, recognisers, resgn, training, weights
from faceadv.paths import cache_root, nearest
from faceadv.vgg_face import VGGFace

SETTINGS = {
    "smoke": {"blocks": 2, "width": 16, "shrink": 2, "steps": 12, "batch": 8},
    "orl": {"blocks": 2, "width": 32, "shrink": 2, "steps": 60, "batch": 16},
    "lfw": {"blocks": 8, "width": 64, "shrink": 2, "steps": 7000, "batch": 16},
    "paper": {"blocks": 16, "width": 64, "shrink": 1, "steps": 400_000, "batch": 16, "texture": "vgg-face"},
}
ABLATION = {"blocks": 4, "width": 32, "shrink": 2, "batch": 16}  # one network per set of losses, notebook 03
# This share of the steps is pixel loss only, before the other terms join (the paper: 10 epochs). After a longer one,
# 0.4, the pixels' gradient is small, and the balance gives the other terms a fourteenth.
WARM = 0.05
DODGING = 0.65  # share of the examples that dodge, which are the harder ones: pairs lie closer to the threshold
CLEAN = 0.15  # share of the examples that are not attacked
# From this share of the steps on, batch norm uses its running means, as it will in use. Until then it sees each batch's
# own, which say how the batch was attacked: trained so to the end, a network did ten to forty points worse in use.
FROZEN = 0.6
ITERATED = 1 / 3  # share of a batch that is attacked by PGD, the rest by FGSM
MEASURED = 10  # steps at its end over which gradient norms are averaged
FIXED = {"pixel": 1.0, "texture": 1e4, "verification": 1e2}  # of the paper's lab, for other features than ours


def adversarial(images, labels, embeddings, rows, recogniser, draw):
    """Fresh adversarial examples of images (N, 3, H, W), rows of a set with ``labels`` and ``embeddings``.

    A share of ``DODGING`` dodges another photo of its person (its own mirror image if it has no other), the rest
    impersonates a random other. A share of ``ITERATED`` is attacked by PGD of 5 or 10 steps within one eps from 2 to
    10 / 255, the rest by FGSM, each image with its own log eps from there; a share of ``CLEAN`` stays as it is. draw:
    the generator of all.
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

    iterated, once = torch.arange(len(rows), device=images.device).tensor_split([round(ITERATED * len(rows))])
    moved = images.clone()
    steps = (5, 10)[torch.randint(2, (1,), generator=draw).item()]
    eps = (2 + 8 * torch.rand(1, generator=draw).item()) / 255
    seed = torch.randint(2**31, (1,), generator=draw).item()
    moved[iterated] = attacks.pgd(images[iterated], _of(objective, iterated), eps=eps, steps=steps, seed=seed)
    noise = (attacks.fgsm(images[once], _of(objective, once), eps=1 / 255) - images[once]).sign()
    eps = 2 * 5 ** torch.rand(len(once), 1, 1, 1, generator=draw) / 255
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
    losses=(resgn.TERMS,),
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

    chips (N, 3, 112, 112) uint8 array and labels (N,) of the training people; losses: tuples of ``resgn.TERMS``.
    fixed: their weights as a dict, by default inverse to their gradient norms, measured at the end of a warm-up in
    which pixels alone count. out: a folder for ``last.pt`` (every ``every`` steps) and ``log.jsonl``; with ``resume``
    a killed run goes on from there and ends with the same weights.
    """
    embeddings = recognisers.embed_all(recogniser, chips)
    networks = []
    for _ in losses:
        torch.manual_seed(seed)
        networks.append(resgn.ResGN(blocks, width, shrink).to(device).train())
    optimisers = [torch.optim.Adam(network.parameters(), lr) for network in networks]
    norms = [dict.fromkeys(resgn.TERMS, 0.0) for _ in losses]
    start, rows = 0, []
    state = training.resume(out / "last.pt") if out and resume else None
    if state:
        start, norms = state["step"], state["norms"]
        for network, optimiser, weights_, moments in zip(networks, optimisers, state["networks"], state["optimisers"]):
            network.load_state_dict(weights_)
            optimiser.load_state_dict(moments)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        training.trim_log(out / "log.jsonl", start if state else -1)
    kind, half = torch.device(device).type, recognisers.has_bfloat16(device)
    warm = int(WARM * steps)
    measured = max(1, min(MEASURED, warm))
    for step in trange(start, steps, initial=start, total=steps, disable=bool(os.environ.get("FACEADV_QUIET"))):
        draw = training.generator(seed, step)
        chosen = torch.randint(len(chips), (batch,), generator=draw)
        legitimate = torch.from_numpy(chips[chosen.numpy()]).to(device).float().div_(255)
        attacked = adversarial(legitimate, labels, embeddings, chosen, recogniser, draw)
        row = {"step": step + 1}
        for network, optimiser, names, norm in zip(networks, optimisers, losses, norms):
            measuring = warm - measured <= step < warm and not fixed
            counted = ("pixel",) if step < warm else names
            network.train(step < FROZEN * steps)
            with torch.autocast(kind, torch.bfloat16, enabled=half):
                cleaned = network(attacked)
                value = resgn.terms(cleaned, legitimate, recogniser, texture, resgn.TERMS if measuring else counted)
            if measuring:
                for name, length in resgn.balance(value, list(network.parameters())).items():
                    norm[name] += length
            total = sum(_weight(name, norm, fixed, step < warm) * value[name] for name in counted)
            for group in optimiser.param_groups:
                group["lr"] = training.one_cycle(step, steps, lr)
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            row |= {f"{'+'.join(names)}: {term}": loss.item() for term, loss in value.items()}
        rows.append(row)
        if out:
            training.log(out / "log.jsonl", row)
            if (step + 1) % every == 0 or step + 1 == steps:
                state = {
                    "step": step + 1,
                    "networks": [network.state_dict() for network in networks],
                    "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                    "norms": norms,
                    "size": {"blocks": blocks, "width": width, "shrink": shrink},
                }
                training.save(out / "last.pt", state)
    return [network.eval().requires_grad_(False) for network in networks], rows


def texture_network(name, device="cpu"):
    """What ``train`` takes as ``texture``: None for "recogniser" (its last maps), VGG-Face's fc7 for "vgg-face".

    Raises ``ValueError`` for another name, ``FileNotFoundError`` saying how to get VGG-Face.
    """
    if name not in ("recogniser", "vgg-face"):
        raise ValueError(
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
    lfw = faces.load("lfw", root)
    data = lfw.people(pairs.lfw_people(lfw, "train"))
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


def ship(profile="lfw", out=None):
    """Write the shipped file from a finished run's checkpoint; returns its path."""
    out = out or cache_root() / "train" / f"resgn-{profile}"
    state = training.resume(out / "last.pt")
    tensors = {key: v for key, v in state["networks"][0].items() if not key.endswith("num_batches_tracked")}
    return weights.ship("resgn", tensors | {key: torch.tensor(v) for key, v in state["size"].items()})
