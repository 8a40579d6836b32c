"""Notebooks as files: read them with small faults put right, and hash their code."""

import hashlib
import json
from pathlib import Path

import nbformat

from faceadv.errors import Invalid

__all__ = ["read", "source_sha256"]


def read(path: str | Path) -> nbformat.NotebookNode:
    """A notebook, put right (in memory only) where nbformat would warn or papermill would miss something.

    Raises ``Invalid`` if the file is no notebook, and ``FileNotFoundError``.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["nbformat_minor"] >= 5:
            for number, cell in enumerate(content["cells"]):
                cell.setdefault("id", f"cell-{number}")
        kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
        content["metadata"]["kernelspec"] = kernel
        return nbformat.reads(json.dumps(content), as_version=4)
    except (ValueError, KeyError, TypeError, AttributeError) as e:  # the last three: JSON of another shape
        raise Invalid(f"{path.name} is not a notebook (nbformat 4).") from e


def source_sha256(notebook: nbformat.NotebookNode) -> str:
    """A hash of a notebook's code, in 64 hexadecimal digits; ``run.update`` keeps it beside the outputs."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()
