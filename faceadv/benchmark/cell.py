"""One cell of the benchmark: an attack against a defence, on one recogniser, for one goal, measured on pairs of faces.

The protocol is notebook 07's. A pair is an enrolled photo, which the attacker knows and nobody changes, and a presented
one, which is attacked, rounded to 8 bits as a file would be, and purified by the defence. The recogniser decides by a
threshold that was chosen without any defence, at a false accept rate, on pairs of other people. *Right* means: a pair
of one person is accepted (dodging fails), a pair of two people rejected (impersonation fails).
"""

import dataclasses
import functools
import io
import pickletools
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType, SimpleNamespace

import cloudpickle
import numpy as np
import torch

from faceadv import (
    adaptive,
    attacks,
    ddnm,
    faces,
    metrics,
    objectives,
    pairs,
    precision,
    purifiers,
    recognisers,
    smooth,
)
from faceadv.errors import Invalid
from faceadv.images import quantise
from faceadv.networks import a3gn, frbench, prior
from faceadv.store import cache, datasets, weights
from faceadv.store.paths import nearest
from faceadv.verification import pair_distances, threshold_at_far

__all__ = ["ATTACKS", "BATCH", "DEFENCES", "DIFFUSION", "GOALS", "WAYS", "Cell", "Settings"]
__all__ += ["check", "data", "measure", "version"]

GOALS = ("dodging", "impersonation")
DIFFUSION = ("super-resolution", "colourisation", "two-stage")
FAST = ("none", "jpeg", "bit-depth", "blur", "median", "total-variation", "randomization", "resgn", "puface")
DEFENCES = (*FAST, *DIFFUSION)
# What an attacker who knows the defence tries, the same for all as far as it makes sense. "gradient" goes through the
# defence, "stand-in" through something smooth in its place where it rounds, and "eot" through several random draws.
# "bpda" takes the identity for its gradient. "queries" is a random search without any gradient: if it does better, a
# gradient was hidden. For the diffusions, "measured" attacks only what they measure of a photo, and "surrogate" goes
# through a shortened diffusion with EOT. The full gradient through all steps of a diffusion takes too long.
WAYS = (
    {"none": ("gradient", "queries"), "randomization": ("gradient", "eot", "bpda", "queries")}
    | dict.fromkeys(smooth.STAND_INS, ("stand-in", "bpda", "queries"))
    | dict.fromkeys(("blur", "median", "total-variation", "resgn", "puface"), ("gradient", "bpda", "queries"))
    | dict.fromkeys(DIFFUSION, ("measured", "surrogate", "bpda", "queries"))
)
# The lowest loss that an attack saw through one of these may be a lucky draw: the images of the last step are taken.
RANDOM = ("randomization", *DIFFUSION)
OTHER_DRAWS = 10_000  # added to the attacker's seed of a defence, because the attacker does not know the draws to come
BATCH = 32
Own = Mapping[str, Callable] | None
NO_PART = ("cli.py", "parallel.py", "plots.py", "records.py")  # modules without an influence on what is measured


@dataclasses.dataclass(frozen=True)
class Cell:
    """A place in the grid. ``source`` is the recogniser that the attack is made with, by default the one judged."""

    attack: str
    defence: str
    recogniser: str
    goal: str
    way: str = "static"
    eps_255: float = 4.0
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all cells of a benchmark share.

    Parameters
    ----------
    faces_name : the data set, as for ``faces.load``
    seeds : of the draws of pairs; the first one is the seed of attacks and defences too
    far : the false accept rate at which thresholds are chosen
    pair_count : how many pairs are drawn for each seed and goal
    slow_pair_count : how many of them, the first ones, are for the defences by diffusion, which are slow
    steps, slow_steps : of an iterative attack; of one that runs a diffusion in every step
    sampling_steps, surrogate_steps : of a diffusion; of its shortened copy in the way "surrogate"
    eot_samples : how many random draws of a defence each step of an attack averages over
    restarts : of PGD where it knows the defence; of each image the best one is taken
    queries : of the random search; a tenth of them behind a diffusion

    Raises
    ------
    Invalid : if there is no seed, or if a number is below 1
    """

    faces_name: str = "orl"
    seeds: tuple[int, ...] = (0, 1)
    far: float = 1e-3
    pair_count: int = 10
    slow_pair_count: int = 4
    steps: int = 10
    slow_steps: int = 5
    sampling_steps: int = 10
    surrogate_steps: int = 2
    eot_samples: int = 4
    restarts: int = 3
    queries: int = 500
    device: str = "auto"  # see ``precision.device``; each process asks anew, on its own machine

    def __post_init__(self):
        wrong = [name for name, value in vars(self).items() if isinstance(value, int) and value < 1]
        if wrong or not self.seeds:
            raise Invalid(f"A benchmark needs at least one of each, and has none: {', '.join(wrong or ['seeds'])}.")


def measure(cell: Cell, settings: Settings, own: Own = None) -> dict:
    """The row of a cell: its fields and ``right`` (0 or 1), ``distance``, ``who``, ``seed``, lists with all pairs.

    Besides: the ``threshold``; ``l2``, the mean length of the attack's changes, and ``linf``, its largest change of a
    pixel, in [0, 1]; the ``seconds`` that the attack and the defence took for an image.

    Parameters
    ----------
    cell : what to measure
    settings : those of the whole benchmark
    own : attacks ``(images, objective) -> images`` and defences ``images -> images`` by name, besides those built in

    Raises
    ------
    Invalid : as for ``check``, and if an own callable returns anything but float images of the same shape in [0, 1]
    """
    check(cell, own)
    slow = cell.defence in DIFFUSION
    pair = _pairs(settings, cell.goal, slow)
    judge, threshold = _recogniser(cell.recogniser, settings)
    attacked, attack_seconds = _attacked(cell, settings, own)
    defence = _defence(cell.defence, settings, own)
    started = time.perf_counter()
    with torch.no_grad():
        parts = attacked.split(2 * BATCH)
        clean = torch.cat([_images(defence(part.clone()), part, cell.defence) for part in parts])
    defence_seconds = time.perf_counter() - started
    enrolled = _enrolled(cell.recogniser, settings, cell.goal, slow)
    distances = judge.distance(recognisers.embed_all(judge, clean), enrolled)
    accepted = distances < threshold
    return dataclasses.asdict(cell) | {
        "right": (accepted if cell.goal == "dodging" else ~accepted).int().tolist(),
        "distance": [round(d, 5) for d in distances.tolist()],
        "who": pair.who,
        "seed": pair.seed,
        "threshold": round(threshold, 5),
        "l2": round(metrics.l2(attacked, pair.presented).mean().item(), 5),
        "linf": round(metrics.linf(attacked, pair.presented).max().item(), 5),
        "seconds": {"attack": attack_seconds / len(clean), "defence": defence_seconds / len(clean)},
    }


def check(cell: Cell, own: Own = None) -> None:
    """Raise ``Invalid`` for an unknown name, a way that does not fit, or an own module in training mode."""
    own = own or {}
    for what, name, known in (
        ("attack", cell.attack, [*ATTACKS, *own]),
        ("defence", cell.defence, [*DEFENCES, *own]),
        ("recogniser", cell.recogniser, recognisers.NAMES),
        ("recogniser", cell.source or cell.recogniser, recognisers.NAMES),
        ("goal", cell.goal, GOALS),
        ("way", cell.way, ["static", *dict.fromkeys(way for ways in WAYS.values() for way in ways)]),
    ):
        if name not in known and not (what == "recogniser" and recognisers.known(name)):
            raise Invalid(f'There is no {what} "{name}"{nearest(name, known)}; there are {", ".join(known)}.')
    if cell.way in ("measured", "surrogate") and cell.defence not in DIFFUSION:
        raise Invalid(f'The way "{cell.way}" is for {", ".join(DIFFUSION)}, not for {cell.defence}.')
    if cell.way not in ("static", *WAYS["none"]) and cell.defence == "none":
        raise Invalid("Without a defence there is nothing to adapt to: the way is static, gradient or queries.")
    if cell.way == "stand-in" and cell.defence not in smooth.STAND_INS:
        raise Invalid(f'The way "stand-in" is for {", ".join(smooth.STAND_INS)}, not for {cell.defence}.')
    objectives.evaluating(own.get(cell.attack), own.get(cell.defence))


def data(name: str, device: str | torch.device = "cpu") -> tuple[faces.FaceSet, faces.FaceSet, pairs.Pairs]:
    """People to choose thresholds on, photos, and pairs of these photos that show other people.

    LFW's test half has 1,711 people. Thresholds are chosen on the first half of them, by name, and the pairs are the
    published test pairs of the others. In any other set thresholds are chosen on the first half of the people, and
    the pairs are all pairs of the second half. Parameters and errors as for ``faces.load``.
    """
    found = faces.load(name, device=device)
    if found.name == "lfw":
        names = sorted(pairs.lfw_people(found, "test"))
        early = set(names[: len(names) // 2])
        all_ = pairs.lfw_view1(found, "test")
        late = torch.tensor([name not in early for name in found.names])[found.labels]
        return found.people(sorted(early)), found, all_[late[all_.first] & late[all_.second]]
    half = len(found.names) // 2
    photos = found.people(found.names[half:])
    return found.people(found.names[:half]), photos, pairs.all_pairs(photos)


@functools.lru_cache(maxsize=8)
def _pairs(settings, goal, slow):
    """Photos, people and seeds of the pairs; ``presented`` have 8 bits already, because they are files."""
    _, photos, every = data(settings.faces_name, settings.device)
    chosen, seeds = [], []
    for seed in settings.seeds:
        # the same number is drawn for all defences, so that the slow ones' pairs are among the others' pairs
        drawn = pairs.sample(every, settings.pair_count, seed)
        drawn = drawn[drawn.same == (goal == "dodging")]
        drawn = drawn[: settings.slow_pair_count if slow else settings.pair_count]
        chosen += zip(drawn.first.tolist(), drawn.second.tolist())
        seeds += [seed] * len(drawn)
    if len(photos.labels.unique()) < 2:
        raise Invalid(f'The benchmark needs photos of several people, and "{settings.faces_name}" shows only one.')
    draw = torch.Generator().manual_seed(settings.seeds[0])
    targets = []  # whom A3GN turns a face into: the enrolled person, or, for dodging, any other person
    for first, target in chosen:
        while photos.labels[target] == photos.labels[first]:
            target = torch.randint(len(photos), (1,), generator=draw).item()
        targets.append(target)
    first, second = np.array(chosen).T
    return SimpleNamespace(
        presented=photos[first].images,
        enrolled=photos[second].images,
        targets=photos[np.array(targets)].images,
        who=[photos.names[photos.labels[i]] for i in first],
        seed=seeds,
    )


@functools.lru_cache(maxsize=4)
def _recogniser(name, settings):
    """A recogniser and its threshold at the false accept rate on the calibration people."""
    recogniser, (people, *_) = recognisers.load(name, settings.device), data(settings.faces_name)
    every, embeddings = pairs.all_pairs(people), recognisers.embed_faces(recogniser, people)
    distances = pair_distances(recogniser, embeddings, every[~every.same])
    return recogniser, threshold_at_far(distances, settings.far)


@functools.lru_cache(maxsize=8)
def _enrolled(name, settings, goal, slow):
    """Embeddings of the enrolled photos, which no cell changes."""
    return recognisers.embed_all(_recogniser(name, settings)[0], _pairs(settings, goal, slow).enrolled)


def _noise(images, objective, knobs):
    """A control that is no attack: each colour of each pixel goes up or down by eps, at random."""
    draw = torch.Generator().manual_seed(knobs.seed)
    signs = torch.randint(2, images.shape, generator=draw) * 2 - 1
    return (images + knobs.eps * signs.to(images)).clamp(0, 1)


def _pgd(images, objective, knobs):
    """PGD from several random starts; each image keeps the start that ends with the lowest loss."""
    best, lowest, rows = images, None, torch.arange(len(images), device=images.device)
    for start in range(knobs.restarts):
        made = attacks.pgd(images, objective, seed=knobs.seed + 1000 * start, **knobs.iterated)
        if knobs.restarts == 1:
            return made
        with torch.no_grad():
            parts = zip(made.split(BATCH), rows.split(BATCH))
            loss = torch.cat([objective(z, part, exact=True)[0].float() for z, part in parts])
        better = torch.ones_like(loss, dtype=torch.bool) if lowest is None else loss < lowest
        best = torch.where(better[:, None, None, None], made, best)
        lowest = loss if lowest is None else torch.where(better, loss, lowest)
    return best


def _square(images, objective, knobs):
    return attacks.square(images, objective, eps=knobs.eps, queries=knobs.queries, seed=knobs.seed, batch=BATCH)


def _pfgvm(images, objective, knobs):
    """P-FGVM has no eps: alpha makes its first step a quarter as long as a change by eps in every pixel."""
    lengths = []
    for rows in torch.arange(len(images)).split(BATCH):
        x = images[rows].requires_grad_(True)
        (slope,) = torch.autograd.grad(objective(x, rows)[0].sum(), x)
        lengths.append(slope.flatten(1).norm(dim=1))
    alpha = 0.25 * knobs.eps * images[0].numel() ** 0.5 / torch.cat(lengths).mean().item()
    lam = 0.03 / alpha if alpha else 0.0
    return attacks.pfgvm(images, objective, alpha=alpha, lam=lam, steps=knobs.steps, batch=BATCH)


def _a3gn(images, objective, knobs):
    """The shipped network has a bound of its own, and is told its targets as dlib's embeddings."""
    network, eyes = _generator(images.device)
    wanted = recognisers.embed_all(eyes, knobs.targets)
    with torch.no_grad():
        return torch.cat([network(x, z) for x, z in zip(images.split(BATCH), wanted.split(BATCH))])


ATTACKS = {
    "none": lambda x, objective, knobs: x,
    "noise": _noise,
    "FGSM": lambda x, objective, knobs: attacks.fgsm(x, objective, eps=knobs.eps, batch=BATCH),
    "I-FGSM": lambda x, objective, knobs: attacks.ifgsm(x, objective, **knobs.iterated),
    "PGD": _pgd,
    "MI-FGSM": lambda x, objective, knobs: attacks.mifgsm(x, objective, **knobs.iterated),
    "P-FGVM": _pfgvm,
    "A3GN": _a3gn,
    "Square": _square,
}


def _attacked(cell, settings, own):
    """The presented photos after the attack, rounded to 8 bits, and the seconds it took."""
    own, slow = own or {}, cell.defence in DIFFUSION
    made_with = dataclasses.replace(cell, recogniser=cell.source or cell.recogniser, source="")
    if cell.way == "static":  # the same for all defences and judges, so it is made once
        return _made(dataclasses.replace(made_with, defence="none"), slow, settings, own.get(cell.attack))
    return _make(made_with, slow, settings, own.get(cell.attack), own.get(cell.defence))


def _make(cell, slow, settings, attack=None, defence=None):
    """The attack of a cell on its recogniser; attack and defence: own callables. slow: on the pairs for diffusion."""
    pair, (recogniser, threshold) = _pairs(settings, cell.goal, slow), _recogniser(cell.recogniser, settings)
    want = objectives.dodging if cell.goal == "dodging" else objectives.impersonation
    objective = want(recogniser, _enrolled(cell.recogniser, settings, cell.goal, slow), threshold)
    # these two run the diffusion in every step
    steps = settings.slow_steps if slow and cell.way in ("bpda", "surrogate") else settings.steps
    eps, seed = cell.eps_255 / 255, settings.seeds[0]
    lucky = cell.defence in RANDOM and cell.way not in ("static", "measured")
    iterated = {"eps": eps, "steps": steps, "keep_best": not lucky, "batch": BATCH}
    restarts = 1 if cell.way == "static" else settings.restarts
    knobs = SimpleNamespace(eps=eps, steps=steps, seed=seed, targets=pair.targets, iterated=iterated, restarts=restarts)
    knobs.queries = max(1, settings.queries // 10) if slow else settings.queries
    if cell.way != "static":
        known = _defence(cell.defence, settings, {cell.defence: defence} if defence else None, OTHER_DRAWS)
        objective = _behind(cell.way, cell.defence, known, objective, settings)
    x = pair.presented.clone()  # an own attack may work in place
    started = time.perf_counter()
    named = "Square" if cell.way == "queries" else cell.attack
    made = attack(x, objective) if attack else ATTACKS[named](x, objective, knobs)
    return quantise(_images(made, pair.presented, cell.attack)), time.perf_counter() - started


def _images(made, like, name):
    """What an attack or a defence made, as float32 in [0, 1] without a graph. ``Invalid`` for anything but images."""
    shaped = isinstance(made, torch.Tensor) and made.shape == like.shape and made.is_floating_point()
    if not shaped or not ((made >= -1e-6) & (made <= 1 + 1e-6)).all():  # NaN is neither
        said = f'"{name}" must return finite images of the shape that it was given, {tuple(like.shape)}'
        raise Invalid(f"{said}, as floating-point numbers in [0, 1].")
    return made.detach().float().clamp(0, 1)


_made = functools.lru_cache(maxsize=16)(_make)
_generator = functools.cache(lambda device: (a3gn.load().to(device), recognisers.load("dlib", device)))
_fixed = functools.lru_cache(maxsize=16)(purifiers.load)
_prior = functools.cache(prior.load)
_photos = functools.cache(faces.fingerprint)


def _behind(way, name, defence, objective, settings):
    """The objective of an attacker who knows the defence."""
    if way == "bpda":
        defence = adaptive.straight_through(defence)
    elif way == "stand-in":
        defence = adaptive.straight_through(defence, smooth.STAND_INS[name]())
    elif way == "measured":
        defence = ddnm.measured(defence)
    elif way == "surrogate":
        defence = ddnm.Shortened(defence, steps=settings.surrogate_steps).eval()
    return adaptive.through(defence, objective, settings.eot_samples if way in ("eot", "surrogate") else 1)


def _defence(name, settings, own=None, other_draws=0):
    """A defence by its name. Random defences start their series of draws anew."""
    seed = settings.seeds[0] + other_draws
    if name == "none":
        return torch.nn.Identity().eval()
    if own and name in own:
        return own[name]
    if name == "randomization":
        return purifiers.load(name, seed=seed)
    if name in DIFFUSION:
        options = {"steps": settings.sampling_steps, "stages": "both" if name == "two-stage" else name}
        return ddnm.TwoStage(*_prior(), seed=seed, **options).to(precision.device(settings.device)).eval()
    return _fixed(name, settings.device)


def version(cell: Cell, settings: Settings, own: Own = None) -> str:
    """A hash of the content of everything that a row depends on.

    Parameters
    ----------
    cell, settings, own : as for ``measure``
    """
    where = precision.device(settings.device)
    return cache.key(
        [dataclasses.asdict(cell), dataclasses.asdict(settings) | {"device": where.type}],
        [_code(), _photos(settings.faces_name)],
        datasets.lfw_lists() if settings.faces_name == "lfw" else [],
        [
            weights.shipped(),
            {name: sha256 for name, sha256 in weights.fetched().items() if name in (cell.recogniser, cell.source)},
            [frbench.file(name) for name in (cell.recogniser, cell.source) if name.startswith(frbench.PREFIX)],
        ],
        [precision.has_bfloat16(where), cache.versions()],
        [_fingerprint(own[name]) for name in (cell.attack, cell.defence) if own and name in own],
    )


@functools.cache
def _code():
    """A hash of the package's sources that decide what a cell measures."""
    package = Path(__file__).parents[1]
    files = [path for room in ("*.py", "networks/*.py", "store/*.*") for path in sorted(package.glob(room))]
    return cache.key([path for path in files if path.name not in NO_PART], Path(__file__))


def _fingerprint(function):
    """A hash of an own callable: what it refers to, by value or by the source of the module that it comes from."""
    file = io.BytesIO()
    # without the file and the line of a function, which are others in every kernel
    placeless = {CodeType: lambda code: (tuple, ((code.co_code, code.co_consts, code.co_names, code.co_freevars),))}
    table = ChainMap(placeless, cloudpickle.Pickler.dispatch_table)
    type("Pickler", (cloudpickle.Pickler,), {"dispatch_table": table})(file).dump(function)
    words = {word for _, word, _ in pickletools.genops(file.getvalue()) if isinstance(word, str)}
    named = [getattr(sys.modules[word], "__file__", None) for word in sorted(words & sys.modules.keys() - {"__main__"})]
    return cache.key(file.getvalue(), [Path(place) for place in named if place])
