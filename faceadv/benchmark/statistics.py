"""What the benchmark's rows say: shares with intervals, worst cases, ranks, and their names in a record."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from faceadv import metrics, records
from faceadv.errors import Invalid

__all__ = ["KEYS", "common", "compare", "label", "lines", "note", "paired", "ranks", "summary", "worst"]

KEYS = ["recogniser", "goal", "defence", "attack", "way", "eps_255", "source"]
REPEATS = 2000


def label(line: Mapping) -> str:
    """The name in a record of the number of a line of ``summary``: its keys, with commas."""
    words = [line["recogniser"], line["goal"], line["defence"], line["attack"], line["way"], f"{line['eps_255']:g}/255"]
    return ", ".join(words + ([f"from {line['source']}"] if line["source"] else []))


def lines(record: Mapping) -> pd.DataFrame:
    """The lines whose numbers a record holds, one in each row: the keys, right, low, high, n."""
    found = []
    for entry in record["numbers"]:
        words = entry["name"].split(", ")
        if len(words) >= 6 and words[5].endswith("/255"):
            words[5] = float(words[5].removesuffix("/255"))
            source = words[6].removeprefix("from ") if len(words) > 6 else ""
            found.append([*words[:6], source, *(entry[key] for key in ("value", "low", "high", "n"))])
    return pd.DataFrame(found, columns=[*KEYS, "right", "low", "high", "n"])


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One line for each row: its keys, right, low, high, n, spread, l2, linf, ms, attack_ms.

    ``right`` is the share of right decisions in %, with the 95 % interval of ``metrics.rate`` over people, whose pairs
    of all seeds belong together. ``spread`` is the standard deviation between seeds, in points. ``ms`` and
    ``attack_ms`` are what the defence and the attack took for an image.
    """
    lines = []
    for row in rows.to_dict("records"):
        value, low, high = (100 * v for v in metrics.rate(row["right"], row["who"]))
        by_seed = 100 * pd.Series(row["right"]).groupby(row["seed"]).mean()
        lines.append(
            {key: row[key] for key in KEYS}
            | {"right": value, "low": low, "high": high, "n": len(row["right"])}
            | {"spread": float(by_seed.std()) if len(by_seed) > 1 else 0.0}
            | {"l2": row["l2"], "linf": row["linf"]}
            | {"ms": 1000 * row["seconds"]["defence"], "attack_ms": 1000 * row["seconds"]["attack"]}
        )
    return pd.DataFrame(lines)


def note(numbers: list, lines: pd.DataFrame, how: str = "right decisions; interval over people") -> pd.DataFrame:
    """Put the numbers of ``summary``'s lines into those of a record, each once; gives the lines back.

    Parameters
    ----------
    numbers : of the record
    lines : one number each
    how : what a reader of the record must know besides
    """
    known = {entry["name"] for entry in numbers}
    for line in lines.to_dict("records"):
        if label(line) not in known:
            found, beside = (line["right"], line["low"], line["high"]), f"between seeds {line['spread']:.1f} points"
            note = f"standard deviation {beside}"
            numbers.append(records.number(label(line), *found, n=line["n"], unit="%", how=how, note=note))
    return lines


def _right(rows):
    """``right`` of all rows as an array (rows, pairs). Raises ``Invalid`` if they are not of the same pairs."""
    if len({(tuple(who), len(right)) for who, right in zip(rows["who"], rows["right"])}) > 1:
        raise Invalid("These rows are of different pairs and cannot be compared: cut them by statistics.common.")
    return np.array(rows["right"].tolist(), dtype=float)


def worst(rows: pd.DataFrame) -> pd.DataFrame:
    """The worst case of each recogniser, goal, defence and eps: a pair is right only if it is right in all rows.

    rows and the result are as ``grid.run`` gives them; the attack is called "worst". Raises ``Invalid`` if the rows of
    a group are not of the same pairs.
    """
    found = []
    for keys, group in rows.groupby(["recogniser", "goal", "defence", "eps_255"], sort=False):
        right = _right(group).all(0)
        seconds = {who: sum(s[who] for s in group["seconds"]) for who in ("attack", "defence")}
        seconds["defence"] /= len(group)
        found.append(
            dict(zip(["recogniser", "goal", "defence", "eps_255"], keys))
            | {"attack": "worst", "way": f"of {len(group)}", "source": "", "right": right.astype(int).tolist()}
            | {"who": group["who"].iloc[0], "seed": group["seed"].iloc[0], "seconds": seconds}
            | {"l2": group["l2"].max(), "linf": group["linf"].max()}
        )
    return pd.DataFrame(found)


def common(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows cut to the pairs that all of them have: the first pairs of each seed, as many as the slow defences have."""
    least = pd.concat([pd.Series(row).value_counts() for row in rows["seed"]], axis=1).min(axis=1)

    def cut(row):
        seeds = np.array(row["seed"])
        keep = np.concatenate([np.where(seeds == seed)[0][: int(least[seed])] for seed in least.index])
        return pd.Series(row.to_dict() | {name: [row[name][i] for i in keep] for name in ("right", "who", "seed")})

    return rows.apply(cut, axis=1)


def ranks(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The rank of each row's share of right decisions, where 1 is the highest, with a 95 % interval over people.

    In each of ``REPEATS`` draws of people all rows are ranked anew; equal rows share the mean of their ranks. The
    result has the defences as its index and the columns right (%), rank, low, high. Raises ``Invalid`` if the rows are
    not of the same pairs.
    """
    right = _right(rows)
    people = np.unique(rows["who"].iloc[0], return_inverse=True)[1]
    sums = np.stack([np.bincount(people, row) for row in right])
    draws = np.random.default_rng(seed).integers(sums.shape[1], size=(REPEATS, sums.shape[1]))
    drawn = pd.DataFrame(sums[:, draws].sum(2)).rank(ascending=False)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1)
    value = 100 * right.mean(1)
    rank = pd.Series(value).rank(ascending=False).to_numpy()
    table = pd.DataFrame({"right": value, "rank": rank, "low": low, "high": high}, index=list(rows["defence"]))
    return table.sort_values(["rank", "low"])


def paired(rows: pd.DataFrame, rival: str) -> pd.DataFrame:
    """How many points more of the pairs are right behind each defence than behind a rival, on the same pairs.

    The result has the defences as its index and the columns points, low, high, by ``metrics.gain`` over people. Raises
    ``Invalid`` if the rows are not of the same pairs, or if none or several are the rival's.
    """
    right, names = _right(rows), list(rows["defence"])
    if names.count(rival) != 1:
        raise Invalid(f'There must be one row of "{rival}", and there are {names.count(rival)}.')
    other, who = right[names.index(rival)], rows["who"].iloc[0]
    people = np.unique(who, return_inverse=True)[1]
    found = {
        name: [100 * v for v in metrics.gain(mine, other, people)] for name, mine in zip(names, right) if name != rival
    }
    return pd.DataFrame.from_dict(found, orient="index", columns=["points", "low", "high"])


def compare(first: Mapping, second: Mapping) -> pd.DataFrame:
    """Two records number by number: the value of each, the difference, and whether their intervals are apart.

    first, second: records as ``records.read`` gives them. Numbers that only one of them has come last.
    """
    tables = [{entry["name"]: entry for entry in record["numbers"]} for record in (first, second)]
    rows = []
    for name in dict.fromkeys([*tables[0], *tables[1]]):
        a, b = (table.get(name) for table in tables)
        row = {"name": name, "first": a and a["value"], "second": b and b["value"]}
        if a and b:
            row["difference"] = b["value"] - a["value"]
            sure = all(entry[key] is not None for entry in (a, b) for key in ("low", "high"))
            row["apart"] = bool(sure and (a["low"] > b["high"] or b["low"] > a["high"]))
        rows.append(row)
    table = pd.DataFrame(rows, columns=["name", "first", "second", "difference", "apart"])
    return table.sort_values("difference", key=lambda column: column.isna(), kind="stable", ignore_index=True)
