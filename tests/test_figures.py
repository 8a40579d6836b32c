"""Figures of the benchmark show each line where it belongs."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from faceadv.benchmark import figures

GOALS = ("dodging", "impersonation")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def lines(**columns):
    """A line for each combination, with shares that grow by one from line to line."""
    names = ("recogniser", "goal", "defence", "attack", "way", "eps_255", "source")
    options = {"recogniser": ["dlib"], "way": ["static"], "eps_255": [2.0], "source": [""]} | columns
    table = pd.MultiIndex.from_product([options[name] for name in names], names=names).to_frame(index=False)
    right = pd.Series(range(len(table)), dtype=float)
    return table.assign(right=right, low=right - 1, high=right + 1, n=8)


def test_heat_maps():
    given = lines(recogniser=["dlib", "other"], goal=GOALS, defence=["none", "jpeg"], attack=["A3GN", "PGD", "none"])
    figures.heat_maps(given)
    axes = plt.gcf().axes
    assert [axis.get_title() for axis in axes] == [f"{judge}, {goal}" for goal in GOALS for judge in ("dlib", "other")]
    assert [label.get_text() for label in axes[-1].get_xticklabels()] == ["none", "PGD", "A3GN"]
    assert [text.get_text() for text in axes[0].texts] == ["2", "1", "0", "5", "4", "3"]
    assert [line.get_xdata()[0] for line in axes[0].lines] == [1, 2]  # the gaps


def test_worst_cases():
    given = lines(goal=GOALS, defence=["none", "jpeg"], attack=["none", "PGD", "worst"])
    figures.worst_cases(*(given[given["attack"] == name] for name in ("none", "PGD", "worst")))
    left, right = plt.gcf().axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["none", "jpeg"]
    assert left.get_legend() is None
    assert [text.get_text() for text in right.get_legend().texts][-1] == "worst case"
    assert list(right.containers[2][0].get_xdata()) == [8, 11]


def test_budgets():
    given = lines(goal=["dodging"], defence=["none", "jpeg", "blur"], attack=["worst"], eps_255=[0.0, 1.0])
    figures.budgets(given, panels=2)
    for axis, name in zip(plt.gcf().axes, ("jpeg", "blur")):
        assert [text.get_text() for text in axis.get_legend().texts] == ["none", name]
    first = plt.gcf().axes[0].containers
    assert list(first[1][0].get_ydata()) == [2, 3]
    assert (first[0][0].get_xdata() < first[1][0].get_xdata()).all()  # side by side


def test_fewer_pairs_are_in_the_name():
    given = lines(goal=GOALS, defence=["none", "two-stage"], attack=["none", "PGD", "worst"])
    given.loc[given["defence"] == "two-stage", "n"] = 4
    figures.worst_cases(*(given[given["attack"] == name] for name in ("none", "PGD", "worst")))
    figures.heat_maps(given)
    figures.budgets(pd.concat([given[given["goal"] == "dodging"].assign(eps_255=eps) for eps in (0.0, 2.0)]), 1)
    dots, maps, curves = (plt.figure(number) for number in plt.get_fignums())
    for figure in (dots, maps):
        labels = figure.axes[0].get_yticklabels()
        assert [label.get_text() for label in labels] == ["none", "two-stage (4 pairs)"]
    assert [text.get_text() for text in curves.axes[0].get_legend().texts] == ["none", "two-stage (4 pairs)"]


def test_who_rejects_everybody_is_marked():
    """Rejecting impostors is no merit of a recogniser that rejects the right people as well."""
    given = lines(recogniser=["dlib"], goal=GOALS, defence=["none", "blur"], attack=["none", "PGD"]).assign(right=95.0)
    refused = (given["defence"] == "blur") & (given["goal"] == "dodging") & (given["attack"] == "none")
    given.loc[refused, "right"] = 60.0
    figures.heat_maps(given)
    dodging, impersonation = plt.gcf().axes
    assert not dodging.patches
    (patch,) = impersonation.patches
    assert (patch.get_y(), patch.get_hatch()) == (1, "///")


def test_transfer():
    alone = lines(recogniser=["a", "b"], goal=["dodging"], defence=["none"], attack=["PGD"])
    moved = pd.concat([alone.assign(source=["b", "a"], right=[50.0, 60.0])])
    figures.transfer(pd.concat([alone, moved]), ["PGD"])
    (axis,) = plt.gcf().axes
    assert [text.get_text() for text in axis.texts] == ["0", "60", "50", "1"]


def test_text():
    assert figures.text({"right": 93.4, "low": 85.6, "high": 97.1}) == "93 [86, 97]"
