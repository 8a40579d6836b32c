"""The benchmark's grid: which cells it has, and how they are spread over processes or machines.

A finished cell is a file, written whole; so a run that was killed goes on where it was, and no cell is computed twice.
"""

import contextlib
import json
import os
import re
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from faceadv import parallel, recognisers
from faceadv.benchmark import cell as one
from faceadv.benchmark.cell import Cell, Settings
from faceadv.store import weights
from faceadv.store.paths import replacing

NOTEBOOK = "07_benchmark"


def present(names):
    """The recognisers of a list whose weights are here. Raises ``ValueError`` for an unknown name."""
    found = []
    for name in names:
        if name not in recognisers.NAMES:
            recognisers.load(name)  # says which there are
        with contextlib.suppress(FileNotFoundError):
            weights.find(name)
            found.append(name)
    return found


def settings(values):
    """The settings of a benchmark from the parameters of notebook 07."""
    names = {field for field in Settings.__dataclass_fields__ if field != "seeds"}
    seeds = tuple(range(values["seed"], values["seed"] + values["repeats"]))
    return Settings(**{name: values[name] for name in names}, seeds=seeds)


def plan(values, judges):
    """The cells of notebook 07 by what they are for: {part: list of Cells}.

    values: the notebook's parameters; judges: names of recognisers, the first of which alone has curves and signs.

    static      attacks × defences × recognisers × goals
    adaptive    per defence, PGD in every way that knows it
    curve       the same ways and the static one at other eps, dodging the first recogniser
    transfer    attacks made with one recogniser and judged by another, without a defence
    signs       of masked gradients: random noise, one step, no bound, transfer, per defence
    """
    attacks, defences, eps = values["attack_names"], values["defence_names"], values["eps_255"]
    first, other = judges[0], judges[1:2]
    parts = {
        "static": [
            Cell(attack, defence, judge, goal, eps_255=eps)
            for judge in judges
            for goal in one.GOALS
            for attack in attacks
            for defence in defences
        ],
        "adaptive": [
            Cell("PGD", defence, judge, goal, way, eps)
            for judge in judges
            if judge in values["adaptive_recognisers"]
            for goal in one.GOALS
            for defence in defences
            for way in ways(defence)
        ],
        "curve": [
            Cell("PGD", defence, first, "dodging", way, other)
            for defence in values["curve_defences"]
            for other in values["curve_eps_255"]
            for way in ("static", *ways(defence))
        ],
        "transfer": [
            Cell(attack, "none", judge, goal, "static", eps, source)
            for goal in one.GOALS
            for attack in attacks
            if attack not in ("none", "A3GN")
            for source in judges
            for judge in judges
            if judge != source
        ],
    }
    parts["signs"] = [
        sign
        for defence in values["sign_defences"]
        for sign in [
            Cell("noise", defence, first, "dodging", "static", eps),
            *(Cell("FGSM", defence, first, "dodging", way, eps) for way in ways(defence)[:1]),
            *(Cell("PGD", defence, first, "dodging", way, 255.0) for way in ("static", *ways(defence)[:1])),
            *(Cell("PGD", defence, first, "dodging", "static", eps, source) for source in other),
        ]
    ]
    return parts


def ways(defence):
    """How the attacks that know a defence go about it; BPDA for one that is not built in."""
    return one.WAYS.get(defence, ("bpda",))


def place(folder, cell, settings, own=None):
    """The file of a finished cell."""
    words = [cell.recogniser, cell.goal, cell.attack, cell.defence, cell.way, f"{cell.eps_255:g}"]
    words += [f"from {cell.source}"] if cell.source else []
    slug = re.sub(r"[^\w.-]+", "-", "_".join(words))
    return Path(folder) / f"{slug}_{one.version(cell, settings, own)[:12]}.json"


def run(cells, settings, folder, scheduler="single", workers=None, own=None):
    """Measure the cells that are not finished yet, and return the rows of all, a DataFrame in the order of ``cells``.

    scheduler, workers: as for ``parallel.compute``, with its errors; rows are the same whichever it is, bit for bit if
    the processes have the same number of threads. own: as in ``cell.measure``.
    """
    cells = list(dict.fromkeys(cells))
    for cell in cells:
        one.check(cell, own)
    todo = [cell for cell in cells if _read(place(folder, cell, settings, own)) is None]
    quiet = bool(os.environ.get("FACEADV_QUIET"))
    with tqdm(total=len(cells), initial=len(cells) - len(todo), desc="cells", unit="cell", disable=quiet) as bar:
        for cell, row in parallel.compute(one.measure, todo, scheduler, workers, settings=settings, own=own):
            with replacing(place(folder, cell, settings, own)) as part:
                part.write_text(json.dumps(row) + "\n", encoding="utf-8")
            bar.update()
    return read(cells, settings, folder, own)


def read(cells, settings, folder, own=None):
    """The rows of finished cells, a DataFrame; cells that are not finished are left out."""
    rows = [_read(place(folder, cell, settings, own)) for cell in dict.fromkeys(cells)]
    return pd.DataFrame([row for row in rows if row is not None])


def _read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or of a disk that was full
        return None
