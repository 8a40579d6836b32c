"""How many people `faceadv deidentify` hides, judged by another photo of each: the table of docs/deidentify.md.

    FACEADV_DATA=… python benchmarks/hiding.py 0.98 0.97 0.95 0.92 --out build/hiding

People of LFW's test half whom all three recognisers take for the same person in their first two photos. The first photo
is de-identified, saved as JPEG, and its face found again; the distance is that to the second photo, which the
protection has not seen. Each level of SSIM is kept in a file of its own, and what is there is not computed again.
Of people of the test half it writes results/hiding.json and the table in docs/deidentify.md.
"""

import argparse
import io
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from faceadv import align, deidentify, measures, metrics, recognisers, records
from faceadv.store import datasets
from faceadv.store.lfw_people import dev_people
from faceadv.store.paths import PROJECT

NAMES = (*deidentify.MADE_FOR, deidentify.UNSEEN)
RECORD = PROJECT / "results" / "hiding.json"
BOTH = "both it was made for"


def face(photo, near=None):
    """Landmarks and chip of the main face, or of the one that is nearest to given landmarks."""
    (found,) = align.find_every_face([photo])
    if near is not None:
        found = [min(found, key=lambda points: np.abs(points - near).sum(), default=near)]
    return (found[0], chip(photo, found[0])) if found else (None, None)


def chip(photo, points):
    return torch.from_numpy(align.cut(photo, align.similarity(points)))[None].float() / 255


def chosen(nets, half, count, seed=0):
    """The first photo, its landmarks and chip, and the other photo's embeddings, of so many people."""
    folder, files = datasets.photos("lfw")
    photos = {}
    for file in files:
        photos.setdefault(file.split("/")[0], []).append(folder / file)
    names, found = [name for name in dev_people(photos, half) if len(photos[name]) > 1], []
    random.Random(seed).shuffle(names)
    for name in names:
        first, second = (align.read_photo(path) for path in photos[name][:2])
        (points, own), (_, other) = face(first), face(second)
        if own is None or other is None:
            continue
        a, b = ([recognisers.embed_all(net, image) for net in nets] for image in (own, other))
        if all(net.distance(x, y).item() < net.threshold for net, x, y in zip(nets, a, b)):
            found.append((name, first, points, own, b))
        if len(found) == count:
            return found
    raise SystemExit(f"Only {len(found)} people are recognised by all.")


def measure(person, nets, ssim, pictures):
    """What became of one person's photo."""
    name, photo, points, own, other = person
    started = time.process_time()
    changed = deidentify.protect(photo, align.similarity(points), nets[:-1], ssim)
    seconds, file = time.process_time() - started, io.BytesIO()
    Image.fromarray(changed).save(file, "JPEG", **deidentify.OPTIONS["JPEG"])
    written = np.asarray(Image.open(file))
    _, after = face(written, points)
    apart = [net.distance(recognisers.embed_all(net, after), one).item() for net, one in zip(nets, other)]
    if pictures:
        Image.fromarray(np.hstack([photo, written])).save(pictures / f"{name}-{ssim}.png")
    row = {"name": name, "ssim": metrics.ssim(chip(written, points), own).item(), "seconds": seconds}
    return row | {net.name: distance / net.threshold for net, distance in zip(nets, apart)}


def measured(found):
    """The numbers of a record, of the rows of each level of SSIM."""
    numbers = []
    for level, rows in found.items():
        who = [row["name"] for row in rows]
        for name, known in ((BOTH, deidentify.MADE_FOR), (deidentify.UNSEEN, [deidentify.UNSEEN])):
            hidden = [all(row[one] >= 1 for one in known) for row in rows]
            measures.share(numbers, f"SSIM {level}: hidden from {name}", hidden, who)
        for key in ("ssim", *NAMES):
            how = "of the chip in the file" if key == "ssim" else "mean distance, in thresholds"
            measures.mean(numbers, f"SSIM {level}: {key}", [row[key] for row in rows], who, how)
    return numbers


def table(record):
    """The record as the table of docs/deidentify.md: a line for each level."""
    found = {entry["name"]: entry for entry in record["numbers"]}
    text = f"| SSIM asked for | in the file | people | hidden from {BOTH} | from {deidentify.UNSEEN} | mean distance, "
    text += f"in thresholds: {', '.join(NAMES)} |\n|---|---|---|---|---|---|\n"
    for level in dict.fromkeys(name.split(":")[0] for name in found):
        shares = [found[f"{level}: hidden from {name}"] for name in (BOTH, deidentify.UNSEEN)]
        words = ["{value:.0f} % [{low:.0f}, {high:.0f}]".format(**entry) for entry in shares]
        means = ", ".join(f"{found[f'{level}: {name}']['value']:.2f}" for name in NAMES)
        cells = [level.split()[1], f"{found[f'{level}: ssim']['value']:.3f}", str(shares[0]["n"]), *words, means]
        text += f"| {' | '.join(cells)} |\n"
    return text


def publish(found):
    """Write the record and the table."""
    data = {
        "people": "LFW's test half, the first ones of a draw whom all recognisers accept",
        "judge": deidentify.UNSEEN,
    }
    numbers = measured(found)
    record = records.write(RECORD, notebook="hiding", profile="lfw", seed=0, numbers=numbers, data=data)
    records.insert(PROJECT / "docs" / "deidentify.md", "hiding", table(record))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("levels", nargs="+", type=float)
    parser.add_argument("--half", default="test", help="train: to try settings on")
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("build/hiding"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    nets = [recognisers.load(name) for name in NAMES]
    people, found = chosen(nets, given.half, given.people), {}
    for ssim in given.levels:
        place = given.out / f"{given.half}-{ssim}.json"
        rows = json.loads(place.read_text()) if place.exists() else []
        for number, person in list(enumerate(people))[len(rows) :]:
            rows.append(measure(person, nets, ssim, given.out if number < 4 else None))
            place.write_text(json.dumps(rows, indent=1))
        found[ssim] = rows
    print(table({"numbers": measured(found)}))
    if given.half == "test":
        publish(found)


if __name__ == "__main__":
    main()
