"""One line for a measurement: the number in the record and the text that is shown are the same."""

import numpy as np
import pytest

from faceadv import measures, metrics
from faceadv.errors import Invalid


def test_a_share_is_recorded_in_percent_and_said():
    numbers, hits, who = [], np.array([1, 1, 0, 1, 0, 1, 1, 1], bool), np.arange(8) // 2
    text = measures.share(numbers, "flipped", hits, who, how="at 8/255", paper=70.0, digits=1)
    (found,) = numbers
    value, low, high = (100 * bound for bound in metrics.rate(hits, who))
    assert (found["name"], found["n"], found["unit"], found["paper"]) == ("flipped", 8, "%", 70.0)
    assert [found["value"], found["low"], found["high"]] == pytest.approx([value, low, high], rel=1e-5)
    assert found["how"] == "at 8/255; interval over people"
    assert text == f"75.0 % [{low:.1f}, {high:.1f}]"


def test_a_gain_is_signed_paired_and_in_points():
    numbers, who = [], np.arange(6)
    text = measures.gain(numbers, "DI", [1, 1, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0], who)
    assert numbers[0]["unit"] == "points"
    assert numbers[0]["how"] == "paired; interval over people"
    assert numbers[0]["value"] == pytest.approx(50)
    assert text.startswith("+50 [")


def test_a_mean_may_be_taken_of_logarithms():
    numbers, ratios = [], np.array([0.5, 2.0, 0.5, 2.0])
    text = measures.mean(numbers, "ratio", np.log(ratios), np.arange(4) // 2, back=np.exp, digits=1)
    assert numbers[0]["value"] == pytest.approx(1)
    assert numbers[0]["unit"] == ""
    assert text.startswith("1.0 [")


def test_nothing_measured_is_refused_and_nothing_recorded():
    numbers = []
    with pytest.raises(Invalid):
        measures.share(numbers, "nothing", [], [])
    assert numbers == []
