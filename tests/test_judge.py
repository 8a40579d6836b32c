"""The unseen judge, mobilenet-vggface2: nothing is made, trained or chosen with it."""

import importlib
import inspect
from pathlib import Path

import nbformat
import pytest
import yaml

import faceadv
from faceadv import cloaks, deidentify, pairs, recognisers
from faceadv.store.paths import PROJECT
from faceadv.training import RECIPES

JUDGE = "mobilenet-vggface2"
PACKAGE = Path(faceadv.__file__).parent
# the only modules that name it: what it is, and what judges by it
MAY = {"recognisers.py", "networks/mobilenet.py", "deidentify.py"}
# parameters of notebooks that say whom an attack, a cloak or a classifier is made with
MAKERS = ("recogniser_name", "second_name", "extractor_name", "backbone_name", "adaptive_recognisers", "texture_name")


def test_only_what_judges_names_it():
    named = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if JUDGE in path.read_text()}
    assert named == MAY


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_loads_it(name, orl, monkeypatch, tmp_path):
    loaded, real = [], recognisers.load
    monkeypatch.setattr(recognisers, "load", lambda which, *rest: loaded.append(which) or real(which, *rest))
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path))
    few = orl.people(orl.names[:20])
    monkeypatch.setattr("faceadv.faces.load", lambda name, root=None: few)
    monkeypatch.setattr(pairs, "lfw_people", lambda faces, which: faces.names)
    recipe = importlib.import_module(f"faceadv.training.{name}")
    recipe.photos("smoke")
    assert JUDGE not in loaded
    assert loaded or name == "prior"  # the others need a network


def test_no_default_is_it():
    for module in (cloaks, recognisers):
        for _, function in inspect.getmembers(module, inspect.isfunction):
            assert all(p.default != JUDGE for p in inspect.signature(function).parameters.values())
    assert JUDGE not in inspect.signature(deidentify.folder).parameters["models"].default
    assert deidentify.unseen(deidentify.MADE_FOR) == JUDGE


@pytest.mark.parametrize("path", sorted((PROJECT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_notebook_makes_anything_with_it(path):
    """In 05 the second network is the one that is transferred to; in 07 and 01 all networks are attacked in turn."""
    (cell,) = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    values = {}
    exec(cell.source, values)
    judged = ("second_name",) if path.stem.startswith("05") else ()
    for profile in ("orl", "smoke", "lfw", "paper"):
        file = PROJECT / "notebooks" / "profiles" / f"{profile}.yaml"
        given = values | (yaml.safe_load(file.read_text()).get(path.stem) or {})
        for maker in set(MAKERS) - set(judged):
            assert JUDGE not in str(given.get(maker, "")), (profile, maker)
