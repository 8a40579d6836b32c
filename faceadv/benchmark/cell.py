"""One cell of the benchmark: an attack against a defence, on one recogniser, for one goal, measured on pairs of faces.

The protocol is notebook 07's. A pair is an enrolled photo, which the attacker knows and nobody changes, and a presented
one, which is attacked, rounded to 8 bits as a file would be, and purified by the defence. The recogniser decides by a
threshold that was chosen without any defence, at a false accept rate, on pairs of other people. *Right* means: a pair
of one person is accepted (dodging fails), a pair of two people rejected (impersonation fails).
"""

import dataclasses
import functools
import hashlib
import inspect
import io
import time
from collections import ChainMap
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import ClassVar

import cloudpickle
import numpy as np
import torch

from faceadv import adaptive, attacks, ddnm, faces, metrics, objectives, pairs, purifiers, recognisers, verification
from faceadv.errors import Invalid
from faceadv.images import quantise
from faceadv.networks import a3gn, prior
from faceadv.precision import has_bfloat16
from faceadv.store.paths import nearest
from faceadv.store.weights import SHIPPED

GOALS = ("dodging", "impersonation")
DIFFUSION = ("super-resolution", "colourisation", "two-stage")
DEFENCES = (
    *("none", "jpeg", "bit-depth", "blur", "median", "total-variation", "randomization", "resgn", "puface"),
    *DIFFUSION,
)
# What an attacker who knows the defence tries: the gradient through it (of one draw, or of several: EOT), BPDA where it
# has none or a poor one, and for diffusion what it measures, alone, and a shortened surrogate with EOT. The full
# gradient through all steps of a diffusion is left out for its cost.
WAYS = {
    "none": (),
    "jpeg": ("bpda",),
    "bit-depth": ("bpda",),
    "blur": ("gradient",),
    "median": ("gradient", "bpda"),
    "total-variation": ("gradient", "bpda"),
    "randomization": ("gradient", "eot"),
    "resgn": ("gradient",),
    "puface": ("gradient",),
} | dict.fromkeys(DIFFUSION, ("measured", "surrogate", "bpda"))
RANDOM = ("randomization", *DIFFUSION)  # the lowest loss through these may be a lucky draw: the last iterate is taken
OTHER_DRAWS = 10_000  # added to the seed of a defence for the attacker, who does not know the draws that are judged
BATCH = 32


@dataclasses.dataclass(frozen=True)
class Cell:
    """A place in the grid. source: the recogniser that the attack is made with, by default the one that is judged."""

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

    pair_count is for each seed and goal. The slow defences, those of diffusion, have settings of their own; their
    pairs are the first of the others' pairs. steps: of iterative attacks, slow_steps: of those through a diffusion.
    """

    faces_name: str = "orl"
    seeds: tuple = (0, 1)
    far: float = 1e-3
    pair_count: int = 10
    slow_pair_count: int = 4
    steps: int = 10
    slow_steps: int = 5
    sampling_steps: int = 10
    surrogate_steps: int = 2
    eot_samples: int = 4


def measure(cell, settings, own=None):
    """The row of a cell: its fields and ``right``, ``distance``, ``who``, ``seed`` (a list each, an entry a pair).

    Besides: ``l2``, the mean length, and ``linf``, the largest change of the attack, in [0, 1]; ``seconds`` an image
    that the attack and the defence took. own: {name: callable} of attacks (images, objective) -> images and defences
    images -> images that are not built in. Raises ``ValueError`` for a name that is neither.
    """
    check(cell, own)
    slow = cell.defence in DIFFUSION
    pair = _pairs(settings, cell.goal, slow)
    judge, threshold = _recogniser(cell.recogniser, settings)
    attacked, attack_seconds = _attacked(cell, settings, own)
    defence = _defence(cell.defence, settings, own)
    started = time.perf_counter()
    clean = _purified(attacked, defence)
    defence_seconds = time.perf_counter() - started
    distances = judge.distance(
        recognisers.embed_all(judge, clean), _enrolled(cell.recogniser, settings, cell.goal, slow)
    )
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


def check(cell, own=None):
    """Raise ``ValueError`` for a cell with a name that nobody knows."""
    own = own or {}
    for what, name, known in (
        ("attack", cell.attack, [*ATTACKS, *own]),
        ("defence", cell.defence, [*DEFENCES, *own]),
        ("goal", cell.goal, GOALS),
        ("way", cell.way, ["static", "gradient", "eot", "bpda", "measured", "surrogate"]),
    ):
        if name not in known:
            raise Invalid(f'There is no {what} "{name}"{nearest(name, known)}; there are {", ".join(known)}.')
    if cell.way in ("measured", "surrogate") and cell.defence not in DIFFUSION:
        raise Invalid(f'The way "{cell.way}" is for {", ".join(DIFFUSION)}, not for {cell.defence}.')
    if cell.way != "static" and cell.defence == "none":
        raise Invalid("Without a defence there is nothing to adapt to: the way is static.")


# -- the data --


def data(name):
    """``(calibration, photos, pairs)``: a FaceSet of people to choose thresholds on, and pairs of other people.

    LFW: of the 1,711 people of View 1's test half the first half, by name, and the published test pairs of the others.
    Any other set: the first half of its people, and all pairs of the second.
    """
    found = faces.load(name)
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
    """Photos, people and seeds of the pairs; ``presented`` are rounded already, being files."""
    _, photos, every = data(settings.faces_name)
    chosen = {"first": [], "second": [], "seed": []}
    for seed in settings.seeds:
        # drawn at one number whether slow or not, so that the slow ones' pairs are among the others'
        drawn = pairs.sample(every, settings.pair_count, seed)
        drawn = drawn[drawn.same == (goal == "dodging")]
        count = settings.slow_pair_count if slow else settings.pair_count
        chosen["first"] += drawn.first[:count].tolist()
        chosen["second"] += drawn.second[:count].tolist()
        chosen["seed"] += [seed] * len(drawn.first[:count])
    draw = torch.Generator().manual_seed(settings.seeds[0])
    targets = []  # whom A3GN makes of a face: the enrolled person, or to dodge just anybody else
    for first, second in zip(chosen["first"], chosen["second"]):
        target = second
        while photos.labels[target] == photos.labels[first]:
            target = torch.randint(len(photos), (1,), generator=draw).item()
        targets.append(target)
    return SimpleNamespace(
        presented=photos[np.array(chosen["first"])].images,
        enrolled=photos[np.array(chosen["second"])].images,
        targets=photos[np.array(targets)].images,
        who=[photos.names[photos.labels[i]] for i in chosen["first"]],
        seed=chosen["seed"],
    )


@functools.lru_cache(maxsize=4)
def _recogniser(name, settings):
    """A recogniser and its threshold at the false accept rate on the calibration people."""
    recogniser, (people, *_) = recognisers.load(name), data(settings.faces_name)
    every = pairs.all_pairs(people)
    embeddings = recognisers.embed_faces(recogniser, people)
    distances = verification.pair_distances(recogniser, embeddings, every[~every.same])
    return recogniser, verification.threshold_at_far(distances, settings.far)


@functools.lru_cache(maxsize=8)
def _enrolled(name, settings, goal, slow):
    """Embeddings of the enrolled photos, which no cell changes."""
    return recognisers.embed_all(_recogniser(name, settings)[0], _pairs(settings, goal, slow).enrolled)


# -- the attacks --


def _noise(images, objective, knobs):
    """No attack, a control: each colour of each pixel by eps up or down, at random."""
    draw = torch.Generator().manual_seed(knobs.seed)
    signs = torch.randint(2, images.shape, generator=draw) * 2 - 1
    return (images + knobs.eps * signs).clamp(0, 1)


def _pfgvm(images, objective, knobs):
    """P-FGVM has no eps. Its first step is a quarter as long as eps in every pixel, its penalty 0.03 of a step."""
    lengths = []
    for rows in torch.arange(len(images)).split(BATCH):
        x = images[rows].requires_grad_(True)
        (slope,) = torch.autograd.grad(objective(x, rows)[0].sum(), x)
        lengths.append(slope.flatten(1).norm(dim=1))
    alpha = 0.25 * knobs.eps * images[0].numel() ** 0.5 / torch.cat(lengths).mean().item()
    lam = 0.03 / alpha if alpha else 0.0
    return attacks.pfgvm(images, objective, alpha=alpha, lam=lam, steps=knobs.steps, batch=BATCH)


def _a3gn(images, objective, knobs):
    """The shipped network has a bound of its own, and knows targets by dlib's embeddings."""
    network, eyes = _generator()
    wanted = recognisers.embed_all(eyes, knobs.targets)
    with torch.no_grad():
        return torch.cat([network(x, z) for x, z in zip(images.split(BATCH), wanted.split(BATCH))])


@functools.cache
def _generator():
    return a3gn.load(), recognisers.load("dlib")


ATTACKS = {
    "none": lambda x, objective, knobs: x,
    "noise": _noise,
    "FGSM": lambda x, objective, knobs: attacks.fgsm(x, objective, eps=knobs.eps, batch=BATCH),
    "I-FGSM": lambda x, objective, knobs: attacks.ifgsm(x, objective, **knobs.iterated),
    "PGD": lambda x, objective, knobs: attacks.pgd(x, objective, seed=knobs.seed, **knobs.iterated),
    "MI-FGSM": lambda x, objective, knobs: attacks.mifgsm(x, objective, **knobs.iterated),
    "P-FGVM": _pfgvm,
    "A3GN": _a3gn,
}


def _attacked(cell, settings, own):
    """The presented photos after the attack, rounded to 8 bits, and the seconds it took."""
    source = cell.source or cell.recogniser
    slow = cell.defence in DIFFUSION
    if cell.way == "static":  # the same for all defences, so made once
        made = (own or {}).get(cell.attack)
        return _made("none", slow, cell.attack, source, cell.goal, "static", cell.eps_255, settings, made)
    mine = (own or {}).get(cell.attack), (own or {}).get(cell.defence)
    return _make(cell.defence, slow, cell.attack, source, cell.goal, cell.way, cell.eps_255, settings, *mine)


def _make(defence, slow, attack, source, goal, way, eps_255, settings, made=None, mine=None):
    pair, (recogniser, threshold) = _pairs(settings, goal, slow), _recogniser(source, settings)
    want = objectives.dodging if goal == "dodging" else objectives.impersonation
    objective = want(recogniser, _enrolled(source, settings, goal, slow), threshold)
    through = slow and way in ("bpda", "surrogate")  # these run the diffusion in every step
    steps = settings.slow_steps if through else settings.steps
    eps, seed = eps_255 / 255, settings.seeds[0]
    knobs = SimpleNamespace(eps=eps, steps=steps, seed=seed, targets=pair.targets)
    lucky = defence in RANDOM and way not in ("static", "measured")
    knobs.iterated = {"eps": eps, "steps": steps, "keep_best": not lucky, "batch": BATCH}
    if way != "static":
        own = None if mine is None else {defence: mine}
        objective = _behind(way, _defence(defence, settings, own, OTHER_DRAWS), objective, settings)
    started = time.perf_counter()
    # a copy, for what works in place
    x = made(pair.presented.clone(), objective) if made else ATTACKS[attack](pair.presented, objective, knobs)
    return quantise(x.detach()), time.perf_counter() - started


_made = functools.lru_cache(maxsize=16)(_make)


def _behind(way, defence, objective, settings):
    """The objective as an attacker sees it who knows the defence."""
    if way == "gradient":
        return adaptive.through(defence, objective)
    if way == "eot":
        return adaptive.through(defence, objective, settings.eot_samples)
    if way == "bpda":
        return adaptive.through(adaptive.straight_through(defence), objective)
    if way == "measured":
        return adaptive.through(ddnm.measured(defence), objective)
    short = ddnm.Shortened(defence, steps=settings.surrogate_steps)
    return adaptive.through(short, objective, settings.eot_samples)


# -- the defences --


def _defence(name, settings, own=None, other_draws=0):
    """A defence by name, the random ones with a fresh series of draws. None for "none"."""
    seed = settings.seeds[0] + other_draws
    if name == "none":
        return None
    if own and name in own:
        return own[name]
    if name == "randomization":
        return purifiers.load(name, seed=seed)
    if name in DIFFUSION:
        stages = "both" if name == "two-stage" else name
        return ddnm.TwoStage(*_prior(), steps=settings.sampling_steps, stages=stages, seed=seed)
    return _fixed(name)


_fixed = functools.lru_cache(maxsize=16)(purifiers.load)
_prior = functools.cache(prior.load)


@torch.no_grad()
def _purified(images, defence):
    if defence is None:
        return images
    return torch.cat([defence(part.clone()).float().clamp(0, 1) for part in images.split(2 * BATCH)])


# -- what a row depends on --


@functools.cache
def _code():
    """A hash of the sources and weights that decide what is measured."""
    here = Path(__file__).parents[1]
    rooms = [here, here / "networks", here / "store", Path(__file__).parent]
    parts = [path.read_bytes() for room in rooms for path in sorted(room.glob("*.py"))]
    return hashlib.sha256(b"".join([*parts, (SHIPPED / "SHA256SUMS").read_bytes()])).hexdigest()


def version(cell, settings, own=None):
    """A hash of all that a row depends on: cell, settings, code, weights, photos, precision, own callables."""
    mine = [own[name] for name in (cell.attack, cell.defence) if own and name in own]
    parts = [repr(cell), repr(settings), _code(), _photos(settings.faces_name), str(has_bfloat16("cpu"))]
    parts += [_fingerprint(function) for function in mine]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


_photos = functools.cache(faces.fingerprint)


class _Pickler(cloudpickle.Pickler):
    """Leaves out of functions where they were written, which is another place in every kernel."""

    dispatch_table: ClassVar = ChainMap(
        {CodeType: lambda code: (tuple, ((code.co_code, code.co_consts, code.co_names, code.co_freevars),))},
        cloudpickle.Pickler.dispatch_table,
    )


def _fingerprint(function):
    """By its pickle, which holds what a function of a notebook refers to, and its source, for one of a module."""
    try:
        source = inspect.getsource(function if inspect.isroutine(function) else type(function))
    except (OSError, TypeError):
        source = ""
    pickled = io.BytesIO()
    _Pickler(pickled).dump(function)
    return hashlib.sha256(pickled.getvalue() + source.encode()).hexdigest()
