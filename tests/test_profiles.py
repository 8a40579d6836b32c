"""Profiles: parameters by name and type, checked against what a notebook declares."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from faceadv.course import notebook, profiles

PARAMETERS = """profile: str = "orl"  # which
seed: int = 0
steps: int = 5  # how many
lr: float = 0.1
eps: list[float] = [1.0, 2.0]
fast: bool = False
free = None
cores = len("ab")
results_dir: str = "../results\""""


@pytest.fixture
def add(tmp_path, monkeypatch):
    """A folder in place of the course's; a function that adds a notebook with so many cells tagged parameters."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "orl.yaml").write_text("all: {profile: orl}\n00_a: {steps: 3}\n")
    monkeypatch.setattr(profiles, "NOTEBOOKS", tmp_path)

    def write(name, tagged=1):
        cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}) for _ in range(tagged)]
        nbformat.write(new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
        return tmp_path / f"{name}.ipynb"

    return write


def test_parameters_from_the_command_line_get_the_type_of_the_notebook(add):
    path = add("00_a")
    texts = {"lr": "1e-3", "steps": "7", "eps": "[1, 1e-3]", "fast": "true", "profile": "112", "free": "[1]"}
    values = profiles.parameters("orl", path, texts)
    expected = {"lr": 0.001, "steps": 7, "eps": [1.0, 0.001], "fast": True, "profile": "112", "free": [1]}
    assert values == expected
    assert profiles.parameters("orl", path, {"lr": 1}) == {"profile": "orl", "steps": 3, "lr": 1.0}
    assert type(values["eps"][0]) is float


def test_a_float_may_be_written_as_people_write_it(add):
    path = add("00_a")
    (path.parent / "profiles" / "orl.yaml").write_text("00_a: {lr: 1e-3, eps: [1e3, 2]}")  # texts, for YAML 1.1
    assert profiles.parameters("orl", path) == {"lr": 0.001, "eps": [1000.0, 2.0]}


@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        (b"00_a: {lr: 8/255}", "lr of 00_a must be of type float, not str"),
        (b"00_a: {steps: '3'}", "must be of type int, not str"),
        (b"00_a: {sed: 3}", r"did you mean seed\?"),
        (b"00_aa: {seed: 3}", r"nothing for 00_a \(did you mean 00_aa\?\)"),
        (b"00_a: 3", "must map notebooks to their parameters"),
        (b"00_a: [", "is not YAML"),
        (b"00_a: {profile: \xff}", "is not YAML"),
    ],
)
def test_mistakes_in_a_profile_are_told(add, yaml, told):
    path = add("00_a")
    (path.parent / "profiles" / "orl.yaml").write_bytes(yaml)
    with pytest.raises(profiles.Invalid, match=told):
        profiles.parameters("orl", path)


def test_unknown_profiles_are_refused_with_the_nearest(add):
    with pytest.raises(profiles.Invalid, match=r'no profile "olr" \(did you mean orl\?\)'):
        profiles.load("olr")


def test_one_cell_must_be_tagged_parameters(add):
    for tagged in (0, 2):
        with pytest.raises(profiles.Invalid, match=f"{tagged} cells tagged parameters"):
            profiles.declared(add("00_a", tagged))
    for asked in (profiles.declared, profiles.defaults):
        with pytest.raises(profiles.Invalid, match="2 cells tagged parameters"):
            asked(add("00_a", 2))


@pytest.mark.parametrize("content", ["<html>", "[]", "null", '{"cells": [1], "nbformat": 4, "nbformat_minor": 5}'])
def test_a_file_that_is_no_notebook_is_told(add, content):
    path = add("00_a")
    path.write_text(content)
    with pytest.raises(profiles.Invalid, match=r"00_a\.ipynb is not a notebook"):
        notebook.read(path)


def test_defaults_are_values_without_those_that_are_computed(add):
    values = profiles.defaults(add("00_a"))
    assert values.pop("results_dir") == "../results"
    expected = {"profile": "orl", "seed": 0, "steps": 5, "lr": 0.1, "eps": [1.0, 2.0], "fast": False, "free": None}
    assert values == expected
    assert profiles.declared(add("00_a"))["eps"] == ("list", "float", False)
    assert profiles.declared(add("00_a"))["cores"][2] is False


def test_several_values_are_spread_to_one_each(add):
    paths = [add("00_a")]
    found = profiles.spread(paths, {"steps": "1, 2", "eps": "[1, 2]", "lr": [0.1, 0.2]})
    assert [list(point.values()) for point in found] == [
        ["1", "[1, 2]", 0.1],
        ["1", "[1, 2]", 0.2],
        ["2", "[1, 2]", 0.1],
        ["2", "[1, 2]", 0.2],
    ]
    assert profiles.spread(paths, None) == [{}]
    with pytest.raises(profiles.Invalid, match="No value was given for lr"):
        profiles.spread(paths, {"lr": []})
