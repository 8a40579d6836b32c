"""Records: what a notebook measured, beside what its paper reports, as JSON; tables are made from records."""

import json
import math
import platform
import time
from collections.abc import Iterable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path

import pandas as pd
import psutil

from faceadv.errors import Invalid
from faceadv.store import threads
from faceadv.store.paths import nearest, replacing

__all__ = ["collect", "differences", "markdown", "number", "place", "read", "table", "write"]

PACKAGES = ("faceadv", "numpy", "torch", "torchvision", "pillow", "scikit-learn", "scipy")


def number(name: str, value, low=None, high=None, n=None, paper: float | str | None = None, **texts: str) -> dict:
    """One measured number, as a record keeps it, with its 95 % interval and the sample size n.

    value, low, high, n: numbers of Python, NumPy or torch, or None; paper: what the paper reports, a number or a text;
    texts: ``unit``, ``how`` it was made, and a ``note``. Raises ``Invalid`` for a number that is not finite; only for
    low and high NaN means that there is none, because pandas writes it so.
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
                raise Invalid(f"The {key} of {name} is {entry}, which a record cannot hold: say None, and why in note.")
            whole[key] = float(f"{entry:.6g}")
    return whole


def place(results_dir: str | Path, profile: str, notebook: str) -> Path:
    """Where the record of a notebook and profile belongs: RESULTS_DIR/PROFILE/NOTEBOOK.json."""
    return Path(results_dir) / profile / f"{notebook}.json"


def write(
    path: str | Path, *, notebook: str, profile: str, seed: int, numbers: list, data="", device="cpu", timings=None
) -> dict:
    """Write a record, whole or not at all, and return it. Raises ``Invalid`` if two numbers have the same name.

    numbers: from ``number``; data: the faces, how many, the settings, whatever JSON can hold. What differs from run to
    run is kept apart under ``run``: date, versions, ``device``, ``timings`` (a dict of what else was timed), and
    ``seconds``, which is the age of this process, a notebook's kernel.
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
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
    }
    record = {"notebook": notebook, "profile": profile, "seed": seed, "data": data}
    record["numbers"] = [number(**entry) for entry in numbers]
    record["run"] = run | ({"timings": timings} if timings else {})
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return record


def read(path: str | Path) -> dict:
    """The record in a file. Raises ``FileNotFoundError`` if there is none, ``Invalid`` if the file is no record."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _ = [entry["name"] for entry in record["numbers"]]
    except (ValueError, KeyError, TypeError) as e:
        raise Invalid(f"{path.name} is not a record.") from e
    return record


def differences(a: Mapping | str | Path, b: Mapping | str | Path, rtol: float = 0) -> list[str]:
    """Where the numbers of two records, or of their files, differ: one line each, none if they are the same.

    Values and intervals may differ by a share ``rtol``. Errors as for ``read``.
    """
    a, b = (
        {entry["name"]: entry for entry in (record if isinstance(record, dict) else read(record))["numbers"]}
        for record in (a, b)
    )
    found = [f"{name} is in one record only" for name in a.keys() ^ b.keys()]
    for name in a.keys() & b.keys():
        for key in sorted(a[name].keys() | b[name].keys()):
            x, y = a[name].get(key), b[name].get(key)
            measured = key in ("value", "low", "high") and None not in (x, y)
            if x != y and not (measured and math.isclose(x, y, rel_tol=rtol)):
                found.append(f"{key} of {name}: {x!r} and {y!r}")
    return sorted(found)


def table(record: Mapping, names: Iterable[str] | Mapping[str, str] | None = None) -> pd.DataFrame:
    """The numbers of a record as a table to display: ours with its interval beside the paper's.

    ``names`` picks rows in that order: a list of names, or a dict of names and the words to show instead. Raises
    ``Invalid`` for a name that the record does not have.
    """
    entries = {entry["name"]: entry for entry in record["numbers"]}
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
    """The numbers of several records in one table: one number per row, the varied parameters as its first columns.

    places: pairs of the parameters of a run and its record's file. Errors as for ``read``.
    """
    columns, rows = ("name", "value", "low", "high", "n", "unit"), []
    for values, place in places:
        record = read(place)
        for entry in record["numbers"]:
            rows.append({**values, "notebook": record["notebook"], **{key: entry[key] for key in columns}})
    return pd.DataFrame(rows)


def _shown(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(record: Mapping, names: Iterable[str] | Mapping[str, str] | None = None) -> str:
    """What ``table`` gives, in Markdown."""
    frame = table(record, names)
    rows = [["number", *frame.columns], ["---"] * (1 + len(frame.columns)), *frame.reset_index().astype(str).values]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
