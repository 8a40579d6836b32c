"""Train A3GN on LFW's training people against dlib: `faceadv train a3gn`."""

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

from faceadv import pairs, recognisers
from faceadv.networks.a3gn import A3GN, Discriminator
from faceadv.precision import autocast
from faceadv.store import weights
from faceadv.store.paths import cache_root, replacing
from faceadv.training import loop

SETTINGS = {
    "smoke": {"width": 8, "blocks": 2, "steps": 6, "batch": 4},
    "lfw": {"width": 32, "blocks": 4, "steps": 5000, "batch": 16},
    "paper": {"width": 64, "blocks": 6, "steps": 100_000, "batch": 16},
}
SETTINGS["orl"] = SETTINGS["smoke"]
# with discriminators of ten times this weight the generator hides from them before it learns whose face to make
WEIGHTS = {"cosine": 10.0, "reconstruction": 50.0, "adversarial": 0.01, "instance": 0.01, "kl": 0.01}
# Mean absolute change that costs nothing (the hinge of AdvGAN, Xiao et al. 2018, equation 3). With a plain L1 loss it
# learns to change nothing, for any small change of an untrained generator costs more than it gains.
MARGIN = 0.03
SHEET = 8  # faces on a sample sheet
LOG = weights.SHIPPED / "a3gn.log.jsonl"
MEAN = 50  # steps a row of the shipped log


def generator_terms(made, images, code, wanted, recogniser, normal=None, instance=None, targets=None, margin=MARGIN):
    """The generator's losses as a dict of scalars.

    made, images (N, 3, H, W): G(x, z) and x; code: what ``A3GN.code`` gives; wanted (N, D): embeddings of the targets,
    whose photos are ``targets``. normal, instance: discriminators, None to leave their loss out. cosine is
    1 - cos(F(G), F(y)), reconstruction the mean absolute change beyond ``margin``, kl the divergence of q(z | y) from
    N(0, I).
    """
    value = {"reconstruction": F.relu((made - images).abs().mean((1, 2, 3)) - margin).mean()}
    embeddings = recogniser.embed(made, fast=True).float()
    value["cosine"] = (1 - F.cosine_similarity(embeddings, wanted)).mean()
    if normal is not None:
        value["adversarial"] = -normal(made).mean()
    if instance is not None:
        value["instance"] = -instance(torch.cat([made, targets], 1)).mean()
    _, mean, log_variance = code
    if mean is not None:
        value["kl"] = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return value


def hinge(real, fake):
    """The discriminators' loss: mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake))."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def train(chips, labels, recogniser, *, steps, batch, width, blocks, factors=WEIGHTS, cvae=True, attention=True,
          margin=MARGIN, begin=None, embeddings=None, out=None, resume=False, seed=0, device="cpu", every=100,
          lr=1e-3):  # fmt: skip
    """Train a generator and its discriminators; returns ``(generator, log)``, the generator frozen.

    chips (N, 3, 112, 112) uint8 and labels (N,) of the training people; each batch draws sources and, for each, a
    target of another person. factors: the losses' weights, 0 leaves one out and its discriminator untrained; margin:
    the mean change that costs nothing; begin: a generator's state to start from, instead of random weights;
    embeddings: the recogniser's of all chips (N, D), computed here if not given. out: a folder
    for ``last.pt``, ``log.jsonl`` and a sample sheet every ``every`` steps; resume as elsewhere.
    """
    embeddings = recognisers.embed_all(recogniser, chips) if embeddings is None else embeddings
    torch.manual_seed(seed)
    modules = {
        "generator": A3GN(embeddings.shape[1], width, blocks, cvae, attention),
        "normal": Discriminator(3, width),
        "instance": Discriminator(6, width),
    }
    modules["generator"].mean.copy_(embeddings.mean(0))
    modules["generator"].spread.copy_(embeddings.std(0))
    if begin:
        modules["generator"].load_state_dict(begin)
    optimisers = {}
    for name, module in modules.items():
        module.to(device).train()
        momentum = 0.9 if name == "generator" else 0.5
        optimisers[name] = torch.optim.Adam(module.parameters(), lr, betas=(momentum, 0.999))
    start, rows = 0, []
    state = loop.begin(out, resume)
    if state:
        start = state["step"]
        for name in modules:
            modules[name].load_state_dict(state[name])
            optimisers[name].load_state_dict(state[f"{name} optimiser"])
    generator = modules["generator"]
    used = {n: modules[n] for n, loss in (("normal", "adversarial"), ("instance", "instance")) if factors.get(loss)}
    for step in loop.progress(start, steps):
        draw = loop.generator(seed, step)
        sources, targets, others = pairs.triples(labels, batch, draw)
        x, y, o = (torch.from_numpy(chips[i.numpy()]).to(device).float().div_(255) for i in (sources, targets, others))
        wanted = embeddings[targets].to(device)
        for optimiser in optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = loop.one_cycle(step, steps, lr)
        with autocast(device):
            code = generator.code(wanted, draw)
            made = generator.generate(x, code[0])
            judges = used.get("normal"), used.get("instance")
            value = generator_terms(made, x, code, wanted, recogniser, *judges, y, margin)
        total = sum(factors.get(name, 0) * loss for name, loss in value.items())
        optimisers["generator"].zero_grad()
        total.backward()
        optimisers["generator"].step()
        row = {"step": step + 1, **{name: loss.item() for name, loss in value.items()}}
        made = made.detach()
        sides = {
            "normal": (x, made),
            # real: another photo of the target; fake: what was made for it, or somebody else
            "instance": (torch.cat([o, y], 1), torch.cat([torch.cat([made, y], 1), torch.cat([x, y], 1)])),
        }
        for name, discriminator in used.items():
            real, fake = sides[name]
            with autocast(device):
                loss = hinge(discriminator(real), discriminator(fake))
            optimisers[name].zero_grad()
            loss.backward()
            optimisers[name].step()
            row[f"{name} discriminator"] = loss.item()
        rows.append(row)
        if out:
            loop.log(out / "log.jsonl", row)
            if (step + 1) % every == 0 or step + 1 == steps:
                state = {"step": step + 1}
                for name in modules:
                    state |= {name: modules[name].state_dict(), f"{name} optimiser": optimisers[name].state_dict()}
                loop.save(out / "last.pt", state)
                with replacing(out / f"sheet-{step + 1:06d}.png") as part:
                    sheet = torch.cat([x[:SHEET], made[:SHEET], 0.5 + 5 * (made - x)[:SHEET], y[:SHEET]])
                    save_image(sheet, part, nrow=min(SHEET, batch), format="png")
    return generator.eval().requires_grad_(False), rows


def main(profile="lfw", resume=False, root=None, out=None, seed=0):
    """Train with the profile's size, checkpointing every 100 steps; returns the folder with log and sheets."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = out or cache_root() / "train" / f"a3gn-{profile}"
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
        **SETTINGS[profile],
    )
    return out


def ship(profile="lfw", out=None):
    """Write the shipped file and log from a finished run's checkpoint; returns the file's path."""
    out = out or cache_root() / "train" / f"a3gn-{profile}"
    loop.write_log(weights.SHIPPED / LOG.name, loop.read_log(out / "log.jsonl", MEAN))
    return weights.ship("a3gn", loop.resume(out / "last.pt")["generator"])
