"""Records: what a notebook measured, beside what its paper reports, as JSON; tables are made from records."""

import contextlib
import json
import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import SupportsFloat

import pandas as pd
import psutil

from faceadv import __version__
from faceadv.errors import Invalid, Missing
from faceadv.store import threads
from faceadv.store.paths import PROJECT, nearest, replacing

__all__ = [
    *("beside", "collect", "committed", "differences", "insert", "markdown", "number", "place", "read", "table"),
    "write",
]

DEFAULT = "../build/results"  # what the notebooks' parameters say
PACKAGES = ("numpy", "torch", "torchvision", "pillow", "scikit-learn", "scipy")
Number = SupportsFloat | None  # of Python, NumPy or torch


def number(
    name: str,
    value: Number,
    low: Number = None,
    high: Number = None,
    n: Number = None,
    paper: float | str | None = None,
    **texts: str,
) -> dict:
    """One measured number, as a record keeps it.

    Parameters
    ----------
    name : of the number; no other number of the record has it
    value : what was measured
    low, high : its 95 % interval; NaN means that there is none, as None does
    n : the sample size
    paper : what the paper reports, a number or a text
    texts : ``unit``, ``how`` the number was made, and a ``note``

    Raises
    ------
    Invalid : if the value or n is not finite
    """
    if texts.keys() - {"unit", "how", "note"}:
        raise TypeError(f"The texts of a number are unit, how and note, not {', '.join(texts)}.")
    low, high = (None if bound != bound else bound for bound in (low, high))
    whole = {"name": str(name), "value": value, "low": low, "high": high, "n": n}
    whole |= {"unit": "", "how": "", "paper": paper, "note": ""} | texts
    for key, entry in whole.items():
        entry = whole[key] = entry.item() if hasattr(entry, "item") else entry
        if isinstance(entry, float):
            if not math.isfinite(entry):
                raise Invalid(
                    f"The {key} of {name} is {entry}, which no record can hold: give None, and say why in note."
                )
            whole[key] = float(f"{entry:.6g}")
    return whole


def place(results_dir: str | Path, profile: str, notebook: str) -> Path:
    """Where a record belongs: RESULTS_DIR/PROFILE/NOTEBOOK.json.

    Parameters
    ----------
    results_dir : the folder of all records; the notebooks' own default, ``DEFAULT``, is in the checkout where they run
        in its notebooks/, and in the current folder where they run elsewhere, as papermill runs them
    profile : the parameters that the notebook ran with
    notebook : its name without ".ipynb"
    """
    if str(results_dir) == DEFAULT and Path.cwd() != PROJECT / "notebooks":
        results_dir = "build/results"
    return Path(results_dir) / profile / f"{notebook}.json"


def write(
    path: str | Path,
    *,
    notebook: str,
    profile: str,
    seed: int,
    numbers: Sequence[dict],
    data: object = "",
    device: object = "cpu",
    timings: Mapping | None = None,
) -> dict:
    """Write a record, whole or not at all, and return it.

    What differs from run to run is kept apart under ``run``: the date, versions, the device, timings, and ``seconds``,
    which is the age of this process (a notebook's kernel).

    Parameters
    ----------
    path : from ``place``
    notebook, profile, seed : what ran, and with what
    numbers : from ``number``
    data : the faces, how many, the settings: whatever JSON can hold
    device : on which it ran, a text or a torch device
    timings : what else was timed

    Raises
    ------
    Invalid : if two numbers have the same name
    """
    seen = [entry["name"] for entry in numbers]
    twice = sorted({name for name in seen if seen.count(name) > 1})
    if twice:
        raise Invalid(f"Numbers of a record need different names; {', '.join(twice)} came more than once.")
    process = psutil.Process()
    run = {
        "created": date.today().isoformat(),
        "seconds": round(time.time() - process.create_time(), 1),
        "device": str(device),
        "cores": threads.cores(),
        "versions": {"python": platform.python_version(), "faceadv": __version__}
        | {name: metadata.version(name) for name in PACKAGES},
    }
    record = {"notebook": notebook, "profile": profile, "seed": seed, "data": data}
    record["numbers"] = [number(**entry) for entry in numbers]
    record["run"] = run | ({"timings": timings} if timings else {})
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return record


def read(path: str | Path) -> dict:
    """The record in a file. Raises ``Missing`` if there is no file, ``Invalid`` if the file is not a record."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _ = [entry["name"] for entry in record["numbers"]]
    except FileNotFoundError as e:
        made = f"faceadv run {path.stem} --profile {path.parent.name}"
        raise Missing(f"There is no record {path}: its notebook writes it, run {made}.") from e
    except (ValueError, KeyError, TypeError) as e:
        raise Invalid(f"{path.name} is not a record: delete it and run its notebook again.") from e
    return record


def committed(profile: str, notebook: str) -> dict:
    """The record of a notebook that ships with the project.

    Parameters
    ----------
    profile : "lfw" or "orl"
    notebook : its name without ".ipynb"

    Raises
    ------
    Missing : if there is none
    """
    return read(place(PROJECT / "results", profile, notebook))


def beside(
    record: Mapping, names: Mapping[str, str] | Iterable[str], why: Mapping[str, str] | None = None, digits: int = 1
) -> pd.DataFrame:
    """The numbers of a record as a table: paper, LFW, ORL, and why they differ.

    One of the two data sets is the record's; the other's numbers are those of ``committed``, if it has them.

    Parameters
    ----------
    record : what ``write`` returned, in profile "lfw", or in another one, whose column is then "here"
    names : the rows: names of numbers, or a dict of names and the words to show instead
    why : for some of the names, why our number and the paper's differ
    digits : after the point

    Raises
    ------
    Invalid : for a name that neither record has
    """
    shown = names if isinstance(names, Mapping) else {name: name for name in names}
    live, other = ("LFW", "ORL") if record["profile"] == "lfw" else ("here", "LFW")
    columns = {live: _entries(record), other: {}}
    with contextlib.suppress(Missing):
        columns[other] = _entries(committed(other.lower(), record["notebook"]))
    known = columns[other] | columns[live]
    rows = {}
    for name, words in shown.items():
        if name not in known:
            raise Invalid(f'The record has no number "{name}"{nearest(name, known)}.')
        row = {"paper": _shown(known[name]["paper"])}
        row |= {column: _interval(columns[column].get(name), digits) for column in sorted(columns)}
        rows[words] = row | {"why they differ": (why or {}).get(name, "")}
    table = pd.DataFrame(rows).T
    return table.loc[:, (table != "").any()]


def _entries(record):
    return {entry["name"]: entry for entry in record["numbers"]}


def _interval(entry, digits):
    """A number with its interval as a text, or nothing."""
    if entry is None:
        return ""
    value, low, high = (None if v is None else f"{v:.{digits}f}" for v in (entry["value"], entry["low"], entry["high"]))
    return value if low is None else f"{value} [{low}, {high}]"


def differences(a: Mapping | str | Path, b: Mapping | str | Path, rtol: float = 0, atol: float = 0) -> list[str]:
    """The differences between the numbers of two records: one line for each, none if they are the same.

    Parameters
    ----------
    a, b : records or their files, with the errors of ``read``
    rtol : the share by which values and intervals may differ
    atol : the difference that they may have in any case; two distances of 0, say, differ by rounding
    """
    a, b = (_entries(record if isinstance(record, dict) else read(record)) for record in (a, b))
    found = [f"{name} is in one record only" for name in a.keys() ^ b.keys()]
    for name in a.keys() & b.keys():
        for key in sorted(a[name].keys() | b[name].keys()):
            x, y = a[name].get(key), b[name].get(key)
            measured = key in ("value", "low", "high") and None not in (x, y)
            if x != y and not (measured and math.isclose(x, y, rel_tol=rtol, abs_tol=atol)):
                found.append(f"{key} of {name}: {x!r} and {y!r}")
    return sorted(found)


def table(record: Mapping, names: Iterable[str] | Mapping[str, str] | None = None) -> pd.DataFrame:
    """The numbers of a record as a table to display: our number with its interval beside the paper's.

    names: the rows in their order, all by default: a list of names, or a dict of names and the words to show instead.
    Raises ``Invalid`` for a name that the record does not have.
    """
    entries = _entries(record)
    names = list(entries) if names is None else names
    for name in names:
        if name not in entries:
            raise Invalid(f'The record has no number "{name}"{nearest(name, entries)}.')
    shown = names if isinstance(names, dict) else dict(zip(names, names))
    keys = ("value", "low", "high", "paper", "unit", "n", "how", "note")
    columns = {key: [_shown(entries[name][key]) for name in shown] for key in keys}
    intervals = [f" [{low}, {high}]" if low else "" for low, high in zip(columns.pop("low"), columns.pop("high"))]
    ours = [value + interval for value, interval in zip(columns.pop("value"), intervals)]
    filled = {"ours [low, high]": ours} | {key: column for key, column in columns.items() if any(column)}
    return pd.DataFrame(filled, index=list(shown.values()))


def collect(places: Iterable[tuple[Mapping, Path]]) -> pd.DataFrame:
    """The numbers of several records in one table: one number per row, the varied parameters in the first columns.

    places: pairs of the parameters of a run and the file of its record. Errors as for ``read``.
    """
    columns, rows = ("name", "value", "low", "high", "n", "unit"), []
    for values, place in places:
        record = read(place)
        for entry in record["numbers"]:
            rows.append({**values, "notebook": record["notebook"], **{key: entry[key] for key in columns}})
    return pd.DataFrame(rows)


def insert(path: Path, name: str, text: str) -> None:
    """Replace what stands between two marks in a Markdown file.

    Parameters
    ----------
    path : of the file
    name : of the marks, ``<!-- name -->`` and ``<!-- /name -->``, each on a line of its own
    text : what shall stand between them, whole lines

    Raises
    ------
    Invalid : if the marks are not there
    """
    start, end, old = f"<!-- {name} -->\n", f"<!-- /{name} -->\n", path.read_text(encoding="utf-8")
    if not 0 <= old.find(start) < old.find(end):
        raise Invalid(f"{path} has no line {start.strip()} with {end.strip()} below it.")
    with replacing(path) as part:
        part.write_text(old.partition(start)[0] + start + text + end + old.partition(end)[2], encoding="utf-8")


def _shown(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(record: Mapping) -> str:
    """What ``table`` gives for all numbers of a record, in Markdown."""
    frame = table(record)
    rows = [["number", *frame.columns], ["---"] * (1 + len(frame.columns)), *frame.reset_index().astype(str).values]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
