"""Profiles: named sets of notebook parameters, checked before anything runs."""

import ast
import itertools
import re

import papermill
import yaml

from faceadv.course import notebook
from faceadv.errors import Invalid
from faceadv.store.paths import PROJECT, nearest

NOTEBOOKS = PROJECT / "notebooks"
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list}


def names():
    """The profiles there are."""
    return sorted(path.stem for path in (NOTEBOOKS / "profiles").glob("*.yaml"))


def load(profile):
    """The parameters of a profile: notebook stem (or ``all``) -> {name: value}. Raises ``ValueError``."""
    if profile not in names():
        raise Invalid(f'There is no profile "{profile}"{nearest(profile, names())}; there are {", ".join(names())}.')
    path = NOTEBOOKS / "profiles" / f"{profile}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as e:
        raise Invalid(f"{path.name} is not YAML: {' '.join(str(e).split())}.") from e
    if not isinstance(content, dict) or not all(isinstance(part or {}, dict) for part in content.values()):
        raise Invalid(f"{path.name} must map notebooks to their parameters, each a mapping of names to values.")
    return {str(stem): part or {} for stem, part in content.items()}


def parameters(profile, notebook_path, overrides=None):
    """The parameters that ``profile`` and ``overrides`` give to a notebook, each name and type checked.

    An override that is a text is read as on the command line: as YAML, unless the parameter is a text.
    Raises ``ValueError`` for a name that the notebook does not have and for a value of the wrong type.
    """
    stem, content = notebook_path.stem, load(profile)
    stems = [path.stem for path in notebook_path.parent.glob("*.ipynb")]
    strays = [key for key in content if key not in stems and key != "all"]
    if stem not in content and nearest(stem, strays):  # a mistyped key would silently leave the defaults
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


def spread(notebook_paths, overrides):
    """Every combination of overrides in which a parameter has one value: a list of dicts.

    "1,2,4" or a list means one run for each value, unless the parameter is itself a list.
    """
    known = {name: kind for path in notebook_paths for name, (kind, *_) in declared(path).items()}
    choices = {}
    for name, value in (overrides or {}).items():
        if known.get(name) != "list" and isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        choices[name] = value if known.get(name) != "list" and isinstance(value, list) else [value]
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def declared(notebook_path):
    """What a notebook's parameters cell declares: name -> (type, type of a list's items, may it be None).

    A type is None where the cell does not say. Raises ``ValueError`` unless one cell has the tag.
    """
    found = notebook.read(notebook_path)
    tagged = [cell for cell in found.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise Invalid(f"{notebook_path.name} has {len(tagged)} cells tagged parameters; it must have exactly one.")
    # papermill fills {…} in paths, so it gets the notebook itself
    return {name: _type(entry) for name, entry in papermill.inspect_notebook(found).items()}


def defaults(notebook_path):
    """What a notebook's parameters cell gives each parameter: name -> value."""
    entries = papermill.inspect_notebook(notebook.read(notebook_path)).items()
    return {name: ast.literal_eval(entry["default"]) for name, entry in entries}


def _type(entry):
    try:
        default = ast.literal_eval(entry["default"])
    except (ValueError, SyntaxError):  # an expression
        default = ...
    annotation = entry["inferred_type_name"]
    if annotation == "None":  # papermill's word for "not annotated"
        annotation = type(default).__name__
    kind, item = re.fullmatch(r"(\w+)(?:\[(\w+)\])?|.*", annotation).groups()
    return kind if kind in TYPES else None, item if item in TYPES else None, default is None


def _checked(value, kind, item, optional, where, text):
    """The value as the notebook shall get it, or a ``ValueError`` that says what to write instead."""
    if text and kind != "str":
        value = _from_text(value, kind)
    if kind is None or (value is None and optional):
        return value
    if kind == "float" and type(value) is int:
        return float(value)
    if type(value) is not TYPES[kind]:
        if kind == "float" and _number(value) is not None:
            raise Invalid(f"{where} must be a float, and YAML reads {value} as text: write {_with_point(value)}.")
        raise Invalid(f"{where} must be of type {kind}, not {type(value).__name__} ({value!r}).")
    if item:
        what = f"an item of {where}"
        return [_checked(entry, item, None, False, what, text and isinstance(entry, str)) for entry in value]
    return value


def _from_text(text, kind):
    if kind == "float" and _number(text) is not None:  # 1e-3, which YAML would leave a text
        return _number(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _number(value):
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _with_point(text):
    """1e-3 as YAML wants it: 1.0e-3."""
    mantissa, exponent = re.fullmatch(r"\s*([^eE]*)(?:[eE](.*?))?\s*", text).groups()
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    if exponent is None:
        return mantissa
    return f"{mantissa}e{exponent}" if exponent[:1] in "+-" else f"{mantissa}e+{exponent}"
