"""The benchmark's grid: which cells it has, and how they are spread over processes or machines.

A finished cell is a file, written whole. So a run that was killed goes on where it was, and no cell is computed twice.
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from faceadv import adaptive, parallel, recognisers
from faceadv.benchmark.cell import DIFFUSION, GOALS, WAYS, Cell, Own, Settings, check, measure, version
from faceadv.errors import Invalid
from faceadv.store import cache, progress, weights

__all__ = ["BOUNDED", "NOTEBOOK", "plan", "present", "read", "run", "settings", "ways"]

NOTEBOOK = "07_benchmark"
BOUNDED = ("FGSM", "I-FGSM", "PGD", "MI-FGSM")  # the attacks that keep to the budget


def present(names: Iterable[str]) -> list[str]:
    """The recognisers of a list whose weights are here. Raises ``Invalid`` for an unknown name.

    Those of frbench are fetched if they are not here.
    """
    found = []
    for name in names:
        if name in recognisers.NAMES:
            with contextlib.suppress(FileNotFoundError):
                weights.find(name)
                found.append(name)
        else:
            recognisers.load(name)  # or its error says which names there are
            found.append(name)
    return found


def settings(values: Mapping) -> Settings:
    """The settings of a benchmark from the parameters of notebook 07. Errors as for ``Settings``."""
    names = {field.name for field in dataclasses.fields(Settings)} - {"seeds"}
    seeds = tuple(range(values["seed"], values["seed"] + values["repeats"]))
    return Settings(**{name: values[name] for name in names} | {"device": str(values["device"])}, seeds=seeds)


def plan(values: Mapping, judges: Sequence[str], own: Own = None) -> dict[str, list[Cell]]:
    """The cells of notebook 07 by what they are for.

    static      attacks × defences × recognisers × goals
    adaptive    for each defence, PGD in every way that knows it, and a random search
    curve       those that keep to a budget and the same ways, but for the search, at other budgets
    transfer    attacks made with one recogniser and judged by each, without a defence, at a budget of their own
    moved       MI-FGSM made with one recogniser, purified, and judged by another, at the same budget
    signs       of masked gradients, for some defences: random noise, one step, no bound, transfer

    Parameters
    ----------
    values : the notebook's parameters
    judges : names of recognisers, of which only the first has curves and signs
    own : defences that are not built in, by name

    Raises
    ------
    Invalid : if there are no judges
    """
    if not judges:
        raise Invalid("None of the recognisers is here: `faceadv weights list` shows which are.")
    judges, goals, eps, product = list(dict.fromkeys(judges)), GOALS, values["eps_255"], itertools.product
    attacks, defences = values["attack_names"], ["none", *values["simple_names"], *(own or {}), *values["paper_names"]]
    static = product(judges, goals, attacks, defences)
    knowing = product([judge for judge in judges if judge in values["adaptive_recognisers"]], goals, defences)
    whole = [name for name in defences if name not in DIFFUSION[:2]]  # without the single stages, which are slow
    curve = product(goals, whole, values["curve_eps_255"])
    made = [attack for attack in attacks if attack not in ("none", "A3GN")]
    transfer, far = product(goals, made, judges, judges), values["transfer_eps_255"]
    return {
        "static": [Cell(attack, defence, judge, goal, eps_255=eps) for judge, goal, attack, defence in static],
        "adaptive": [
            Cell("PGD", defence, judge, goal, way, eps)
            for judge, goal, defence in knowing
            for way in ways(defence, own)
        ],
        "curve": [
            Cell(attack, defence, judges[0], goal, way, other)
            for goal, defence, other in curve
            for attack, way in [
                *((attack, "static") for attack in attacks if attack in BOUNDED),
                *(("PGD", way) for way in ways(defence, own) if way != "queries"),
            ]
        ],
        "transfer": [
            Cell(attack, "none", judge, goal, "static", far, source if source != judge else "")
            for goal, attack, source, judge in transfer
        ],
        "moved": [
            Cell("MI-FGSM", defence, judge, goal, "static", far, source)
            for goal, defence, (source, judge) in product(goals, defences, itertools.permutations(judges, 2))
        ],
        "signs": [cell for defence in values["sign_defences"] for cell in _signs(defence, judges, eps, own)],
    }


def _signs(defence, judges, eps, own):
    known = ways(defence, own)[:1]
    cells = [("noise", "static", eps), *(("FGSM", way, eps) for way in known)]
    cells += [("PGD", way, 255.0) for way in ("static", *known)]
    cells += [("PGD", "static", eps, source) for source in judges[1:2]]
    return [Cell(attack, defence, judges[0], "dodging", *rest) for attack, *rest in cells]


def ways(defence: str, own: Own = None) -> tuple[str, ...]:
    """The ways of the attacks that know a defence; for one that is not built in, its gradient too if it has one."""
    if defence in WAYS:
        return WAYS[defence]
    gradient = ("gradient",) if own and defence in own and adaptive.differentiable(own[defence]) else ()
    return (*gradient, "bpda", "queries")


def _place(folder, cell, key):
    """The file of a finished cell."""
    words = [cell.recogniser, cell.goal, cell.attack, cell.defence, cell.way, f"{cell.eps_255:g}"]
    words += [f"from {cell.source}"] if cell.source else []
    slug = re.sub(r"[^\w.-]+", "-", "_".join(words))
    return Path(folder) / f"{slug}_{key[:12]}.json"


def run(
    cells: Iterable[Cell],
    settings: Settings,
    folder: Path | str,
    scheduler: str = "single",
    workers: int | None = None,
    own: Own = None,
) -> pd.DataFrame:
    """The rows of all cells, in their order. Cells that are not finished in ``folder`` are measured first.

    A file that is not as it was written, or is of another cell or version, is not used, and one line says so.
    The rows are the same with any scheduler, bit for bit if the processes have the same number of threads.

    Parameters
    ----------
    cells : those of ``plan``, for example; one that comes twice is measured once
    settings, own : as for ``cell.measure``, with its errors
    folder : where the files of finished cells are
    scheduler, workers : as for ``parallel.compute``, with its errors
    """
    cells = list(dict.fromkeys(cells))
    for cell in cells:
        check(cell, own)
    keys = {cell: version(cell, settings, own) for cell in cells}
    rows = {cell: _read(folder, cell, key) for cell, key in keys.items()}
    todo = [cell for cell in cells if rows[cell] is None]
    with progress.bar(total=len(cells), initial=len(cells) - len(todo), desc="cells", unit="cell") as bar:
        for cell, row in parallel.compute(measure, todo, scheduler, workers, settings=settings, own=own):
            cache.write_json(_place(folder, cell, keys[cell]), {"key": keys[cell], "row": row})
            rows[cell] = row
            bar.update()
    return pd.DataFrame(list(rows.values()))


def read(cells: Iterable[Cell], settings: Settings, folder: Path | str, own: Own = None) -> pd.DataFrame:
    """The rows of those cells that are finished, in the order of the cells.

    Parameters
    ----------
    cells, settings, folder, own : as for ``run``
    """
    rows = [_read(folder, cell, version(cell, settings, own)) for cell in dict.fromkeys(cells)]
    return pd.DataFrame([row for row in rows if row is not None])


def _read(folder, cell, key):
    """The row in a cell's file, or None."""
    path = _place(folder, cell, key)
    found = cache.read_json(path)
    row = found.get("row") if isinstance(found, dict) and found.get("key") == key else None
    if found is None or (isinstance(row, dict) and dataclasses.asdict(cell).items() <= row.items()):
        return row
    progress.log.warning("%s belongs to another cell or version, and its cell is computed again.", path.name)
    return None
