"""What the benchmark's rows say: shares with intervals, worst cases, ranks, and their names in a record."""

import numpy as np
import pandas as pd

from faceadv import metrics

KEYS = ["recogniser", "goal", "defence", "attack", "way", "eps_255", "source"]


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
