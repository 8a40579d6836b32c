"""What every training run here shares: checkpoints that survive a kill, a log, a learning rate."""

import json
import math
import os
from pathlib import Path

import torch
from tqdm import trange

from faceadv import faces, pairs
from faceadv.store.paths import replacing


def save(path, state):
    """Write a checkpoint whole or not at all: a kill at any point leaves the last one."""
    with replacing(path) as part:
        torch.save(state, part)


def resume(path):
    """The last checkpoint as a dict, or None. Loaded with ``weights_only=True``."""
    return torch.load(path, weights_only=True) if Path(path).exists() else None


def begin(out, resumed):
    """The checkpoint that a run goes on from, or None. The folder ``out`` is made, its log cut to the checkpoint.

    out: None if nothing is to be kept; resumed: whether to look for a checkpoint.
    """
    if out is None:
        return None
    out.mkdir(parents=True, exist_ok=True)
    state = resume(out / "last.pt") if resumed else None
    trim_log(out / "log.jsonl", state["step"] if state else -1)
    return state


def progress(start, steps):
    """The steps from ``start`` on, with a progress bar."""
    return trange(start, steps, initial=start, total=steps, disable=bool(os.environ.get("FACEADV_QUIET")))


def students(root=None):
    """LFW's training people, a FaceSet: nobody else is learned from."""
    lfw = faces.load("lfw", root)
    return lfw.people(pairs.lfw_people(lfw, "train"))


def log(path, row):
    """Append one row (a dict with "step") to a JSON-lines file."""
    with open(path, "a") as file:
        file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")


def read_log(path, every=1):
    """The rows of a JSON-lines file, a list of dicts; with ``every`` > 1 the mean of so many rows in one."""
    rows, means = [json.loads(line) for line in Path(path).read_text().splitlines()], []
    for part in (rows[i : i + every] for i in range(0, len(rows), every)):
        terms = {term: [row[term] for row in part if term in row] for term in part[-1] if term != "step"}
        means.append({"step": part[-1]["step"]} | {term: round(sum(v) / len(v), 6) for term, v in terms.items()})
    return means


def write_log(path, rows):
    """Write rows as such a file, whole or not at all."""
    with replacing(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))


def trim_log(path, step):
    """Drop the rows after ``step``, which a resumed run will write again."""
    path = Path(path)
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_log(path, [row for row in rows if row["step"] <= step])


def one_cycle(step, steps, peak, warm=0.1):
    """Learning rate at ``step``: linear warm-up over the first tenth, then half a cosine down to zero."""
    if step < warm * steps:
        return peak * (step + 1) / (warm * steps)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm * steps) / (steps - warm * steps)))


def generator(seed, step):
    """A random generator that depends on seed and step alone, so that a resumed run draws the same numbers."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)
