"""The benchmark's long table for readers who compute with it: CSV, Parquet, and a dictionary of its columns."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from faceadv.benchmark.cell import GOALS
from faceadv.benchmark.statistics import KEYS, lines
from faceadv.store.paths import replacing
from faceadv.store.tables import csv_safe

__all__ = ["COLUMNS", "long", "write"]

# Each column: its type, in words of Frictionless' table schema, and what it says.
COLUMNS = {
    "profile": ("string", "the set of parameters of the run; lfw and orl are those that ship"),
    "faces": ("string", "whose photos: lfw, orl, or a folder"),
    "seed": ("integer", "the first seed of the run"),
    "recogniser": ("string", "the network that decides"),
    "goal": ("string", "dodging: a pair of one person is to be rejected; impersonation: one of two people accepted"),
    "defence": ("string", "what the presented photo goes through first; none: nothing"),
    "attack": ("string", "how the presented photo was made; none: not attacked; worst: the worst of several, per pair"),
    "way": ("string", "static: knows no defence; else how the attack goes through it; of N: the worst of N"),
    "eps_255": ("number", "budget: the largest change of a pixel, in grey levels of 255"),
    "source": ("string", "the network that the attack was made with; empty: the one that decides"),
    "right": ("number", "right decisions in %: one person's pairs accepted, two people's rejected"),
    "low": ("number", "lower end of the 95 % interval over people, in %"),
    "high": ("number", "upper end of the 95 % interval over people, in %"),
    "n": ("integer", "how many pairs"),
}
BOUNDS = {name: {"minimum": 0, "maximum": 100} for name in ("right", "low", "high")}
BOUNDS |= {"eps_255": {"minimum": 0}, "n": {"minimum": 1}, "goal": {"enum": [*GOALS]}}


def long(records: Iterable[Mapping]) -> pd.DataFrame:
    """One row for each number of a cell or a worst case, with the columns of ``COLUMNS``.

    records: of notebook 07, as ``records.read`` gives them
    """
    parts = [
        lines(record).assign(profile=record["profile"], faces=record["data"]["faces"], seed=record["seed"])
        for record in records
    ]
    table = pd.concat(parts) if parts else pd.DataFrame(columns=list(COLUMNS))
    types = {"string": "str", "integer": "int64", "number": "float64"}
    return table[list(COLUMNS)].astype({name: types[kind] for name, (kind, _) in COLUMNS.items()})


def write(records: Iterable[Mapping], folder: Path | str) -> list[Path]:
    """Write benchmark.csv, benchmark.parquet and datapackage.json, which says what each column means; gives the paths.

    Parameters
    ----------
    records : of notebook 07
    folder : where to; it is made if it is not there, and files of these names are replaced

    Source: of the dictionary's form, the Data Package standard (https://datapackage.org).
    """
    table, folder = long(records), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fields = [
        {"name": name, "type": kind, "description": what} | ({"constraints": BOUNDS[name]} if name in BOUNDS else {})
        for name, (kind, what) in COLUMNS.items()
    ]
    schema = {"fields": fields, "primaryKey": ["profile", *KEYS], "missingValues": []}
    files = {"csv": folder / "benchmark.csv", "parquet": folder / "benchmark.parquet"}
    resources = [
        {"name": f"benchmark-{kind}", "path": path.name, "format": kind, "schema": schema}
        for kind, path in files.items()
    ]
    package = {"name": "faceadv-benchmark", "licenses": [{"name": "MIT"}], "resources": resources}
    paths = [*files.values(), folder / "datapackage.json"]
    with replacing(paths[0]) as part:
        table.map(csv_safe).to_csv(part, index=False, lineterminator="\n")
    with replacing(paths[1]) as part:
        table.to_parquet(part, index=False)
    with replacing(paths[2]) as part:
        Path(part).write_text(json.dumps(package, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return paths
