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
users: int = 20  # how many; 0: everybody
grid_255: list = [1, 2]
far: float = 0.001
own_folder: str = ""
faces_name: str = "orl"
prior_name: str = "shipped"
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
        (b"00_aa: {seed: 3}", r'a part for "00_aa", which is no notebook \(did you mean 00_a\?\)'),
        (b"{00: {seed: 3}, 00_a: {seed: 4}}", 'names "00_a" twice'),
        (b"00_a: {steps: 1:30}", "must be of type int, not str"),
        (b"00_a: {steps: 0}", "steps of 00_a must be a number of at least 1, not 0"),
        (b"00_a: {lr: .nan}", "must be a number of at least 0, not nan|must be of type float, not str"),
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


def test_numbers_are_read_as_they_are_written(add):
    path = add("00_a")
    (path.parent / "profiles" / "orl.yaml").write_text("0: {steps: 010, eps: [010, 1.0, 1E1]}")
    assert profiles.parameters("orl", path) == {"steps": 10, "eps": [10.0, 1.0, 10.0]}
    assert profiles.parameters("orl", path, {"steps": "08", "free": "007"})["steps"] == 8
    assert profiles.parameters("orl", path, {"free": "0o17"})["free"] == "0o17"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"steps": "1:30"}, "steps of 00_a must be of type int"),
        ({"steps": "0x10"}, "steps of 00_a must be of type int"),
        ({"steps": "0"}, "steps of 00_a must be a number of at least 1, not 0"),
        ({"steps": "-1"}, "of at least 1, not -1"),
        ({"steps": 0}, "of at least 1, not 0"),
        ({"seed": "-1"}, "of at least 0, not -1"),
        ({"lr": "nan"}, "lr of 00_a must be a number of at least 0, not nan"),
        ({"lr": "inf"}, "not inf"),
        ({"lr": "-0.1"}, "not -0.1"),
        ({"eps": "[1, -2]"}, "not -2"),
        ({"eps": [1.0, float("nan")]}, "not nan"),
        ({"eps": "1,2"}, r"must be of type list, not str \('1,2'\): write \"\[1,2\]\""),
        ({"eps": "3"}, r"write \"\[3\]\""),
        ({"grid_255": "[256]"}, "from 1 to 255, not 256"),
        ({"grid_255": "[1.5]"}, "must be of type int, not float"),
        ({"far": "1.5"}, "from 0 to 1, not 1.5"),
    ],
)
def test_bounds_are_checked_before_anything_runs(add, given, told):
    with pytest.raises(profiles.Invalid, match=told):
        profiles.parameters("orl", add("00_a"), given)


def test_zero_is_allowed_where_the_cell_says_what_it_means(add):
    path = add("00_a")
    assert profiles.parameters("orl", path, {"users": "0", "seed": "0", "lr": "0"})["users"] == 0
    assert profiles.declared(path)["users"] == ("int", None, False, 0)
    assert profiles.declared(path)["steps"] == ("int", None, False, 1)


def test_an_own_profile_is_a_file(add, tmp_path, monkeypatch):
    path = add("00_a")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("all: {seed: 3}\n00: {steps: 7}\n")
    assert profiles.parameters("mine.yaml", path) == {"seed": 3, "steps": 7}
    assert profiles.label("mine.yaml") == profiles.label(str(tmp_path / "mine.yml")) == "mine"
    assert profiles.label("orl") == "orl"
    with pytest.raises(profiles.Invalid, match=r'no profile ".*yours\.yaml"; there are orl, and any file that ends in'):
        profiles.load("yours.yaml")
    (tmp_path / "orl.yaml").write_text("{}")
    with pytest.raises(profiles.Invalid, match="has the name of a profile of the course"):
        profiles.load("orl.yaml")


@pytest.mark.parametrize("name", ["00_a", "00", "0", 0, "00_a.ipynb"])
def test_a_notebook_is_meant_by_its_number(name):
    assert profiles.meets(name, "00_a")
    assert not profiles.meets(name, "01_b")
    assert not profiles.meets("all", "00_a")


def test_every_path_is_meant_from_where_it_is_typed(add, tmp_path, monkeypatch):
    path = add("00_a")
    (tmp_path / "prior").mkdir()
    monkeypatch.chdir(tmp_path)
    given = {"own_folder": "mine", "faces_name": "lfw", "results_dir": "there/results", "prior_name": "prior"}
    values = profiles.parameters("orl", path, given)
    assert values["own_folder"] == str(tmp_path / "mine")
    assert values["results_dir"] == str(tmp_path / "there" / "results")
    assert values["prior_name"] == str(tmp_path / "prior")
    assert values["faces_name"] == "lfw"
    assert profiles.parameters("orl", path, {"prior_name": "shipped"})["prior_name"] == "shipped"
    (point,) = profiles.spread([path], given)  # a Dask worker has another folder
    assert point == {name: values[name] for name in given}
    (tmp_path / "mine.yaml").write_text("all: {faces_name: ../faces}")
    assert profiles.parameters("mine.yaml", path)["faces_name"] == str(tmp_path / ".." / "faces")


def test_a_comma_in_a_value_is_escaped(add, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = profiles.spread([add("00_a")], {"own_folder": r"a\,b,c"})
    assert [point["own_folder"] for point in found] == [str(tmp_path / "a,b"), str(tmp_path / "c")]


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
    assert {name: values[name] for name in expected} == expected
    assert "cores" not in values
    assert profiles.declared(add("00_a"))["eps"] == ("list", "float", False, 0)
    assert profiles.declared(add("00_a"))["grid_255"] == ("list", "int", False, 1)
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
