"""De-identify a folder of photos: `faceadv deidentify IN_DIR OUT_DIR`.

Every face found is attacked on its chip by P-FGVM, away from its own mirror image, until the recogniser takes the two
for different people. What the attack adds to the chip is carried back into the full photo through the inverse of the
alignment, with a soft edge. The attack sees chips as they will be cut again from the photo, one where the landmarks are
and others a little aside, because landmarks found again lie elsewhere (expectation over transformation, Athalye et al.
2018). Everything reported is measured on the file that was written: 8 bits, JPEG where the photo was one.
"""

import csv
import io
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from faceadv import align, attacks, metrics, objectives, recognisers
from faceadv.errors import Invalid, Missing
from faceadv.recognisers import Recogniser
from faceadv.store import cache, progress
from faceadv.store.paths import replacing
from faceadv.store.tables import csv_safe

__all__ = ["COLUMNS", "REPORT", "folder", "protect"]

ENDINGS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
BUDGET = {"alpha": 2.0, "lam": 0.005, "steps": 100}  # of the attack
FADE = 10  # pixels of the chip over which what is added fades out towards its border
MARGIN = 1.2  # times the threshold: room for rounding and JPEG
VIEWS, SHIFT, TURN = 8, 2.0, 0.04  # cuts the attack looks at: pixels of the chip; radians, and the same in scale
REPORT, NOTE = "report.csv", ".report.json"  # the second is for the next call
COLUMNS = ["photo", "face", "state", "before", "after", "protected", "unseen before", "unseen after", "ssim"]


def folder(
    source: str | Path,
    target: str | Path,
    model: str = "dlib",
    unseen: str = "mobilenet-vggface2",
    device: str = "auto",
    **budget,
) -> list[dict]:
    """De-identify every photo below ``source`` into the same place below ``target``; returns the report's rows.

    Written photos carry their colour profile and nothing else of their metadata (no EXIF, place, thumbnail or
    comment), and their rotation is applied to the pixels. Photos without a face are copied as they are, with all
    metadata; what cannot be read, a folder, too, is left out; both have a row that says so. The report is written
    after each photo: when a run was stopped, the same call goes on with the photos that it does not have.

    There is one row per face, a dict of ``COLUMNS``, also written to ``target/report.csv``. before, after: distance of
    the photo's face to its own mirror image, and of the written file's face to the same mirror image; protected: after
    is at least the threshold of ``model``; unseen before, unseen after: the same distances by ``unseen``, divided by
    its threshold (1 and more is protected); ssim: of the chip.

    Parameters
    ----------
    source : folder with JPEG and PNG files, in subfolders too; ``Missing`` if it is none, ``Invalid`` if it has none
    target : folder that is empty, not there yet, or of such a run, neither inside ``source`` nor around it, or
        ``Invalid``
    model, unseen : names of the recogniser that is attacked, and of one that the attack does not know
    device : where the recognisers compute (see ``precision.device``)
    budget : alpha, lam or steps of ``attacks.pfgvm``, instead of those in ``BUDGET``
    """
    source, target = Path(source), Path(target)
    names = {}
    for path in _photos(source, target):
        content = path if os.path.isfile(path) and os.access(path, os.R_OK) else None
        names[cache.key(str(path.relative_to(source)), content, model, unseen, budget)] = path.relative_to(source)
    found = _done(target, names)
    known, other = recognisers.load(model, device), recognisers.load(unseen, device)
    _report(target, names, found)  # by which the next call knows the folder, whenever this one ends
    for key, name in progress.bar(names.items(), desc="de-identifying", unit="photo"):
        if key not in found:
            found[key] = _file(source / name, name, target, known, other, budget)
            _report(target, names, found)
    return [row for key in names for row in found[key]]


def _report(target, names, found):
    """Write the rows of the photos that are done."""
    # a name that is not Unicode has backslashes there
    with replacing(target / REPORT) as part, open(part, "w", -1, "utf-8", "backslashreplace", "") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for row in (row for key in names for row in found.get(key, ())):
            writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else csv_safe(v) for k, v in row.items()})
    cache.write_json(target / NOTE, found)


def _done(target, names):
    """What a stopped run has done, rows by key. ``Invalid`` if ``target`` is neither its folder nor empty."""
    old = cache.read_json(target / NOTE) if target.is_dir() else None
    taken = target.is_file() or any(target.glob("*"))
    if taken and (old is None or (old and not old.keys() & names.keys())):
        raise Invalid(f"{target} is there already and not an empty folder, nor one of such a run: name a new one.")
    found = {key: rows for key, rows in (old or {}).items() if key in names and (target / names[key]).is_file()}
    if old is not None:
        progress.log.warning("%d of %d photos were done before.", len(found), len(names))
    return found


def _photos(source, target):
    """The photos below ``source``, once it is sure that ``target`` lies elsewhere."""
    if not source.is_dir():
        raise Missing(f"{source} is not a folder.")
    inside, around = source.resolve(), target.resolve()
    if inside == around or inside in around.parents or around in inside.parents:
        raise Invalid(f"{target} must lie outside {source}, and not around it.")
    photos = []  # and folders that cannot be read
    for place, _, files in os.walk(source, onerror=lambda e: photos.append(Path(e.filename))):
        # macOS writes a file "._a.jpg", which is no photo, beside each "a.jpg"
        names = [file for file in files if Path(file).suffix.lower() in ENDINGS and file[:2] != "._"]
        photos.extend(Path(place, name) for name in names)
    if not photos:
        raise Invalid(f"{source} holds no photos (JPEG or PNG).")
    return sorted(photos)


def _file(path, name, target, known, other, budget):
    try:
        photo = align.read_photo(path)
    except OSError:
        return [{"photo": str(name), "state": "unreadable, left out"}]
    (faces,) = align.find_every_face([photo])
    if not faces:
        with replacing(target / name) as part:
            shutil.copyfile(path, part)
        return [{"photo": str(name), "state": "no face found, copied as it is"}]
    changed = photo
    for points in faces:
        changed = protect(changed, align.similarity(points), known, **budget)
    with replacing(target / name) as part:
        part.write_bytes(_encode(changed, path))
    written = align.read_photo(target / name)
    (found,) = align.find_every_face([written])
    return [
        {"photo": str(name), "face": i} | _measure(photo, points, written, found, known, other)
        for i, points in enumerate(faces, 1)
    ]


def _measure(photo, points, written, found, known, other):
    """One face, with landmarks ``points``, before and after, as a dict (see ``folder``)."""
    # a recogniser would cut the chip at the landmarks found anew, unless none of them are near
    near = min(found, key=lambda other_points: np.abs(other_points - points).sum(), default=points)
    reach = np.linalg.norm(points[0] - points[1])  # between the eyes
    near = near if np.abs(near - points).max() < reach else points
    clean, after = _chip(photo, align.similarity(points)), _chip(written, align.similarity(near))
    row = {}
    for recogniser, names, unit in ((known, COLUMNS[3:5], 1.0), (other, COLUMNS[6:8], other.threshold)):
        mirrored = recognisers.embed_all(recogniser, clean.flip(3))
        for column, chip in zip(names, (clean, after)):
            row[column] = recogniser.distance(recognisers.embed_all(recogniser, chip), mirrored).item() / unit
    row["protected"] = row["after"] >= known.threshold
    row["state"] = "de-identified" if row["protected"] else "changed, but still recognised"
    row["ssim"] = metrics.ssim(_chip(written, align.similarity(points)), clean).item()
    return row


def protect(photo: np.ndarray, matrix: np.ndarray, recogniser: Recogniser, **budget) -> np.ndarray:
    """A copy of the photo with one face de-identified, (H, W, 3) uint8.

    P-FGVM on the chip, on the mean loss over ``VIEWS`` cuts. It stops when all of them are at ``MARGIN`` times the
    recogniser's threshold from the face's mirror image: the squared distance from the face itself has no slope. A photo
    that shows nothing of the chip comes back as it is.

    Parameters
    ----------
    photo : (H, W, 3) uint8
    matrix : (2, 3), from the photo to the face's chip, as ``align.similarity`` gives it
    recogniser : the one that is attacked
    budget : as for ``folder``
    """
    if _box(matrix, photo.shape) is None:
        return photo
    small, reduced = align.reduce(photo, matrix)
    left, top, right, bottom = _box(reduced, small.shape)
    device = recognisers.device_of(recogniser)
    patch = torch.from_numpy(small[top:bottom, left:right].copy()).permute(2, 0, 1)[None].to(device).float() / 255
    place = _moved(reduced, left, top)
    size = (align.SIZE, align.SIZE)
    out = align.grid(place, patch.shape[2:], size).to(device)
    jittered = [align.inverse(jitter @ np.vstack([place, [0, 0, 1]])) for jitter in _jitters()]
    cuts = torch.cat([align.grid(back, size, patch.shape[2:]) for back in jittered]).to(device)
    chip = _chip(photo, matrix).to(device)
    mirrored = recogniser.embed(chip.flip(3)).expand(VIEWS, -1)
    away, views = objectives.dodging(recogniser, mirrored, MARGIN * recogniser.threshold), torch.arange(VIEWS)

    def objective(images, rows, exact=False):
        # what a recogniser will get: chips, cut again from the photo into which the change was carried
        changed = (patch + _carry(images - chip, out)).clamp(0, 1)
        shown = F.grid_sample(changed.expand(VIEWS, -1, -1, -1), cuts, padding_mode="border", align_corners=False)
        loss, reached = away(shown.clamp(0, 1), views, exact)
        return loss.mean()[None], reached.all()[None]

    objective.fast = away.fast
    attacked = attacks.pfgvm(chip, objective, **BUDGET | budget, stop_early=True)
    left, top, right, bottom = _box(matrix, photo.shape)  # the same at the photo's own size
    carried = _carry((attacked - chip).cpu(), align.grid(_moved(matrix, left, top), (bottom - top, right - left), size))
    result = photo.copy()
    region = result[top:bottom, left:right] + 255 * carried[0].permute(1, 2, 0).numpy()
    result[top:bottom, left:right] = region.round().clip(0, 255).astype(np.uint8)
    return result


def _encode(photo, like):
    """The bytes of a photo (H, W, 3) uint8 in the format of the file ``like``, with its colour profile alone."""
    with Image.open(like) as original:
        profile = original.info.get("icc_profile") if original.mode in ("RGB", "RGBA") else None
    file, kind = io.BytesIO(), ENDINGS[Path(like).suffix.lower()]
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(photo).save(file, kind, icc_profile=profile, **options)
    return file.getvalue()


def _chip(photo, matrix):
    return torch.from_numpy(align.cut(photo, matrix))[None].float() / 255


def _jitters():
    """``VIEWS`` small similarities about the chip's centre, (2, 3) each, the first of which moves nothing."""
    shifts, turns = np.random.default_rng(0).uniform(-1, 1, (2, VIEWS, 2))
    shifts[0] = turns[0] = 0
    for shift, (angle, grow) in zip(SHIFT * shifts, TURN * turns):
        linear = (1 + grow) * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        yield np.c_[linear, shift + (np.eye(2) - linear) @ np.full(2, (align.SIZE - 1) / 2)]


def _moved(matrix, left, top):
    """The matrix from a part of the photo that begins at (left, top)."""
    return np.c_[matrix[:, :2], matrix[:, 2] + matrix[:, :2] @ [left, top]]


def _box(matrix, shape):
    """(left, top, right, bottom) of what a photo of that shape shows of the chip, or None."""
    end = align.SIZE - 1
    corners = align.inverse(matrix) @ np.array([[0, end, 0, end], [0, 0, end, end], [1, 1, 1, 1]])
    limits = [shape[1], shape[0]]
    left, top = np.clip(np.floor(corners.min(1)).astype(int) - 2, 0, limits)
    right, bottom = np.clip(np.ceil(corners.max(1)).astype(int) + 3, 0, limits)
    return (left, top, right, bottom) if right > left and bottom > top else None


def _carry(change, places):
    """A change of the chip (1, 3, 112, 112), faded out towards its border, at the places in it (1, h, w, 2)."""
    distance = torch.arange(align.SIZE).float()
    distance = torch.minimum(distance, align.SIZE - 1 - distance)
    fade = (torch.minimum(distance[:, None], distance[None]) / FADE).clamp(0, 1)
    return F.grid_sample(change * fade.to(change.device), places, align_corners=False)
