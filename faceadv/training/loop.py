"""One loop for all trainings: checkpoints that survive a kill, a log, a learning rate.

A recipe is a module of this room with ``SETTINGS`` (a dict for each profile), ``photos`` (what is learned from),
``train`` (hands a ``Plan`` to ``loop.train``, returns ``(network, log)``) and ``write`` (ships a checkpoint).
"""

import contextlib
import dataclasses
import importlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from faceadv import faces, pairs, precision
from faceadv.errors import Failed, Invalid, Missing, UserError
from faceadv.store import cache, progress, weights
from faceadv.store.paths import cache_root, nearest, replacing
from faceadv.training import RECIPES

__all__ = ["Plan", "append", "checkpoint", "complete", "descend", "generator", "one_cycle", "read_log", "run", "ship"]
__all__ += ["students", "train", "write_log"]

CHECKPOINT, LOG = "last.pt", "log.jsonl"
EVERY = 100  # steps between two checkpoints
MEAN = 50  # one row of a shipped log is the mean of so many steps
WARM = 0.1  # share of the steps in which the learning rate rises
Place = str | Path | None
Device = str | torch.device


@dataclasses.dataclass
class Plan:
    """What one training consists of. The loop does the rest."""

    recipe: str
    settings: dict  # all of them, among them "steps" and "lr"
    data: tuple  # arrays, tensors and networks that are learned from; their hash goes into the checkpoint
    modules: dict  # by name, whatever has state_dict and load_state_dict
    optimisers: dict
    step: Callable[[int, torch.Generator], dict]  # makes step 0, 1, …; returns its losses as floats
    rate: Callable[[int], float] | None = None  # learning rate of a step; by default one cycle over all steps
    extra: dict = dataclasses.field(default_factory=dict)  # by name, dicts of numbers that the steps carry along
    sheet: Callable[[], torch.Tensor] | None = None  # makes a picture (3, H, W) to be saved with each checkpoint


def train(
    plan: Plan, out: Place = None, resume: bool = False, seed: int = 0, device: Device = "cpu"
) -> list[dict[str, float]]:
    """Train the modules of a plan in place and freeze them; returns the log, one dict of "step" and losses per step.

    Parameters
    ----------
    plan : what to train, and how
    out : folder for ``last.pt``, written every ``EVERY`` steps, and ``log.jsonl``; by default nothing is kept
    resume : go on from the checkpoint in ``out``, if there is one; on a CPU the run then ends with the same weights as
        one that was not killed
    seed, device : of what the steps draw (the recipe seeds the weights), and where the modules are

    Raises
    ------
    Invalid : if there is a checkpoint, but not to resume, or one of another recipe, seed, setting or data
    Failed : if it is damaged, if another training is at work in ``out``, or if ``out`` cannot be written
    """
    out = out and Path(out)
    try:
        with _alone(out):
            rows = _descend(plan, out, resume, seed, device)
    except OSError as e:
        if not out or isinstance(e, UserError):
            raise
        raise Failed(f"{out} cannot be written ({e.strerror or e}): make room for it, then resume the training.") from e
    for module in plan.modules.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    return rows


def _alone(out):
    """A context in which nobody else trains in a folder."""
    if not out:
        return contextlib.nullcontext()
    busy = f"Another training is at work in {out}: wait for its end, or name another folder."
    return cache.lock(f"train-{cache.key(str(out.resolve()))}", busy, wait=False)


def _descend(plan, out, resume, seed, device):
    """Make the steps that are not made yet; returns the rows of all."""
    steps, start, rows = plan.settings["steps"], 0, []
    if out:
        identity = {"recipe": plan.recipe, "seed": seed, **plan.settings, "data": cache.key(plan.data)}
        identity = json.loads(json.dumps(identity, default=cache.key))  # tuples as lists, tensors as hashes
        start, rows = _begin(plan, identity, out, resume, device)
    for number in progress.bar(range(start, steps), initial=start, total=steps, desc=f"training {plan.recipe}"):
        rate = plan.rate(number) if plan.rate else one_cycle(number, steps, plan.settings["lr"])
        for group in (group for optimiser in plan.optimisers.values() for group in optimiser.param_groups):
            group["lr"] = rate
        rows.append({"step": number + 1, **plan.step(number, generator(seed, number))})
        if out:
            append(out / LOG, rows[-1])
            if (number + 1) % EVERY == 0 or number + 1 == steps:
                _save(plan, identity, out, number + 1)
    return rows


def _spare(out, resume):
    """Hours of training are not to be lost by a forgotten option."""
    if out and not resume and (out / CHECKPOINT).exists():
        raise Invalid(f"{out / CHECKPOINT} is of an earlier run: resume it, name another folder, or delete it.")


def _begin(plan, identity, out, resume, device):
    """Clear the folder, or load its checkpoint and cut its log to it: (number of steps made, their rows)."""
    _spare(out, resume)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / CHECKPOINT).exists():
        for old in (out / LOG, *out.glob("sheet-*.png")):
            old.unlink(missing_ok=True)
        return 0, []
    state = checkpoint(out)
    other = [name for name in identity | state["run"] if identity.get(name, ...) != state["run"].get(name, ...)]
    if other:
        raise Invalid(
            f"{out / CHECKPOINT} is of a run with another {', '.join(other)}: name another folder, or delete it."
        )
    try:
        for name, module in plan.modules.items():
            module.load_state_dict(state["modules"][name])
            module.to(device)
        for name, optimiser in plan.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        for name, numbers in plan.extra.items():
            numbers.update(state["extra"][name])
    except (RuntimeError, KeyError, ValueError) as e:  # the code has changed meanwhile
        raise Failed(f"{out / CHECKPOINT} is of another version of {plan.recipe}: train anew, without resuming.") from e
    rows = read_log(out / LOG) if (out / LOG).exists() else []
    rows = [row for row in rows if row["step"] <= state["step"]]  # the others will be written again
    write_log(out / LOG, rows)
    return state["step"], rows


def _save(plan, identity, out, step):
    """Write a checkpoint whole or not at all: a kill at any point leaves the last one."""
    state = {"step": step, "run": identity, "extra": plan.extra}
    for kind in ("modules", "optimisers"):
        state[kind] = {name: thing.state_dict() for name, thing in getattr(plan, kind).items()}
    content = io.BytesIO()  # writing to a full disk, torch itself says only that a position is unexpected
    torch.save(state, content)
    with replacing(out / CHECKPOINT) as part:
        part.write_bytes(content.getbuffer())
    if plan.sheet:
        from torchvision.utils import save_image  # takes seconds

        with replacing(out / f"sheet-{step:06d}.png") as part:
            save_image(plan.sheet(), part, format="png")


def checkpoint(out: str | Path) -> dict:
    """The checkpoint in a run's folder: "step", "run" (recipe, seed, settings), "modules", … on the CPU.

    Raises ``Missing`` if there is none, ``Failed`` if it is damaged or an earlier version wrote it.
    """
    path = Path(out) / CHECKPOINT
    try:
        with zipfile.ZipFile(path) as file:
            whole = file.testzip() is None  # torch does not look at the checksums
        state = torch.load(path, map_location="cpu", weights_only=True) if whole else {}
        return {key: state[key] for key in ("step", "run", "extra", "modules", "optimisers")}
    except FileNotFoundError as e:
        raise Missing(f"There is no checkpoint {path}: train first.") from e
    except (OSError, MemoryError):
        raise
    except Exception as e:  # torch raises a dozen kinds for a file that is not its own
        raise Failed(f"{path} is damaged, or of an earlier version: train anew, without resuming.") from e


def read_log(path: str | Path, every: int = 1) -> list[dict]:
    """The rows of a JSON-lines file; with ``every`` > 1 each row is the mean of so many.

    What follows the last line break is left out: a kill or a full disk cut it short. Other damage raises ``Failed``.
    """
    text, means = Path(path).read_text(encoding="utf-8", errors="replace"), []
    try:
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        _ = [row["step"] + 1 for row in rows]
    except (ValueError, KeyError, TypeError) as e:
        raise Failed(f"{path} is damaged: delete the lines that are no rows of it.") from e
    for part in (rows[i : i + every] for i in range(0, len(rows), every)):
        terms = {term: [row[term] for row in part if term in row] for term in part[-1] if term != "step"}
        means.append({"step": part[-1]["step"]} | {term: round(sum(v) / len(v), 6) for term, v in terms.items()})
    return means


def append(path: Path, row: dict) -> None:
    """Append one row, a dict with "step", to such a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")


def write_log(path: Path, rows: list[dict]) -> None:
    """Write rows as such a file, whole or not at all."""
    with replacing(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def one_cycle(step: int, steps: int, peak: float) -> float:
    """The learning rate at one of ``steps``: it rises linearly to ``peak`` over the share ``WARM`` of the steps.

    Then it falls to zero along half a cosine.

    Parameters
    ----------
    step, steps : the number of the step, from 0, and how many there are
    peak : the largest rate
    """
    warm = WARM * steps
    if step < warm:
        return min(peak, peak * (step + 1) / warm)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def generator(seed: int, step: int) -> torch.Generator:
    """A random generator that depends on seed and step alone, so that a resumed run draws the same numbers."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def descend(
    optimiser: torch.optim.Optimizer, loss: torch.Tensor, clipped: Sequence[torch.Tensor] = (), norm: float = math.inf
) -> None:
    """One step of an optimiser.

    Parameters
    ----------
    optimiser, loss : what steps, and the scalar whose gradient it follows
    clipped, norm : the gradient of these parameters together is shortened to this length if it is longer
    """
    optimiser.zero_grad()
    loss.backward()
    if clipped:
        torch.nn.utils.clip_grad_norm_(clipped, norm)
    optimiser.step()


def complete(settings: dict, profiles: dict[str, dict]) -> dict:
    """Settings in which whatever is missing is as in the profile lfw. Raises ``Invalid`` for an unknown name."""
    for name in settings.keys() - profiles["lfw"].keys():
        raise Invalid(f'There is no setting "{name}"{nearest(name, profiles["lfw"])}.')
    return profiles["lfw"] | settings


def students(root: Place = None) -> faces.FaceSet:
    """LFW's training people: nothing here learns from anybody else."""
    lfw = faces.load("lfw", root)
    return lfw.people(pairs.lfw_people(lfw, "train"))


def run(
    name: str, profile: str = "lfw", resume: bool = False, seed: int = 0, root: Place = None, out: Place = None
) -> Path:
    """Train a network with the settings of a profile; returns the folder of the run.

    Parameters
    ----------
    name, profile : one of ``RECIPES``, and a key of its ``SETTINGS``
    resume, seed : as for ``train``
    root : folder with data sets; by default ``FACEADV_DATA``
    out : folder of the run; by default one in the cache

    Raises
    ------
    Invalid : for an unknown name or profile, and as for ``train``
    Missing : without LFW
    Failed : as for ``train``
    """
    recipe, out, device = _recipe(name), _folder(name, profile, out), precision.device("auto")
    if profile not in recipe.SETTINGS:
        raise Invalid(f'{name} has no profile "{profile}"; there are {", ".join(recipe.SETTINGS)}.')
    with _alone(out):  # it is said at once, before photos are aligned and cloaked
        _spare(out, resume)
        data = recipe.photos(profile, root, seed, device)
        recipe.train(*data, recipe.SETTINGS[profile], out=out, resume=resume, seed=seed, device=device)
    return out


def ship(name: str, profile: str = "lfw", out: Place = None, root: Place = None) -> Path:
    """Write the shipped files and log from the checkpoint of a run; returns the path of the weights.

    Parameters
    ----------
    name, profile, out : as for ``run``
    root : folder with data sets, because a threshold is chosen on photos

    Raises
    ------
    Missing : if there is no checkpoint, or no LFW where it is needed
    Invalid : if the run has not ended, or trained another network
    """
    recipe, out = _recipe(name), _folder(name, profile, out)
    state = checkpoint(out)
    if state["run"]["recipe"] != name:
        raise Invalid(f"{out} holds a training of {state['run']['recipe']}, not of {name}.")
    if state["step"] != state["run"]["steps"]:
        raise Invalid(f"The run in {out} has made {state['step']} of {state['run']['steps']} steps: resume it first.")
    path = recipe.write(state, root)
    write_log(weights.SHIPPED / f"{name}.{LOG}", read_log(out / LOG, MEAN))
    return path


def _recipe(name):
    if name not in RECIPES:
        raise Invalid(f'There is no network "{name}" to train{nearest(name, RECIPES)}; there are {", ".join(RECIPES)}.')
    return importlib.import_module(f"faceadv.training.{name}")


def _folder(name, profile, out):
    return Path(out) if out else cache_root() / "train" / f"{name}-{profile}"
