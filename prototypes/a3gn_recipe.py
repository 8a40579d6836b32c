"""The recipe of A3GN, against two recognisers at once: `faceadv train a3gn`."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import make_grid

from faceadv import cloaks, faces, recognisers
from faceadv.networks.a3gn import A3GN, CODE, Discriminator
from faceadv.precision import autocast
from faceadv.recognisers import Recogniser
from faceadv.store import cache, weights
from faceadv.training import loop

__all__ = ["LOG", "SETTINGS", "WEIGHTS", "Price", "Work", "change", "embeddings", "generator_terms", "hinge", "ladder"]
__all__ += ["photos", "prepare", "sheet", "state", "train", "triples", "write"]

ATTACKED = ("dlib", "mobilefacenet")
# "identity" is 1 for a stranger, so that recognisers with other scales count alike; SSIM has a price of its own
WEIGHTS = {"identity": 10.0, "semantic": 1.0, "kl": 0.02, "chroma": 100.0, "low": 100.0, "perceptual": 5.0,
           "adversarial": 0.2, "instance": 0.2}  # fmt: skip
# What costs nothing, so that the generator does not end at the identity: mean absolute change of colour, of luma in
# squares of 8 pixels, and of MobileFaceNet's early features as a share of their power.
MARGINS = {"chroma": 0.008, "low": 0.009, "perceptual": 0.15}
FREE = 0.1  # nats of each number of the code that cost nothing (free bits): else it says nothing in the end
NEAR = 0.2  # a distance that costs nothing, as a share of that of strangers; two photos of one person have 0.3
LOOSE = 0.55  # the mean SSIM that training begins with: first learn whose face to make, then to hide it
TIGHT = 0.55  # from this share of the steps on, the mean SSIM is that of the settings
RAMP = (0.12, 0.5)  # between these shares of the steps the discriminators come in, and the margins shrink
LATE = ("adversarial", "instance")
# How much larger the margins are at first. They hold from the start: SSIM hardly sees low frequencies, and without a
# hinge the first steps of an unbounded generator are blotches of light and colour, and not a face.
EASE = 2.5
NETWORK = {"width": 32, "blocks": 4, "heads": 4, "bound": 0.0, "known": False}
SETTINGS = {"lfw": NETWORK | {"steps": 10_000, "batch": 64, "lr": 1e-3, "ssim": 0.815, "factors": WEIGHTS}}
SETTINGS["smoke"] = SETTINGS["orl"] = SETTINGS["lfw"] | {"width": 8, "blocks": 2, "steps": 6, "batch": 4}
SETTINGS["paper"] = SETTINGS["lfw"] | {"width": 48, "blocks": 6, "steps": 100_000}
SHEET = 8  # faces on a sample sheet
LUMA = (0.299, 0.587, 0.114)
LOG = weights.SHIPPED / "a3gn.log.jsonl"


@dataclasses.dataclass
class Work:
    """What a training is made of: ``step(share, draw)`` makes one, the rest is what it changes."""

    modules: dict[str, nn.Module]
    optimisers: dict[str, torch.optim.Optimizer]
    # share of the steps that are done, a generator on the device, size of the batch: losses as scalars there
    step: Callable[[float, torch.Generator, int], dict[str, torch.Tensor]]
    sheet: Callable[[], torch.Tensor]  # a picture (3, H, W) of the last step


class Price(nn.Module):
    """What a unit of lost SSIM costs. It rises while the mean SSIM is below the wanted one, and falls while above.

    So the generator uses the whole budget and keeps it, whatever the other losses weigh, and a change within the budget
    costs next to nothing. It is the multiplier of a constrained problem, found by dual ascent, with a proportional term
    against oscillation.
    """

    def __init__(self, start: float = 5.0, rate: float = 0.2, gain: float = 10.0):
        super().__init__()
        self.rate, self.gain = rate, gain
        self.register_buffer("log", torch.tensor(float(np.log(start))))

    @torch.no_grad()
    def forward(self, ssim: torch.Tensor, wanted: float) -> torch.Tensor:
        """The price for this batch, a scalar; ssim: its mean SSIM."""
        missing = wanted - ssim
        self.log += self.rate * missing
        self.log.clamp_(-1.0, 5.3)
        return (self.log + self.gain * missing.clamp(-0.3, 0.15)).exp()


def ladder(share: float, final: float) -> tuple[float, float]:
    """``(SSIM, weight)`` at a share of the training: the wanted mean, and the factor of the ``LATE`` losses."""
    ssim = LOOSE + (final - LOOSE) * min(1.0, max(0.0, (share - RAMP[0]) / (TIGHT - RAMP[0])))
    return ssim, min(1.0, max(0.0, (share - RAMP[0]) / (RAMP[1] - RAMP[0])))


def change(made: torch.Tensor, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """How the change looks, by name, each (N,): mean absolute change of "chroma" and of "low" frequencies of luma.

    made, images : (N, 3, H, W) in [0, 1], H and W multiples of 8
    """
    moved = made - images
    luma = sum(weight * moved[:, i : i + 1] for i, weight in enumerate(LUMA))
    return {
        "chroma": (moved - luma).abs().mean((1, 2, 3)),
        "low": F.avg_pool2d(luma, 8).abs().mean((1, 2, 3)),
    }


def generator_terms(
    made: torch.Tensor,
    images: torch.Tensor,
    wanted: Sequence[torch.Tensor],
    networks: Sequence[nn.Module],
    scales: Sequence[float],
    view: torch.Tensor | None = None,
    ease: float = 1.0,
) -> dict[str, torch.Tensor]:
    """The losses that depend on the made images alone, as scalars by name.

    Parameters
    ----------
    made, images : G(x, y) and x, (N, 3, H, W) in [0, 1]
    wanted : for each recogniser the embeddings (2, N, D) of the target's photo and of another one of the same person
    networks, scales : the recognisers' networks F, and the mean 1 - cos(F(x), F(y)) of strangers by each: "identity" is
        the mean of max(0, (1 - cos(F(G), F(y))) / scale - NEAR) over both photos and all recognisers
    ease : what ``MARGINS`` are multiplied by
    view : the places (N, H, W, 2) at which F sees the images (``F.grid_sample``); by default as they are
    """
    with torch.autocast(made.device.type, enabled=False):  # in bfloat16 the variances would be noise
        value = {"ssim": 1 - 2 * cloaks.dssim(made, images).mean()}
    for name, amount in change(made, images).items():
        value[name] = F.relu(amount - ease * MARGINS[name]).mean()
    with torch.no_grad():
        before = _early(networks[-1], images)
    after = _early(networks[-1], made)
    amount = sum((a - b).float().square().mean((1, 2, 3)) / b.float().square().mean((1, 2, 3))
                 for a, b in zip(after, before)) / len(before)  # fmt: skip
    value["perceptual"] = F.relu(amount - ease * MARGINS["perceptual"]).mean()
    seen = made if view is None else F.grid_sample(made, view, padding_mode="border", align_corners=False)
    beyond = []
    for i, (network, scale, both) in enumerate(zip(networks, scales, wanted)):
        away = (1 - F.cosine_similarity(network(seen).float(), both, dim=2)) / scale
        value[f"same photo {i}"], value[f"other photo {i}"] = away.mean(1)
        beyond.append(F.relu(away - NEAR).mean())
    value["identity"] = sum(beyond) / len(beyond)
    return value


def hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminators' loss: mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake))."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def triples(order: tuple[torch.Tensor, ...], count: int, draw: torch.Generator) -> tuple[torch.Tensor, ...]:
    """``pairs.triples`` on the device of ``draw``, without waiting for it: sources, targets, seconds, (count,) each.

    Half of the targets are people with several photos; without one, a person's only photo is its own second. A source
    that is the target itself is moved on to the next person.

    Parameters
    ----------
    order : as ``_order`` gives it
    count, draw : how many, and a generator
    """
    rows, start, sizes, many = order
    device = draw.device

    def uniform(high):
        return (torch.rand(count, generator=draw, device=device) * high).long()

    target = uniform(len(rows))
    target = torch.where(torch.rand(count, generator=draw, device=device) < 0.5, many[uniform(len(many))], target)
    source, size = uniform(len(rows)), sizes[target]
    source = torch.where(start[source] == start[target], (start[target] + size) % len(rows), source)
    step = 1 + (torch.rand(count, generator=draw, device=device) * (size - 1)).long()
    second = start[target] + (target - start[target] + step) % size
    return rows[source], rows[target], rows[second]


def _order(labels, device):
    """Photos sorted by person: rows; of each, where its person's begin and how many; where people with several are."""
    labels = torch.as_tensor(labels)
    rows = labels.argsort(stable=True)
    _, place, counts = labels[rows].unique_consecutive(return_inverse=True, return_counts=True)
    start, sizes = (counts.cumsum(0) - counts)[place], counts[place]
    many = torch.where(sizes > 1)[0]
    many = many if len(many) else torch.arange(len(rows))
    return tuple(t.to(device) for t in (rows, start, sizes, many))


def photos(
    profile: str = "lfw", root: loop.Place = None, seed: int = 0, device: loop.Device = "cpu"
) -> tuple[faces.FaceSet, list[Recogniser]]:
    """What every profile learns from, the first arguments of ``train``: LFW's training people, and two recognisers.

    Parameters
    ----------
    profile : a key of ``SETTINGS``; all learn from the same
    root : folder with data sets; by default ``FACEADV_DATA``
    seed, device : where the recognisers are; the seed is not needed
    """
    return loop.students(root), [recognisers.load(name, device) for name in ATTACKED]


def embeddings(chips: torch.Tensor, networks: Sequence[nn.Module], key: str, batch: int = 256) -> list[torch.Tensor]:
    """For each network the embeddings (2 N, D) of the chips and then of the chips mirrored, where the chips are.

    Parameters
    ----------
    chips : (N, 3, H, W) uint8
    networks : as ``_fast`` gives them; the last is MobileFaceNet
    key : of their place in the cache; several processes make them once
    batch : how many at once
    """

    @torch.no_grad()
    def make():
        done = []
        for mirrored in (False, True):
            for part in chips.split(batch):
                x = part.float().div_(255)
                with autocast(chips.device):
                    done.append(torch.cat([n(x.flip(3) if mirrored else x).float() for n in networks], 1))
        return torch.cat(done).cpu().numpy()

    both = torch.from_numpy(np.array(cache.array("embeddings", "a3gn", key, make))).to(chips.device)
    with torch.no_grad(), autocast(chips.device):
        sizes = [n(chips[:1].float().div(255)).shape[1] for n in networks]
    return list(both.split(sizes, 1))


def _fast(recogniser, device):
    """A recogniser's network for gradients: its weights in bfloat16 where the device computes in it.

    Autocast would cast frozen weights anew at every step. What is no weight stays in float32.
    """
    network = copy.deepcopy(recogniser.network).to(device)
    with autocast(device):
        kind = torch.get_autocast_dtype(torch.device(device).type)
        if torch.is_autocast_enabled(torch.device(device).type):
            for weight in network.parameters():
                weight.data = weight.data.to(kind)
    return network.eval().requires_grad_(False)


def _early(network, images):
    """Maps of MobileFaceNet's early layers, at a half and a quarter of the image's size."""
    x, maps = ((255 * network.warp(images) - 127.5) / 128).contiguous(memory_format=torch.channels_last), []
    for i, layer in enumerate(network.layers[:7]):
        x = layer(x)
        if i in (3, 6):
            maps.append(x)
    return maps


def _view(count, draw):
    """Where recognisers see half of the images slightly moved and scaled (Xie et al. 2019), for ``F.grid_sample``."""
    device = draw.device
    size, right, down, used = torch.rand(4, count, generator=draw, device=device) * 2 - 1
    used = (used > 0).float()
    size, zero = 1 + 0.06 * size * used, torch.zeros_like(size)
    rows = [torch.stack(row, 1) for row in ((size, zero, 0.05 * right * used), (zero, size, 0.05 * down * used))]
    return torch.stack(rows, 1)


def prepare(
    data: faces.FaceSet, attacked: Sequence[Recogniser], settings: dict, seed: int = 0, device: loop.Device = "cpu"
) -> Work:
    """Everything that one training needs, with the chips on the device; arguments as for ``train``."""
    settings = loop.complete(settings, SETTINGS)
    device, factors = torch.device(device), settings["factors"]
    chips, order = torch.from_numpy(np.array(data.chips)).to(device), _order(data.labels, device)
    networks, seen = [_fast(r, device) for r in attacked], {}
    key = cache.key(cache.versions(), device.type, [recognisers.fingerprint(r) for r in attacked], data.chips)
    known = embeddings(chips, networks, key)
    everything = torch.cat(known, 1)
    scales = [_stranger(e[: len(chips)]) for e in known]
    modules, optimisers = _networks(settings, everything, seed, device)
    generator, reader, price = (modules[name] for name in ("generator", "reader", "price"))
    parameters = [*generator.parameters(), *reader.parameters()]
    used = {n: modules[n] for n, loss in (("normal", "adversarial"), ("instance", "instance")) if factors.get(loss)}

    def step(share, draw, count):
        ssim, late = ladder(share, settings["ssim"])
        rows = torch.stack(triples(order, count, draw))
        mirrored = torch.rand(rows.shape, generator=draw, device=device) < 0.5
        x, y, o = torch.where(mirrored[..., None, None, None], chips[rows].flip(4), chips[rows]).float().div_(255)
        rows = rows + mirrored * len(chips)
        view = F.affine_grid(_view(count, draw), list(x.shape), align_corners=False)
        target = everything[rows[1]]
        with autocast(device):
            made, z, mean, log_variance = generator.generate(x, y, target if settings["known"] else None, draw)
            value = generator_terms(
                made, x, [e[rows[1:]] for e in known], networks, scales, view, 1 + (EASE - 1) * (1 - late)
            )
            standard = (target - reader.mean) / reader.spread
            value["semantic"] = (1 - F.cosine_similarity(reader(z).float(), standard)).mean()
            nats = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(0)
            value["kl"], value["nats"] = F.relu(nats - FREE).sum(), nats.sum().detach()
            if "normal" in used:
                value["adversarial"] = -_judged(used["normal"], made)
            if "instance" in used:
                value["instance"] = -_judged(used["instance"], torch.cat([made, y], 1))
        value["price"] = price(value["ssim"].detach(), ssim)
        total = value["price"] * (1 - value["ssim"])
        total = total + sum(
            weight * (late if name in LATE else 1) * value[name] for name, weight in factors.items() if weight
        )
        _descend(optimisers["generator"], total, parameters)
        made = made.detach()
        seen["images"] = x, made, y
        sides = {
            "normal": (x, made),
            # real: another photo of the target; fake: what was made for it, or somebody else
            "instance": (torch.cat([o, y], 1), torch.cat([torch.cat([made, y], 1), torch.cat([x, y], 1)])),
        }
        for name, discriminator in used.items():
            with autocast(device):
                real, fake = sides[name]
                scores = discriminator(torch.cat([real, fake]))
                value[f"{name} discriminator"] = hinge(scores[: len(real)], scores[len(real) :])
            _descend(optimisers[name], value[f"{name} discriminator"], list(discriminator.parameters()))
        return {name: loss.detach() for name, loss in value.items()}

    return Work(modules, optimisers, step, lambda: sheet(*seen["images"]))


def train(
    data: faces.FaceSet,
    attacked: Sequence[Recogniser],
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
    data : the people; each batch draws sources and, for each, two photos of another person
    attacked : the recognisers to attack at once; the last is MobileFaceNet, whose early layers also judge the change
    settings : "steps", "batch", "lr" (the peak), "width", "blocks", "heads" (0: without attention), "bound" (0: none),
        "known" (whether the recognisers' embeddings of the target are a second condition), "ssim" (the mean that the
        generator ends with), "factors" (weights of the losses; 0 leaves one out and its discriminator untrained); what
        is missing is as in the profile lfw
    out, resume, seed, device : as for ``loop.train``, with its errors; beside each checkpoint lies a sheet of samples
    """
    settings = loop.complete(settings, SETTINGS)
    work = prepare(data, attacked, settings, seed, device)

    def step(number, draw):
        draw = torch.Generator(device).manual_seed(draw.initial_seed())
        value = work.step(number / settings["steps"], draw, settings["batch"])
        return dict(zip(value, torch.stack([v.float() for v in value.values()]).tolist()))

    inputs = np.asarray(data.chips), data.labels, *attacked
    plan = loop.Plan("a3gn", settings, inputs, work.modules, work.optimisers, step, sheet=work.sheet)
    return work.modules["generator"], loop.train(plan, out, resume, seed, device)


class _Reader(nn.Linear):
    """Reads the target's standardised embeddings off its code: so the code says who it is, not what light there was."""

    def __init__(self, known):
        super().__init__(CODE, known.shape[1])
        self.register_buffer("mean", known.mean(0))
        self.register_buffer("spread", known.std(0))


def _networks(settings, known, seed, device):
    """The generator, reader, price, discriminators and their optimisers, each by name. known: all embeddings (N, D)."""
    torch.manual_seed(seed)
    width, sizes = settings["width"], (settings[key] for key in ("width", "blocks", "heads", "bound"))
    generator = A3GN(known.shape[1] if settings["known"] else 0, *sizes)
    if settings["known"]:
        generator.mean.copy_(known.mean(0))
        generator.spread.copy_(known.std(0))
    modules = {"generator": generator, "reader": _Reader(known.cpu()), "price": Price()}
    modules |= {"normal": Discriminator(3, width), "instance": Discriminator(6, width)}
    modules = {name: module.to(device).train() for name, module in modules.items()}
    learned = {"generator": [*generator.parameters(), *modules["reader"].parameters()]}
    learned |= {name: list(modules[name].parameters()) for name in ("normal", "instance")}
    optimisers = {}
    for name, parameters in learned.items():
        betas = (0.9 if name == "generator" else 0.5, 0.99)
        optimisers[name] = torch.optim.Adam(parameters, settings["lr"], betas=betas, eps=1e-7, fused=True)
    return modules, optimisers


def _stranger(known):
    """The mean 1 - cos of embeddings of strangers, as a number."""
    unit = F.normalize(known)
    return (1 - unit.mean(0).square().sum()).item()


def _judged(discriminator, images):
    """Its mean score of images, with a gradient for them and none for its weights."""
    discriminator.requires_grad_(False)
    score = discriminator(images).mean()
    discriminator.requires_grad_(True)
    return score


def _descend(optimiser, loss, parameters):
    """One step; the gradient is shortened to length 1, and a step whose gradient is not finite is left out.

    All of it happens on the device, without a wait for a number.
    """
    optimiser.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    optimiser.grad_scale, optimiser.found_inf = None, (~norm.isfinite()).float()  # fused optimisers read these
    optimiser.step()


def sheet(images: torch.Tensor, made: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sources, attacked images, the change five times, and targets, one row each, (3, H, W)."""
    rows = [part[:SHEET].float() for part in (images, made, 0.5 + 5 * (made - images), targets)]
    return make_grid(torch.cat(rows).cpu().clamp(0, 1), len(rows[0]))


def state(generator: A3GN, settings: dict) -> dict[str, torch.Tensor]:
    """The generator's weights with its sizes, as ``networks.a3gn.build`` takes them."""
    sizes = {key: torch.tensor(float(settings[key])) for key in ("width", "blocks", "heads", "bound")}
    return {key: value.detach().cpu() for key, value in generator.state_dict().items()} | sizes


def write(checkpoint: dict, root: loop.Place = None) -> Path:
    """Write the shipped file, with the generator's sizes, from a checkpoint; returns its path. root is not needed."""
    sizes = {key: torch.tensor(float(checkpoint["run"][key])) for key in ("width", "blocks", "heads", "bound")}
    return weights.ship("a3gn", checkpoint["modules"]["generator"] | sizes)
