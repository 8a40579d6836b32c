"""The leaderboard of defences, from the records of notebook 07. `python docs/leaderboard.py` writes it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from faceadv import records
from faceadv.benchmark import grid, statistics, tables
from faceadv.benchmark.cell import GOALS
from faceadv.store.paths import PROJECT

UNRANKED = "The diffusions, with fewer pairs and weaker attackers, are not ranked.\n\n"
OLDER = (
    "Ranks and mean worst cases are of the pairs that all defences share. This record is older than the rule that all"
    " defences meet attackers of one recipe: there were no restarts, and the filters met fewer attacks than the"
    " networks. So its order counts for little.\n\n"
)


def board(record: Mapping, goal: str) -> pd.DataFrame:
    """The defences of a record in the order of their ranks, with what they do for the first recogniser."""
    known = {entry["name"]: entry for entry in record["numbers"]}
    lines, main = statistics.lines(record), record["data"]["eps of 255"]
    first = lines[(lines["recogniser"] == record["data"]["recognisers"][0]) & (lines["goal"] == goal)]
    alone = first[(first["way"] == "static") & (first["source"] == "")]
    columns = {
        "no attack": alone[alone["attack"] == "none"],
        f"PGD that knows no defence, {main:g}/255": alone[(alone["attack"] == "PGD") & (alone["eps_255"] == main)],
        f"worst case, {main:g}/255": first[(first["attack"] == "worst") & (first["eps_255"] == main)],
    }
    rows, rests = {}, (f", {goal}", "")  # an older record ranks dodging only, and does not say so
    for name in dict.fromkeys(alone["defence"]):
        rest = next((rest for rest in rests[: 2 - GOALS.index(goal)] if f"rank of {name}{rest}" in known), None)
        row = rows[name] = {"place": float("inf"), "rank": "–", "mean worst case": ""}
        if rest is not None:
            rank, mean = known[f"rank of {name}{rest}"], known[f"mean worst case of {name}{rest}"]
            row |= {"place": rank["value"], "rank": "{value:g} [{low:g}, {high:g}]".format(**rank)}
            row["mean worst case"] = f"{mean['value']:.0f}"
        for what, part in columns.items():
            found = part[part["defence"] == name]
            row[what] = "{right:.0f} [{low:.0f}, {high:.0f}]".format(**found.iloc[0]) if len(found) else ""
    if all(row["rank"] == "–" for row in rows.values()):
        return pd.DataFrame()
    table = pd.DataFrame.from_dict(rows, orient="index").sort_values("place", kind="stable")
    return table.drop(columns="place")


def boards(found: Iterable[Mapping]) -> str:
    """A table for each record and goal, in Markdown."""
    parts = []
    for record in found:
        data = record["data"]
        parts.append(
            f"## {data['faces'].upper()}\n\n{data['pairs']} pairs of each kind, {data['pairs for diffusion']} for the"
            f" three diffusions. The recogniser is {data['recognisers'][0]}. "
        )
        parts.append(OLDER if data.get("restarts") is None else UNRANKED)
        for goal in GOALS:
            table = board(record, goal)
            if len(table):
                rows = [[name, *row] for name, row in zip(table.index, table.to_numpy())]
                lines = [["defence", *table.columns], ["---"] * (len(table.columns) + 1), *rows]
                parts.append(f"### {goal.capitalize()}\n\n")
                parts += [f"| {' | '.join(map(str, line))} |\n" for line in lines] + ["\n"]
    return "".join(parts)


def main() -> None:
    """Write the boards into docs/leaderboard.md, between its two marks, and the long table into results/tables."""
    found = [records.committed(profile, grid.NOTEBOOK) for profile in ("lfw", "orl")]
    records.insert(Path(__file__).with_suffix(".md"), "leaderboard", boards(found))
    tables.write(found, PROJECT / "results" / "tables")


if __name__ == "__main__":
    main()
