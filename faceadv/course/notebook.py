"""Notebooks as files: read with small faults put right, and whether their outputs belong to their code."""

import hashlib
import json
from pathlib import Path

import nbformat

from faceadv.errors import Invalid


def read(path):
    """A notebook with what nbformat would warn about, or papermill miss, put right (in memory only)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        minor, cells = content["nbformat_minor"], content["cells"]
    except (ValueError, KeyError, TypeError) as e:
        raise Invalid(f"{path.name} is not a notebook (nbformat 4).") from e
    for number, cell in enumerate(cells):
        if minor >= 5:
            cell.setdefault("id", f"cell-{number}")
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    content["metadata"]["kernelspec"] = kernel
    return nbformat.reads(json.dumps(content), as_version=4)


def source_sha256(notebook):
    """A hash of a notebook's code."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def is_current(path):
    """Whether the outputs in a committed notebook belong to the code in it."""
    notebook = read(Path(path))
    return notebook.metadata.get("faceadv", {}).get("source_sha256") == source_sha256(notebook)
