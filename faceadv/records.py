"""Records: what a notebook measured, beside what its paper reports, as JSON; tables are made from records."""

import json
import math
import os
import platform
import sys
import time
from datetime import date
from importlib import metadata
from pathlib import Path

import pandas as pd
import psutil

from faceadv.errors import Invalid
from faceadv.store.paths import nearest, replacing

PACKAGES = ("faceadv", "numpy", "torch", "torchvision", "pillow", "scikit-learn", "scipy")


def number(name, value, low=None, high=None, n=None, unit="", how="", paper=None, note=""):
    """One measured number: 95 % interval, sample size, unit, how it was made, the paper's number or text."""
    texts = {"unit": unit, "how": how, "note": note}
    numbers = {"value": value, "low": low, "high": high, "n": n, "paper": paper}
    numbers = {key: _plain(entry, f"{key} of {name}") for key, entry in numbers.items()}
    order = ("value", "low", "high", "n", "unit", "how", "paper", "note")
    return {"name": str(name)} | {key: (numbers | texts)[key] for key in order}


def _plain(value, what):
    """A number of NumPy, torch or Python as JSON can hold it, floats to 6 digits."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        if not math.isfinite(value):
            raise Invalid(f"The {what} is {value}, which a record cannot hold: leave it None and say so in the note.")
        return float(f"{value:.6g}")
    return value


def place(results_dir, profile, notebook):
    """Where the record of a notebook and profile belongs: RESULTS_DIR/PROFILE/NOTEBOOK.json."""
    return Path(results_dir) / profile / f"{notebook}.json"


def write(path, *, notebook, profile, seed, numbers, data="", device=None, seconds=None, timings=None):
    """Write a record, whole or not at all, and return it.

    ``numbers`` come from ``number``. What differs from run to run (date, duration, machine, versions) is
    kept apart under ``run``; ``seconds`` is by default the age of this process (a notebook's kernel), ``timings`` a
    dict of what else was timed.
    """
    seen = [entry["name"] for entry in numbers]
    twice = sorted({name for name in seen if seen.count(name) > 1})
    if twice:
        raise Invalid(f"Numbers of a record need different names; {', '.join(twice)} came more than once.")
    record = {
        "notebook": notebook,
        "profile": profile,
        "seed": seed,
        "data": data,
        "numbers": [number(**entry) for entry in numbers],
        "run": _run(device, seconds) | ({"timings": timings} if timings else {}),
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return record


def _run(device, seconds):
    process = psutil.Process()
    return {
        "created": date.today().isoformat(),
        "seconds": round(time.time() - process.create_time() if seconds is None else seconds, 1),
        "peak_mib": _peak_mib(),
        "device": str(device or _device()),
        "cores": len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def _peak_mib():
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def _device():
    torch = sys.modules.get("torch")  # a process that never imported it used no GPU
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else "cpu"


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def read(path):
    """The record in a file. Raises ``FileNotFoundError``, or ``ValueError`` if the file is no record."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _ = [entry["name"] for entry in record["numbers"]]
    except (ValueError, KeyError, TypeError) as e:
        raise Invalid(f"{path.name} is not a record.") from e
    return record


def same(a, b, rtol=0):
    """Whether two records (or their files) hold the same numbers, wherever and whenever measured."""
    return not differences(a, b, rtol)


def differences(a, b, rtol=0):
    """Where the numbers of two records differ, a line each; values and intervals may by ``rtol``."""
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


def table(record, names=None):
    """The numbers of a record as a table to display: ours with its interval beside the paper's.

    ``names`` picks rows in that order: a list of names, or a dict of names and the words to show instead.
    """
    entries = {entry["name"]: entry for entry in record["numbers"]}
    names = list(entries) if names is None else names
    for name in names:
        if name not in entries:
            raise Invalid(f'The record has no number "{name}"{nearest(name, entries)}.')
    shown = names if isinstance(names, dict) else dict(zip(names, names))
    columns = {
        "ours [low, high]": [_ours(entries[name]) for name in shown],
        "paper": [_shown(entries[name]["paper"]) for name in shown],
        **{key: [_shown(entries[name][key]) for name in shown] for key in ("unit", "n", "how", "note")},
    }
    pd.set_option("display.max_colwidth", None)  # how and note are sentences, which pandas would cut
    filled = {key: column for key, column in columns.items() if any(column) or key == "ours [low, high]"}
    return pd.DataFrame(filled, index=list(shown.values()))


def collect(places):
    """The numbers of several records in one table: a row a number, the varied parameters as its first columns.

    places: pairs of (the parameters of that run, a dict; the record's file).
    """
    rows = []
    for values, place in places:
        record = read(place)
        for entry in record["numbers"]:
            numbers = {key: entry[key] for key in ("name", "value", "low", "high", "n", "unit")}
            rows.append({**values, "notebook": record["notebook"], **numbers})
    return pd.DataFrame(rows)


def _ours(entry):
    interval = f" [{_shown(entry['low'])}, {_shown(entry['high'])}]" if entry["low"] is not None else ""
    return _shown(entry["value"]) + interval


def _shown(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(record, names=None):
    """The same table in Markdown."""
    frame = table(record, names)
    rows = [["number", *frame.columns], ["---"] * (1 + len(frame.columns))]
    rows += [[str(name), *row] for name, row in zip(frame.index, frame.to_numpy().tolist())]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
