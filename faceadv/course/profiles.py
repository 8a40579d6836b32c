"""Profiles: named sets of notebook parameters, checked before anything runs."""

import ast
import contextlib
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import papermill
import yaml

from faceadv.course import notebook
from faceadv.errors import Invalid
from faceadv.store.paths import PROJECT, nearest

__all__ = ["declared", "defaults", "load", "names", "parameters", "spread"]

NOTEBOOKS = PROJECT / "notebooks"
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list}


def names() -> list[str]:
    """The profiles that exist."""
    return sorted(path.stem for path in (NOTEBOOKS / "profiles").glob("*.yaml"))


def load(profile: str) -> dict[str, dict]:
    """The parameters of a profile: {notebook's stem, or "all": {name: value}}. Raises ``Invalid``."""
    if profile not in names():
        raise Invalid(f'There is no profile "{profile}"{nearest(profile, names())}; there are {", ".join(names())}.')
    path = NOTEBOOKS / "profiles" / f"{profile}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise Invalid(f"{path.name} is not YAML: {' '.join(str(e).split())}.") from e
    if not isinstance(content, dict) or not all(isinstance(part or {}, dict) for part in content.values()):
        raise Invalid(f"{path.name} must map notebooks to their parameters, each a mapping of names to values.")
    return {str(stem): part or {} for stem, part in content.items()}


def parameters(profile: str, notebook_path: Path, overrides: Mapping | None = None) -> dict:
    """The parameters that a notebook gets, name to value: those of the profile, then the overrides.

    Parameters
    ----------
    profile : its part "all" comes first, then its part for this notebook
    notebook_path : the notebook
    overrides : name to value; a text is read as YAML, as on the command line, unless the parameter is a text

    Raises
    ------
    Invalid : for an unknown profile or name, and for a value of another type than the notebook declares
    """
    stem, content = notebook_path.stem, load(profile)
    stems = [path.stem for path in notebook_path.parent.glob("*.ipynb")]
    strays = [key for key in content if key not in stems and key != "all"]
    if stem not in content and nearest(stem, strays):  # a mistyped key would leave the defaults without a word
        raise Invalid(f"Profile {profile} has nothing for {stem}{nearest(stem, strays)}.")
    known = declared(notebook_path)
    values = {}
    for given in (content.get("all", {}), content.get(stem, {}), overrides or {}):
        for name, value in given.items():
            if name not in known:
                raise Invalid(f'{stem} has no parameter "{name}"{nearest(name, known)}; it has {", ".join(known)}.')
            text = given is overrides and isinstance(value, str)
            values[name] = _checked(value, *known[name], f"{name} of {stem}", text)
    return values


def spread(notebook_paths: Iterable[Path], overrides: Mapping | None) -> list[dict]:
    """Every combination of overrides in which each parameter has one value.

    "1,2,4" or a list means one run for each value, unless the parameter is itself a list.
    """
    known = {name: kind for path in notebook_paths for name, (kind, *_) in declared(path).items()}
    choices = {}
    for name, value in (overrides or {}).items():
        if known.get(name) != "list" and isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        choices[name] = value if known.get(name) != "list" and isinstance(value, list) else [value]
        if not choices[name]:
            raise Invalid(f"No value was given for {name}.")
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def declared(notebook_path: Path) -> dict[str, tuple]:
    """What a notebook's parameters cell declares: {name: (type, type of a list's items, whether it may be None)}.

    A type is None where the cell does not say. Raises ``Invalid`` unless exactly one cell is tagged parameters.
    """
    return {name: _type(entry) for name, entry in _inspected(notebook_path).items()}


def defaults(notebook_path: Path) -> dict:
    """What a notebook's parameters cell gives each parameter, name to value; without those that are computed."""
    values = {name: _default(entry) for name, entry in _inspected(notebook_path).items()}
    return {name: value for name, value in values.items() if value is not ...}


def _inspected(notebook_path):
    found = notebook.read(notebook_path)
    tagged = [cell for cell in found.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise Invalid(f"{notebook_path.name} has {len(tagged)} cells tagged parameters; it must have exactly one.")
    return papermill.inspect_notebook(found)  # of a path it would fill in each {…}


def _default(entry):
    try:
        return ast.literal_eval(entry["default"])
    except (ValueError, SyntaxError):  # an expression
        return ...


def _type(entry):
    default, annotation = _default(entry), entry["inferred_type_name"]
    if annotation == "None":  # papermill's word for "not annotated"
        annotation = type(default).__name__
    kind, item = re.fullmatch(r"(\w+)(?:\[(\w+)\])?|.*", annotation).groups()
    return kind if kind in TYPES else None, item if item in TYPES else None, default is None


def _checked(value, kind, item, optional, where, text=False):
    """The value as the notebook shall get it; ``text``: it is to be read as YAML."""
    if isinstance(value, str) and kind == "float":
        with contextlib.suppress(ValueError):
            return float(value)  # 1e-3, which YAML takes for a text
    if text and kind != "str":
        with contextlib.suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
    if kind is None or (value is None and optional):
        return value
    if kind == "float" and type(value) is int:
        return float(value)
    if type(value) is not TYPES[kind]:
        raise Invalid(f"{where} must be of type {kind}, not {type(value).__name__} ({value!r}).")
    return [_checked(entry, item, None, False, f"an item of {where}") for entry in value] if item else value
