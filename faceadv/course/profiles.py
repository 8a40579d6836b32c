"""Profiles: named sets of notebook parameters, checked before anything runs.

A profile is one of the course's, or an own YAML file, such as ``01: {eps_255: 4}``; ``all`` is for all notebooks.
"""

import ast
import contextlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import papermill
import yaml

from faceadv.course import notebook
from faceadv.errors import Invalid, number
from faceadv.store.paths import PROJECT, meant, nearest

__all__ = ["declared", "defaults", "label", "load", "meets", "names", "parameters", "spread"]

NOTEBOOKS = PROJECT / "notebooks"
FACES = ("_folder", "faces_name")  # parameters that end so are "orl", "lfw" or a folder of NAME/photo.jpg
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list}


def names() -> list[str]:
    """The profiles that exist."""
    return sorted(path.stem for path in (NOTEBOOKS / "profiles").glob("*.yaml"))


def label(profile: str) -> str:
    """The name of a profile, for folders and records: that of an own file without its ending."""
    return Path(profile).stem if profile.endswith((".yaml", ".yml")) else profile


def load(profile: str) -> dict[str, dict]:
    """The parameters of a profile, by its name or its file: {notebook's stem, or "all": {name: value}}.

    Raises ``Invalid`` for an unknown one, for a file that is no profile, and for a part of no notebook.
    """
    own, known = label(profile) != profile, names()
    path = meant(profile) if own else NOTEBOOKS / "profiles" / f"{profile}.yaml"
    if own and label(profile) in known:
        raise Invalid(f"{path} has the name of a profile of the course: give it another one.")
    if not (path.is_file() if own else profile in known):
        there = f"{', '.join(known)}, and any file that ends in .yaml"
        raise Invalid(f'There is no profile "{path if own else profile}"{nearest(profile, known)}; there are {there}.')
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise Invalid(f"{path.name} is not YAML: {' '.join(str(e).split())}.") from e
    if not isinstance(content, dict) or not all(isinstance(part or {}, dict) for part in content.values()):
        raise Invalid(f"{path.name} must map notebooks to their parameters, each a mapping of names to values.")
    stems, found = ["all", *sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))], {}
    for key, part in content.items():
        stem = next((stem for stem in stems if meets(key, stem)), None)
        if stem is None or stem in found:
            why = f'names "{key}" twice' if stem else f'has a part for "{key}", which is no notebook'
            raise Invalid(f"{path.name} {why}{'' if stem else nearest(key, stems)}; there are {', '.join(stems)}.")
        found[stem] = part or {}
    return found


def meets(name: str | int, stem: str) -> bool:
    """Whether a name means the notebook with this stem, 01_attacks: so do 01_attacks.ipynb, 01 and 1."""
    name = str(name).removesuffix(".ipynb")
    return name == stem or ((name + stem[:2]).isdecimal() and int(name) == int(stem[:2]))


class _Loader(yaml.SafeLoader):
    """YAML with numbers as they are written. In YAML 1.1, which PyYAML reads, 010 is 8, 1:30 is 90, and 1e3 a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":int", ":float"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in ((int, r"[-+]?\d+$"), (float, r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$")):
    _tag = f"tag:yaml.org,2002:{_kind.__name__}"
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern, re.ASCII | re.IGNORECASE), list("-+.0123456789"))
    _Loader.add_constructor(_tag, lambda loader, node, kind=_kind: kind(node.value))


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
    known = declared(notebook_path)
    values = {}
    for given in (content.get("all", {}), content.get(stem, {}), overrides or {}):
        for name, value in given.items():
            if name not in known:
                raise Invalid(f'{stem} has no parameter "{name}"{nearest(name, known)}; it has {", ".join(known)}.')
            text = given is overrides and isinstance(value, str)
            kind, item, optional, least = known[name]
            value = _checked(value, kind, item, optional, f"{name} of {stem}", text)
            top = 255 if "_255" in name else 1 if name == "far" else math.inf
            for one in value if isinstance(value, list) else [value]:
                if type(one) in (int, float):
                    number(f"{name} of {stem}", one, least, top)
            values[name] = _absolute(name, value)
    return values


def _absolute(name, value):
    """A folder as the notebook must be told of it, whose own folder is another; other values as they are."""
    if not isinstance(value, str) or not value:
        return value
    folder = name.endswith("_dir") or (name.endswith(FACES) and value not in ("orl", "lfw"))
    # a prior may be a folder or a name of the hub's
    return str(meant(value)) if folder or (name == "prior_name" and meant(value).is_dir()) else value


def spread(notebook_paths: Iterable[Path], overrides: Mapping | None) -> list[dict]:
    r"""Every combination of overrides in which each parameter has one value.

    "1,2,4" or a list means one run for each value, unless the parameter is itself a list; a comma in a value is
    written "\,". Folders come back absolute.
    """
    known = {name: kind for path in notebook_paths for name, (kind, *_) in declared(path).items()}
    choices = {}
    for name, value in (overrides or {}).items():
        if known.get(name) != "list" and isinstance(value, str):
            value = [part.strip().replace(r"\,", ",") for part in re.split(r"(?<!\\),", value)]
        several = value if known.get(name) != "list" and isinstance(value, list) else [value]
        choices[name] = [_absolute(name, one) for one in several]
        if not several:
            raise Invalid(f"No value was given for {name}.")
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def declared(notebook_path: Path) -> dict[str, tuple]:
    """What a notebook's parameters cell declares: {name: (type, type of a list's items, may it be None, least number)}.

    A type is None where the cell does not say. The least number is 0, but 1 where the cell gives whole numbers from 1
    on and does not say what "0:" means. Raises ``Invalid`` unless exactly one cell is tagged parameters.
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
    values = default if isinstance(default, list) else [default]
    if kind == "list" and not item and len(types := {type(value).__name__ for value in values}) == 1:
        item = types.pop()
    counts = bool(values) and all(type(value) is int and value > 0 for value in values) and "0:" not in entry["help"]
    return kind if kind in TYPES else None, item if item in TYPES else None, default is None, int(counts)


def _checked(value, kind, item, optional, where, text=False):
    """The value as the notebook shall get it; ``text``: it is to be read as YAML."""
    if isinstance(value, str) and kind == "float":
        with contextlib.suppress(ValueError):
            value = float(value)  # 1e-3, which YAML takes for a text
    if text and isinstance(value, str) and kind != "str":
        with contextlib.suppress(yaml.YAMLError):
            value = yaml.load(value, _Loader)
    if kind is None or (value is None and optional):
        return value
    if kind == "float" and type(value) is int:
        return float(value)
    if type(value) is not TYPES[kind]:
        hint = f': write "[{value}]"' if text and kind == "list" else ""
        raise Invalid(f"{where} must be of type {kind}, not {type(value).__name__} ({value!r}){hint}.")
    return [_checked(entry, item, None, False, f"an item of {where}") for entry in value] if item else value
