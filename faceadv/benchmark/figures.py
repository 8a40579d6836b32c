"""Figures of the benchmark's lines, as ``statistics.summary`` and ``statistics.lines`` give them. Shares in %."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.patches import Rectangle

from faceadv import plots

__all__ = ["budgets", "heat_maps", "text", "transfer", "worst_cases"]

UNBOUNDED = ("P-FGVM", "A3GN")  # these keep to no budget
ACCEPTS = 80  # % of one person's pairs, without an attack: with less, rejecting an impostor says little


def text(line: Mapping) -> str:
    """A line's number: "93 [86, 97]"."""
    return f"{line['right']:.0f} [{line['low']:.0f}, {line['high']:.0f}]"


def _counted(lines):
    """The lines with the number of pairs in the names of those defences that have fewer than the others."""
    name, n = lines["defence"], lines["n"]
    return lines.assign(defence=name.where(n == n.max(), name + " (" + n.astype(str) + " pairs)"))


def heat_maps(lines: pd.DataFrame) -> None:
    """Right decisions of each defence under each attack, a panel for each goal and recogniser.

    The first column, without an attack, and the attacks without a budget stand apart. A row of impersonation is hatched
    where the recogniser behind that defence accepts less than 80 % of one person's pairs even without an attack:
    somebody who rejects nearly everybody rejects impostors too.
    """
    lines = _counted(lines)
    clean = lines[(lines["attack"] == "none") & (lines["goal"] == "dodging")].set_index(["recogniser", "defence"])
    judges, goals = lines["recogniser"].unique(), lines["goal"].unique()
    size = (0.8 + 4.2 * len(judges), 1 + 3.9 * len(goals))
    _, axes = plt.subplots(len(goals), len(judges), figsize=size, sharex=True, sharey=True, squeeze=False)
    for (goal, judge), axis in zip([(goal, judge) for goal in goals for judge in judges], axes.flat):
        part = lines[(lines["goal"] == goal) & (lines["recogniser"] == judge)]
        table = part.pivot_table("right", "defence", "attack", sort=False)
        table = table[sorted(table, key=lambda name: (name != "none", name in UNBOUNDED))]
        sns.heatmap(table, ax=axis, vmin=0, vmax=100, cmap="cividis", annot=True, fmt=".0f", cbar=False)
        for place in (sum(name == "none" for name in table), sum(name not in UNBOUNDED for name in table)):
            axis.axvline(place, color="white", linewidth=6)
        for row, name in enumerate(table.index):
            if goal == "impersonation" and clean["right"].get((judge, name), 100) < ACCEPTS:
                axis.add_patch(Rectangle((0, row), len(table.columns), 1, fill=False, hatch="///", color="0.5", lw=0))
        axis.set(title=f"{judge}, {goal}", xlabel="", ylabel="")
        axis.tick_params(axis="x", rotation=90)
        axis.tick_params(axis="y", rotation=0)


def worst_cases(clean: pd.DataFrame, unaware: pd.DataFrame, worst: pd.DataFrame) -> None:
    """Three dots a defence with their intervals: without an attack, under one that knows nothing, in the worst case.

    Parameters
    ----------
    clean, unaware, worst : lines of one recogniser, one a defence and goal
    """
    clean, unaware, worst = (_counted(lines) for lines in (clean, unaware, worst))
    goals = worst["goal"].unique()
    _, axes = plt.subplots(1, len(goals), figsize=(5.6 * len(goals), 5.4), sharey=True, squeeze=False)
    for goal, axis in zip(goals, axes[0]):
        rows = {}
        for what, lines in (("no attack", clean), ("PGD that knows no defence", unaware), ("worst case", worst)):
            for line in lines[lines["goal"] == goal].to_dict("records"):
                rows.setdefault(line["defence"], {})[what] = [line[key] for key in ("right", "low", "high")]
        plots.dots(axis, rows)
        axis.set(title=goal, xlabel="right decisions (%)", xlim=(-3, 103))
        if axis is not axes[0, -1]:
            axis.get_legend().remove()


def budgets(lines: pd.DataFrame, panels: int = 3) -> None:
    """Right decisions against the budget, a few defences in each panel, and no defence in all of them.

    Points of one budget stand side by side, so that their intervals can be told apart.

    Parameters
    ----------
    lines : of one recogniser and goal, one a defence and budget; "none" is among the defences
    panels : side by side
    """
    lines = _counted(lines)
    names = [name for name in lines["defence"].unique() if not name.startswith("none")]
    at = np.sort(lines["eps_255"].unique())
    gap = np.diff(at).min() / 8
    _, axes = plt.subplots(1, panels, figsize=(4.4 * panels, 4.2), sharey=True)
    for axis, group in zip(np.atleast_1d(axes), np.array_split(names, panels)):
        for i, name in enumerate(("none", *group)):
            points = lines[lines["defence"] == name].sort_values("eps_255")
            x = points["eps_255"] + gap * (i - len(group) / 2)
            away = abs(points[["low", "high"]].sub(points["right"], axis=0).to_numpy().T)
            fmt = plots.MARKERS[i % 6] + plots.DASHES[i % 4]
            axis.errorbar(x, points["right"], yerr=away, fmt=fmt, capsize=3, linewidth=1, label=name)
        axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
        axis.set(xlabel="budget (of 255)", xticks=at, ylim=(-3, 103))
        sns.despine(ax=axis)
    np.atleast_1d(axes)[0].set_ylabel("right decisions, worst case (%)")


def transfer(lines: pd.DataFrame, attacks: Sequence[str]) -> None:
    """Right decisions by the network that an attack was made with and the one that judges, a map for each attack.

    Parameters
    ----------
    lines : with "source" or, where it is empty, made with the judge
    attacks : which of them
    """
    lines = lines.assign(source=lines["source"].where(lines["source"] != "", lines["recogniser"]))
    goals, judges = list(lines["goal"].unique()), list(lines["recogniser"].unique())
    side = 0.4 + 0.55 * len(judges)
    size = (1.7 + side * len(attacks), 1.7 + (side + 0.3) * len(goals))
    figure, axes = plt.subplots(len(goals), len(attacks), figsize=size, sharex=True, sharey=True, squeeze=False)
    for (goal, name), axis in zip([(goal, name) for goal in goals for name in attacks], axes.flat):
        part = lines[(lines["goal"] == goal) & (lines["attack"] == name)]
        table = part.pivot_table("right", "source", "recogniser").reindex(index=judges, columns=judges)
        sns.heatmap(table, ax=axis, vmin=0, vmax=100, cmap="cividis", annot=True, fmt=".0f", cbar=False)
        axis.set(title=f"{name},\n{goal}", xlabel="", ylabel="")
        axis.tick_params(axis="x", rotation=90)
        axis.tick_params(axis="y", rotation=0)
    figure.supxlabel("judged by")
    figure.supylabel("made with")
