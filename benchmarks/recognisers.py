"""How long each recogniser takes, forward and for a gradient in the images: python benchmarks/recognisers.py

Each takes turns with the others on the same chips, in float32 and, where the processor has it, in bfloat16. Times are
medians of the turns, a chip, with the smallest and the largest. What they reach on LFW's View 2 stands in the record
of notebook 00 in profile lfw. Writes results/recognisers.json and the table in docs/measured.md.
"""

import argparse
import statistics
import time

import torch

from faceadv import faces, recognisers, records
from faceadv.benchmark import grid
from faceadv.precision import has_bfloat16
from faceadv.store.paths import PROJECT

RECORD = PROJECT / "results" / "recognisers.json"
LFW = PROJECT / "results" / "lfw" / "00_faces_and_recognisers.json"


def gradient(recogniser, images, fast):
    """The slope of the embeddings' first numbers in the images."""
    images = images.clone().requires_grad_(True)
    return torch.autograd.grad(recogniser.embed(images, fast=fast)[:, 0].sum(), images)[0]


@torch.no_grad()
def forward(recogniser, images, fast):
    return recogniser.embed(images, fast=fast)


def measure(chips=32, repeats=9, path=RECORD):
    """Time all recognisers that are here, and write the record."""
    images = faces.load("orl")[:chips].images
    networks = [recognisers.load(name) for name in grid.present(recognisers.NAMES)]
    precisions = {"float32": False} | ({"bfloat16": True} if has_bfloat16("cpu") else {})
    works = {
        f"{network.name}: {work.__name__}, {precision}": (work, network, fast)
        for network in networks
        for work in (forward, gradient)
        for precision, fast in precisions.items()
    }
    seconds = {name: [] for name in works}
    for turn in range(repeats + 1):  # the first one warms up
        for name, (work, network, fast) in works.items():
            began = time.perf_counter()
            with torch.enable_grad():
                work(network, images, fast)
            seconds[name] += [time.perf_counter() - began] if turn else []
    numbers = []
    for name, taken in seconds.items():
        each = [1000 * value / len(images) for value in taken]
        numbers.append(records.number(name, statistics.median(each), min(each), max(each), repeats, unit="ms a chip"))
    for network in networks:
        count = sum(p.numel() for p in network.parameters())
        numbers.append(records.number(f"{network.name}: weights", count))
    data = {"faces": "orl", "chips": len(images), "threads": torch.get_num_threads()}
    return records.write(path, notebook="recognisers", profile="orl", seed=0, numbers=numbers, data=data)


def table(record, lfw):
    """The records as the table of docs/measured.md: one line per recogniser."""
    by_name = {entry["name"]: entry for entry in record["numbers"]}
    view2 = {entry["name"]: entry for entry in lfw["numbers"]}
    columns = list(dict.fromkeys(name.split(": ")[1] for name in by_name if not name.endswith("weights")))
    lines = [f"| | million weights | LFW, View 2 | {', ms | '.join(columns)}, ms |"]
    lines += ["|---" * (len(columns) + 3) + "|"]
    for name in dict.fromkeys(name.split(": ")[0] for name in by_name):
        found = view2.get(f"LFW View 2, {name}: accuracy")
        cells = [f"{by_name[f'{name}: weights']['value'] / 1e6:.1f}"]
        cells += ["{value:.2f} % [{low:.2f}, {high:.2f}]".format(**found) if found else ""]
        cells += [f"{by_name[f'{name}: {column}']['value']:.1f}" for column in columns]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    """Measure, or with --table only write the table again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="write the table from the records as they are")
    shown = table(records.read(RECORD) if parser.parse_args().table else measure(), records.read(LFW))
    records.insert(PROJECT / "docs" / "measured.md", "recognisers", shown)
    print(shown)


if __name__ == "__main__":
    main()
