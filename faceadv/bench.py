"""The benchmark: which cells it has, how they are spread over processes or machines, and what their rows say.

A finished cell is a file, written whole; so a run that was killed goes on where it was, and no cell is computed twice.
"""

import contextlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from faceadv import cell as one
from faceadv import cluster, metrics, recognisers, weights
from faceadv.cell import Cell, Settings
from faceadv.paths import replacing

KEYS = ["recogniser", "goal", "defence", "attack", "way", "eps_255", "source"]
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

    scheduler, workers: as for ``cluster.compute``, with its errors; rows are the same whichever it is, bit for bit if
    the processes have the same number of threads. own: as in ``cell.measure``.
    """
    cells = list(dict.fromkeys(cells))
    for cell in cells:
        one.check(cell, own)
    todo = [cell for cell in cells if _read(place(folder, cell, settings, own)) is None]
    quiet = bool(os.environ.get("FACEADV_QUIET"))
    with tqdm(total=len(cells), initial=len(cells) - len(todo), desc="cells", unit="cell", disable=quiet) as bar:
        for cell, row in cluster.compute(one.measure, todo, scheduler, workers, settings=settings, own=own):
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


# -- what the rows say --


def label(line):
    """The name of a line's number in a record: its keys, with commas."""
    words = [line["recogniser"], line["goal"], line["defence"], line["attack"], line["way"], f"{line['eps_255']:g}/255"]
    return ", ".join(words + ([f"from {line['source']}"] if line["source"] else []))


def lines(record):
    """The lines whose numbers a record holds: their keys, right, low, high, n."""
    found = []
    for entry in record["numbers"]:
        words = entry["name"].split(", ")
        if len(words) >= 6 and words[5].endswith("/255"):
            words[5] = float(words[5].removesuffix("/255"))
            words = [*words, ""][:7]
            keys = ("recogniser", "goal", "defence", "attack", "way", "eps_255", "source")
            values = {"right": entry["value"], "low": entry["low"], "high": entry["high"], "n": entry["n"]}
            found.append(dict(zip(keys, words)) | values)
    table = pd.DataFrame(found)
    table["source"] = table["source"].str.removeprefix("from ")
    return table


def summary(rows, seed=0):
    """A line a row: its keys, the share of right decisions in % with a 95 % interval, n, and what it cost.

    The interval is a bootstrap over people, whose pairs of all seeds are drawn together; ``spread`` is the standard
    deviation between seeds, in points. ``ms`` is the defence's time an image.
    """
    lines = []
    for row in rows.to_dict("records"):
        value, low, high = (100 * v for v in metrics.rate(row["right"], row["who"], seed=seed))
        by_seed = 100 * pd.Series(row["right"]).groupby(row["seed"]).mean()
        lines.append(
            {key: row[key] for key in KEYS}
            | {"right": value, "low": low, "high": high, "n": len(row["right"])}
            | {"spread": float(by_seed.std()) if len(by_seed) > 1 else 0.0}
            | {"l2": row["l2"], "linf": row["linf"]}
            | {"ms": 1000 * row["seconds"]["defence"], "attack_ms": 1000 * row["seconds"]["attack"]}
        )
    return pd.DataFrame(lines)


def worst(rows):
    """The worst case per pair of each recogniser, goal, defence and eps: right only if right in all of its rows.

    All rows of a group must be of the same pairs. Rows as ``run`` gives them, the attack called "worst".
    """
    found = []
    for keys, group in rows.groupby(["recogniser", "goal", "defence", "eps_255"], sort=False):
        right = np.array(group["right"].tolist()).all(0)
        seconds = {who: sum(s[who] for s in group["seconds"]) for who in ("attack", "defence")}
        seconds["defence"] /= len(group)
        found.append(
            dict(zip(["recogniser", "goal", "defence", "eps_255"], keys))
            | {"attack": "worst", "way": f"of {len(group)}", "source": "", "right": right.astype(int).tolist()}
            | {"who": group["who"].iloc[0], "seed": group["seed"].iloc[0], "seconds": seconds}
            | {"l2": group["l2"].max(), "linf": group["linf"].max()}
        )
    return pd.DataFrame(found)


def common(rows):
    """Rows cut to the pairs that all of them have: those of the slow defences, the first of each seed's."""
    counts = [pd.Series(row).value_counts() for row in rows["seed"]]
    least = pd.concat(counts, axis=1).min(axis=1)

    def cut(row):
        seeds = np.array(row["seed"])
        keep = np.concatenate([np.where(seeds == seed)[0][: int(least[seed])] for seed in least.index])
        lists = {name: [row[name][i] for i in keep] for name in ("right", "who", "seed")}
        return pd.Series(row.to_dict() | lists)

    return rows.apply(cut, axis=1)


def ranks(rows, label="defence", repeats=2000, seed=0):
    """The rank of each row's share of right decisions, 1 the highest, with a 95 % interval over people.

    rows: of the same pairs. In each draw of people all are ranked anew; equals share the mean of their ranks.
    A DataFrame by ``label``: right (%), rank, low, high.
    """
    right = np.array(rows["right"].tolist(), dtype=float)
    people = np.unique(rows["who"].iloc[0], return_inverse=True)[1]
    sums = np.stack([np.bincount(people, row) for row in right])
    draws = np.random.default_rng(seed).integers(sums.shape[1], size=(repeats, sums.shape[1]))
    drawn = pd.DataFrame(sums[:, draws].sum(2)).rank(ascending=False)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1)
    value = 100 * right.mean(1)
    rank = pd.Series(value).rank(ascending=False).to_numpy()
    table = pd.DataFrame({"right": value, "rank": rank, "low": low, "high": high}, index=list(rows[label]))
    return table.sort_values(["rank", "low"])
