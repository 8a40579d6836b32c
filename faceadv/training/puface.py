"""Train PuFace on LFW's training people: `faceadv train puface`."""

import functools

import numpy as np
import torch
import torch.nn.functional as F

from faceadv import cloaks, faces, pairs, recognisers
from faceadv.networks.puface import PuFace
from faceadv.precision import autocast
from faceadv.store import weights
from faceadv.store.paths import cache_root
from faceadv.training import loop

SETTINGS = {
    "smoke": {"photos": 8, "cloak_steps": 2, "steps": 6, "batch": 4},
    "lfw": {"photos": 960, "cloak_steps": 40, "steps": 2400, "batch": 16},
}
SETTINGS["orl"] = SETTINGS["smoke"]
SETTINGS["paper"] = {"photos": 9525, "cloak_steps": None, "steps": 100_000, "batch": 32}
BETA = 1.0  # weight of the feature loss; at 0.1 the identity was not left in 600 steps, for it is good in L1
KAPPA = (1.0, 2.0)  # a cloak is amplified by a factor drawn from here; at 4 LowKey leaves no face
NATURAL = 0.5  # share of photos without a cloak
MODES = ("low", "mid", "high")


def amplify(images, cloaked, factor):
    """clip(x + factor (x_c - x)): a cloak, or none at factor 0, made stronger; factor a number or (N,)."""
    factor = torch.as_tensor(factor, dtype=images.dtype, device=images.device).reshape(-1, 1, 1, 1)
    return (images + factor * (cloaked - images)).clamp(0, 1)


def terms(purified, natural, extractors):
    """The image loss |P - x|_1 (mean) and the feature loss 1 - cos(F(P), F(x)), mean over extractors, as a dict."""
    feature = 0.0
    for extractor in extractors:
        with torch.no_grad():
            wanted = extractor.embed(natural, fast=True)
        feature = feature + (1 - F.cosine_similarity(extractor.embed(purified, fast=True), wanted)).mean()
    return {"image": (purified - natural).abs().mean(), "feature": feature / len(extractors)}


def cloaked_photos(images, extractors, steps, part=48):
    """Cloaks of images (N, 3, H, W), as float32: LowKey and Fawkes in turn, Fawkes with mode and extractor in turn.

    Cached part by part, so that a killed run goes on. Each part has another seed, far from those of the notebooks: a
    purifier could otherwise learn the noise that the cloaks start from.
    """
    parts = []
    for number, piece in enumerate(images.split(part)):
        options, seed = {} if steps is None else {"steps": steps}, 10_000 + number
        if number % 2:
            make, used = functools.partial(cloaks.lowkey, extractors=extractors, seed=seed, **options), extractors
            label = f"lowkey {cloaks.perceptual()[0]} {steps} {seed}"
        else:
            mode, used = MODES[number // 2 % len(MODES)], [extractors[number // 2 // len(MODES) % len(extractors)]]
            make = functools.partial(cloaks.fawkes, extractors=used, mode=mode, seed=seed, **options)
            label = f"fawkes {mode} {steps} {seed}"
        parts.append(cloaks.cached(label, make, piece, used))
    return torch.cat(parts)


def train(natural, cloaked, extractors, *, steps, batch, beta=BETA, kappa=KAPPA, out=None, resume=False, seed=0,
          device="cpu", every=100, lr=1e-3):  # fmt: skip
    """Train PuFace on pairs of photos; returns ``(network, log)`` as ``train_resgn.train`` does.

    natural, cloaked (N, 3, 112, 112) uint8 arrays; extractors: recognisers of the feature loss; beta 0 leaves that loss
    out, None the image loss; kappa: the range of amplification, (1, 1) for none.
    """
    torch.manual_seed(seed)
    network = PuFace().to(device).train()
    optimiser = torch.optim.Adam(network.parameters(), lr)
    start, rows = 0, []
    state = loop.begin(out, resume)
    if state:
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        start = state["step"]
    for step in loop.progress(start, steps):
        draw = loop.generator(seed, step)
        chosen = torch.randint(len(natural), (batch,), generator=draw).numpy()
        x, c = (torch.from_numpy(a[chosen]).to(device).float().div_(255) for a in (natural, cloaked))
        factor = kappa[0] + (kappa[1] - kappa[0]) * torch.rand(batch, generator=draw)
        factor = torch.where(torch.rand(batch, generator=draw) < NATURAL, torch.zeros(batch), factor)
        flip = torch.rand(batch, generator=draw) < 0.5
        amplified = amplify(x, c, factor.to(device))
        x, amplified = (torch.where(flip.to(device)[:, None, None, None], a.flip(3), a) for a in (x, amplified))
        with autocast(device):
            value = terms(network(amplified), x, extractors)
        total = value["feature"] if beta is None else value["image"] + beta * value["feature"]
        for group in optimiser.param_groups:
            group["lr"] = loop.one_cycle(step, steps, lr)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        rows.append({"step": step + 1, **{name: loss.item() for name, loss in value.items()}})
        if out:
            loop.log(out / "log.jsonl", rows[-1])
            if (step + 1) % every == 0 or step + 1 == steps:
                state = {"step": step + 1, "network": network.state_dict(), "optimiser": optimiser.state_dict()}
                loop.save(out / "last.pt", state)
    return network.eval().requires_grad_(False), rows


def photos(profile="lfw", root=None, seed=0, device="cpu"):
    """What the profile trains on: ``(natural, cloaked, extractors)`` as ``train`` takes them."""
    settings = SETTINGS[profile]
    lfw = faces.load("lfw", root)
    people = lfw.people(pairs.lfw_people(lfw, "train"))
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(seed))[: settings["photos"]]
    data = people[order.sort().values.numpy()]
    extractors = [recognisers.load(name, device) for name in ("dlib", "mobile")]
    cloaked = cloaked_photos(data.images.to(device), extractors, settings["cloak_steps"])
    return np.array(data.chips), (cloaked * 255).round().byte().cpu().numpy(), extractors


def main(profile="lfw", resume=False, root=None, out=None, seed=0):
    """Cloak and train with the profile's sizes; returns the folder with the checkpoint and log."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = out or cache_root() / "train" / f"puface-{profile}"
    sizes = {key: SETTINGS[profile][key] for key in ("steps", "batch")}
    train(*photos(profile, root, seed, device), out=out, resume=resume, seed=seed, device=device, **sizes)
    return out


def ship(profile="lfw", out=None):
    """Write the shipped file from a finished run's checkpoint; returns its path."""
    out = out or cache_root() / "train" / f"puface-{profile}"
    return weights.ship("puface", loop.resume(out / "last.pt")["network"])
