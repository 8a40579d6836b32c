"""De-identify a folder of photos: `faceadv deidentify IN_DIR OUT_DIR`.

Every face found is attacked on its chip by P-FGVM, away from its own mirror image, until the recogniser takes the two
for different people. What the attack adds to the chip is carried back into the full photo through the inverse of the
alignment, with a soft edge; the attack sees chips as they will be cut again from the photo, one where the landmarks are
and others a little aside, since landmarks found anew lie elsewhere (expectation over transformation, Athalye et al.
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
from tqdm import tqdm

from faceadv import align, attacks, metrics, objectives, recognisers
from faceadv.errors import Invalid, Missing
from faceadv.store.paths import replacing

ENDINGS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
FADE = 10  # pixels of the chip over which what is added fades out towards its border
MARGIN = 1.2  # times the threshold: room for rounding and JPEG
VIEWS, SHIFT, TURN = 8, 2.0, 0.04  # cuts the attack looks at: pixels of the chip; radians, and the same in scale
REPORT = "report.csv"
COLUMNS = ["photo", "face", "state", "before", "after", "protected", "unseen before", "unseen after", "ssim"]


def folder(source, target, model="dlib", unseen="mobile", alpha=2.0, lam=0.005, steps=100):
    """De-identify every photo below ``source`` into the same place below ``target``; returns the report's rows.

    A row per face, as dicts of ``COLUMNS``: distance of the photo's face to its own mirror image before, and of the
    written file's face to that same mirror image after; protected: after >= the threshold of ``model``; the same two
    distances by ``unseen``, a recogniser that the attack does not know, in units of its threshold (1 and more is
    protected); SSIM of the chip. Photos without a face are copied as they are; what cannot be read is left out; both
    have a row that says so. The rows are also written to ``target/report.csv``.

    Written photos carry their colour profile and nothing else of their metadata (no EXIF, place, thumbnail or
    comment), their rotation is applied to the pixels; copied ones keep all.
    Raises ``FileNotFoundError`` if source is no folder, ``ValueError`` if it has no photos, if target has files
    already or lies inside source or around it.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise Missing(f"{source} is not a folder.")
    inside, around = source.resolve(), target.resolve()
    if inside == around or inside in around.parents or around in inside.parents:
        raise Invalid(f"{target} must lie outside {source}, and not around it.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Invalid(f"{target} is there already and not an empty folder: name a new one.")
    photos = sorted(path for path in source.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not photos:
        raise Invalid(f"{source} holds no photos (JPEG or PNG).")
    known, other = recognisers.load(model), recognisers.load(unseen)
    rows = []
    for path in tqdm(photos, desc="de-identifying", unit="photo", disable=bool(os.environ.get("FACEADV_QUIET"))):
        rows += _file(path, path.relative_to(source), target, known, other, alpha, lam, steps)
    with replacing(target / REPORT) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )
    return rows


def _file(path, name, target, known, other, alpha, lam, steps):
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
        changed = protect(changed, align.similarity(points), known, alpha=alpha, lam=lam, steps=steps)
    with replacing(target / name) as part:
        part.write_bytes(encode(changed, path))
    written = align.read_photo(target / name)
    (found,) = align.find_every_face([written])
    return [
        {"photo": str(name), "face": i} | measure(photo, points, written, found, known, other)
        for i, points in enumerate(faces, 1)
    ]


def measure(photo, points, written, found, known, other):
    """One face before and after, as a dict (see ``folder``).

    points: its landmarks in ``photo``; found: those of all faces in ``written``, of which the nearest is taken, as a
    recogniser would cut the chip there; where none is near, the old place.
    """
    near = min(found, key=lambda other_points: np.abs(other_points - points).sum(), default=points)
    reach = np.linalg.norm(points[0] - points[1])  # between the eyes
    near = near if np.abs(near - points).max() < reach else points
    clean, after = _chip(photo, align.similarity(points)), _chip(written, align.similarity(near))
    row = {}
    for recogniser, names, unit in ((known, COLUMNS[3:5], 1.0), (other, COLUMNS[6:8], other.threshold)):
        mirrored = recogniser.embed(clean.flip(3))
        for column, chip in zip(names, (clean, after)):
            row[column] = recogniser.distance(recogniser.embed(chip), mirrored).item() / unit
    row["protected"] = row["after"] >= known.threshold
    row["state"] = "de-identified" if row["protected"] else "changed, but still recognised"
    row["ssim"] = metrics.ssim(_chip(written, align.similarity(points)), clean).item()
    return row


def protect(photo, matrix, recogniser, *, alpha=2.0, lam=0.005, steps=100):
    """The photo (H, W, 3) uint8 with the face at ``matrix`` (2, 3; see ``align.similarity``) de-identified.

    P-FGVM (``attacks.pfgvm``) on the chip, on the mean loss over ``VIEWS`` cuts, stopped when all of them are at
    ``MARGIN`` times the recogniser's threshold from the face's own mirror image: from itself the squared distance has
    no slope. A photo that shows nothing of the chip comes back.
    """
    shrink = max(1, int(1 / np.hypot(matrix[0, 0], matrix[1, 0])))  # as align.cut does with a large photo
    small = np.asarray(Image.fromarray(photo).reduce(shrink)) if shrink > 1 else photo
    reduced = np.c_[matrix[:, :2] * shrink, matrix[:, 2]]
    box = _box(reduced, small.shape)
    if box is None:
        return photo
    left, top, right, bottom = box
    patch = torch.from_numpy(small[top:bottom, left:right].copy()).permute(2, 0, 1)[None].float() / 255
    place = _moved(reduced, left, top)
    out = _grid(place, patch.shape[2:])
    cuts = torch.stack(
        [_grid(_inverse(jitter @ np.vstack([place, [0, 0, 1]])), (align.SIZE,) * 2) for jitter in _jitters()]
    )
    chip = _chip(photo, matrix)
    mirrored = recogniser.embed(chip.flip(3)).expand(VIEWS, -1)
    away, views = objectives.dodging(recogniser, mirrored, MARGIN * recogniser.threshold), torch.arange(VIEWS)

    def objective(images, rows, exact=False):
        # what a recogniser will get: chips, cut again from the photo into which the change was carried
        changed = (patch + _carry(images - chip, out)).clamp(0, 1)
        loss, reached = away(_sample(changed.expand(VIEWS, -1, -1, -1), cuts, "border").clamp(0, 1), views, exact)
        return loss.mean()[None], reached.all()[None]

    attacked = attacks.pfgvm(chip, objective, alpha=alpha, lam=lam, steps=steps, stop_early=True)

    # the same at the photo's own size; a pixel of the small photo is the mean of shrink x shrink
    full = reduced / shrink @ np.diag([1.0, 1.0, shrink])
    full[:, 2] -= full[:, :2] @ np.full(2, (shrink - 1) / 2)
    left, top, right, bottom = _box(full, photo.shape)
    carried = _carry(attacked - chip, _grid(_moved(full, left, top), (bottom - top, right - left)))
    result = photo.copy()
    region = result[top:bottom, left:right] + 255 * carried[0].permute(1, 2, 0).numpy()
    result[top:bottom, left:right] = region.round().clip(0, 255).astype(np.uint8)
    return result


def encode(photo, like):
    """The bytes of a photo (H, W, 3) uint8 in the format of the file ``like``, with its colour profile alone."""
    with Image.open(like) as original:
        profile = original.info.get("icc_profile") if original.mode in ("RGB", "RGBA") else None
    file, kind = io.BytesIO(), ENDINGS[Path(like).suffix.lower()]
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(photo).save(file, kind, icc_profile=profile, **options)
    return file.getvalue()


def _chip(photo, matrix):
    return torch.from_numpy(align.cut(photo, matrix))[None].float() / 255


def _inverse(matrix):
    return np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]


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
    corners = _inverse(matrix) @ np.array([[0, end, 0, end], [0, 0, end, end], [1, 1, 1, 1]])
    limits = [shape[1], shape[0]]
    left, top = np.clip(np.floor(corners.min(1)).astype(int) - 2, 0, limits)
    right, bottom = np.clip(np.ceil(corners.max(1)).astype(int) + 3, 0, limits)
    return (left, top, right, bottom) if right > left and bottom > top else None


def _grid(matrix, size):
    """For each pixel of an image of ``size`` its place in another: (h, w, 2), x before y, in pixels."""
    ys, xs = np.mgrid[: size[0], : size[1]]
    return torch.from_numpy(np.moveaxis(np.tensordot(matrix, np.stack([xs, ys, np.ones_like(xs)]), 1), 0, -1)).float()


def _sample(image, grid, padding):
    """Images (N, 3, h, w) at the places of ``grid`` (N, …), or of one for all, bilinear."""
    h, w = image.shape[2:]
    scaled = (2 * grid + 1) / torch.tensor([w, h]) - 1  # grid_sample's frame, where a pixel's centre is (i + 1/2) / n
    return F.grid_sample(
        image, scaled.reshape(-1, *grid.shape[-3:]), mode="bilinear", padding_mode=padding, align_corners=False
    )


def _carry(change, grid):
    """A change of the chip (1, 3, 112, 112), faded out towards its border, at the places of ``grid``."""
    distance = torch.arange(align.SIZE).float()
    distance = torch.minimum(distance, align.SIZE - 1 - distance)
    fade = (torch.minimum(distance[:, None], distance[None]) / FADE).clamp(0, 1)
    return _sample(change * fade, grid, "zeros")
