"""The README's scoreboard says what the records say, and its verdicts follow from them."""

import importlib.util

import pytest
import yaml

from faceadv.store.paths import PROJECT

spec = importlib.util.spec_from_file_location("scoreboard", PROJECT / "docs" / "scoreboard.py")
scoreboard = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scoreboard)
NUMBERS = {
    "a": {"value": 5.0, "low": 4.0, "high": 6.0},
    "b": {"value": 9.0, "low": 6.5, "high": 10.0},
    "a: c > d": {"value": 0.5, "low": -0.5, "high": 0.75},
}


def test_the_readme_has_the_table_of_the_records():
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert scoreboard.MARKS[0] + scoreboard.table() + scoreboard.MARKS[1] in text, "python docs/scoreboard.py"


@pytest.mark.parametrize(
    ("rule", "true"),
    [
        *[("a > 3.9", True), ("a > 4.5", False), ("a < 6.1", True), ("a < 5.5", False), ("a >= 5.9", True)],
        *[("a >= 6.1", False), ("b > a", True), ("a < b", True), ("a > b", False), ("a >= b", False), ("b >= a", True)],
        *[("a: c > d > 0", False), ("a: c > d > -1", True)],
    ],
)
def test_a_rule_is_about_the_whole_interval(rule, true):
    assert scoreboard.holds(rule, NUMBERS) is true


def test_verdicts(monkeypatch):
    monkeypatch.setattr(scoreboard, "numbers", lambda record: NUMBERS)
    for rules, said in (
        (["a > 3", "b > a"], "confirmed"),
        (["a > 3", "a > b"], "partly"),
        (["a > b", "a > 7"], "not confirmed"),
        ([], "not tested"),
    ):
        assert scoreboard.verdict({"record": "x", "holds": rules}) == said
    assert scoreboard.verdict({"record": "x", "holds": ["a > 3", "a > b"], "otherwise": "not settled"}) == "not settled"


def test_each_claim_of_each_paper_names_its_evidence():
    claims = yaml.safe_load((PROJECT / "docs" / "claims.yaml").read_text(encoding="utf-8"))
    assert len({claim["paper"] for claim in claims}) == 5
    for claim in claims:
        assert "{" in claim["ours"]
        assert (PROJECT / "results" / f"{claim['record']}.json").exists()
        assert (PROJECT / "notebooks" / f"{claim.get('notebook', claim['record'][4:])}.ipynb").exists()


def test_numbers_in_words():
    assert scoreboard.words(NUMBERS["a"]) == "5.0 [4.0, 6.0]"
    assert scoreboard.words(NUMBERS["a: c > d"]) == "0.50 [−0.50, 0.75]"
