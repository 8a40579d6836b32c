"""Train the second recogniser on LFW's training people: `faceadv train mobile`.

Loss: CosFace (Wang et al. 2018, equation 4), cross-entropy over s (cos θ_j - m [j = y]).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from faceadv import faces, pairs, recognisers, verification
from faceadv.networks.mobile import DIMENSION, MobileNet
from faceadv.store import weights
from faceadv.store.lfw_people import dev_people
from faceadv.store.paths import cache_root
from faceadv.training import loop

SCALE, MARGIN = 32.0, 0.25
VALIDATION_PEOPLE = 300  # held out of the training people: they choose the threshold
SETTINGS = {
    "smoke": {"steps": 20, "batch": 16, "people": 40},
    "lfw": {"steps": 2600, "batch": 96, "people": None},
}
SETTINGS["orl"] = SETTINGS["smoke"]
SETTINGS["paper"] = SETTINGS["lfw"]


def split(lfw, seed=0):
    """LFW's training people in two: (names to train on, names held out for validation)."""
    people = dev_people(lfw.names, "train")
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {people[i] for i in order[:VALIDATION_PEOPLE]}
    return [p for p in people if p not in held_out], sorted(held_out)


def augment(images, generator):
    """Random flip, similarity transform, light, grey, blur by down-scaling, and one erased rectangle."""
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


def margin_loss(embeddings, centres, labels):
    """CosFace: cross-entropy over s (cos θ_j - m [j = y]); embeddings (N, D), centres (C, D), labels (N,)."""
    cosine = F.normalize(embeddings) @ F.normalize(centres).T
    return F.cross_entropy(SCALE * (cosine - MARGIN * F.one_hot(labels, len(centres))), labels)


def validate(network, lfw, names):
    """Threshold and accuracy on all same and as many different pairs of ``names``, people not trained on."""
    recogniser = recognisers.Recogniser("mobile", network, 1.0, unit=True)
    held_out = lfw.people(names)
    every = pairs.all_pairs(held_out)
    chosen = pairs.sample(every, min(1000, int(every.same.sum())))
    distances = verification.pair_distances(recogniser, recognisers.embed_all(recogniser, held_out.chips), chosen)
    threshold = verification.best_threshold(distances, chosen.same)
    return threshold, verification.accuracy(distances, chosen.same, threshold)


def ship(profile="lfw", root=None, out=None, seed=0):
    """Choose the threshold on the validation people and write the shipped file; returns what its card states."""
    out = out or cache_root() / "train" / f"mobile-{profile}"
    lfw = faces.load("lfw", root)
    network = MobileNet().eval()
    network.load_state_dict(loop.resume(out / "last.pt")["network"])
    threshold, validation = validate(network, lfw, split(lfw, seed)[1])
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    path = weights.ship("mobile", state | {"threshold": torch.tensor(threshold)})
    recogniser = recognisers.load("mobile")  # as a reader will have it
    test = pairs.lfw_view1(lfw, "test", root)
    distances = verification.pair_distances(recogniser, recognisers.embed_faces(recogniser, lfw), test)
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "bytes": path.stat().st_size,
        "threshold": threshold,
        "validation accuracy": validation,
        "View 1 test accuracy": verification.accuracy(distances, test.same, recogniser.threshold),
        "View 1 test AUC": verification.roc(distances, test.same)[2],
    }


def main(profile="lfw", resume=False, root=None, out=None, seed=0):
    """Train, checkpointing every 250 steps; returns the folder with ``last.pt`` and ``log.jsonl``."""
    settings = SETTINGS[profile]
    out = out or cache_root() / "train" / f"mobile-{profile}"
    lfw = faces.load("lfw", root)
    names, _ = split(lfw, seed)
    data = lfw.people(names[: settings["people"]])
    chips, labels = np.array(data.chips), data.labels
    weight = 1 / torch.bincount(labels)[labels].float().sqrt()  # between one photo and one person a vote

    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = MobileNet().to(device, memory_format=torch.channels_last).train()
    centres = nn.Parameter(torch.randn(len(data.names), DIMENSION, device=device) * 0.1)
    decay = [p for p in network.parameters() if p.ndim > 1]
    other = [p for p in network.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": [*decay, centres], "weight_decay": 0.1}, {"params": other, "weight_decay": 0}], lr=1e-3
    )
    start, state = 0, loop.begin(out, resume)
    if state:
        network.load_state_dict(state["network"])
        centres.data.copy_(state["centres"])
        optimiser.load_state_dict(state["optimiser"])
        start = state["step"]

    steps, losses = settings["steps"], []
    bar = loop.progress(start, steps)
    for step in bar:
        draw = loop.generator(seed, step)
        rows = torch.multinomial(weight, settings["batch"], replacement=True, generator=draw)
        images = augment(torch.from_numpy(chips[rows.numpy()]).float().div_(255), draw).to(device)
        for group in optimiser.param_groups:
            group["lr"] = loop.one_cycle(step, steps, 2e-3)
        embeddings = network(images.contiguous(memory_format=torch.channels_last))
        loss = margin_loss(embeddings.float(), centres, labels[rows].to(device))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*network.parameters(), centres], 5.0)
        optimiser.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            loop.log(out / "log.jsonl", {"step": step + 1, "loss": float(np.mean(losses))})
            losses = []
        if (step + 1) % 250 == 0 or step + 1 == steps:
            loop.save(
                out / "last.pt",
                {
                    "step": step + 1,
                    "network": network.state_dict(),
                    "centres": centres.data,
                    "optimiser": optimiser.state_dict(),
                },
            )
    return out
