"""De-identify a folder of photos: `faceadv deidentify IN_DIR OUT_DIR`.

Every face found is attacked on its chip by PGD (L2) on several recognisers at once, away from itself and its mirror
image, until the chip's SSIM has come down to what is allowed. Smooth skin, where a change is seen first, is changed
less than hair, brows and lashes. What the attack adds to the chip is carried back into the full photo through the
inverse of the alignment, with a soft edge. The attack sees chips as they will be cut again from the photo, one where
the landmarks are and others a little aside, because landmarks found again lie elsewhere (expectation over
transformation, Athalye et al. 2018). Everything reported is measured on the file that was written.
"""

import base64
import csv
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from faceadv import align, attacks, metrics, objectives, recognisers
from faceadv.errors import Invalid, Missing, number, sentence
from faceadv.images import to_pil
from faceadv.recognisers import Recogniser
from faceadv.store import cache, progress
from faceadv.store.datasets import PHOTO_ENDINGS
from faceadv.store.paths import alone, meant, replacing
from faceadv.store.tables import csv_safe

__all__ = ["LEFT_OUT", "MADE_FOR", "NO_FACE", "PAGE", "REPORT", "SSIM", "columns", "folder", "protect", "unseen"]

MADE_FOR, UNSEEN = ("dlib", "mobilefacenet"), "mobilenet-vggface2"
SSIM, STEPS, ALPHA = 0.95, 60, 1.0  # what is left of the chip at least; steps at most; L2 norm of a step
TEXTURE = 0.05  # standard deviation of the grey around a pixel, at which it moves half as easily as on an edge
FADE = 10  # pixels of the chip over which what is added fades out towards its border
VIEWS, SHIFT, TURN = 4, 2.0, 0.04  # cuts the attack looks at: pixels of the chip; radians, and the same in scale
REPORT, PAGE, NOTE, LOCK = "report.csv", "report.html", ".report.json", ".report.lock"  # the third is for the next call
MIRROR, NO_FACE, LEFT_OUT = "its own mirror image", "no face found, written without metadata", "left out"
OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "TIFF": {"compression": "tiff_deflate"}, "AVIF": {"quality": 95}}
OPTIONS |= {"WEBP": {"quality": 95}, "HEIF": {"quality": 95}}
STYLE = "body{font:1rem/1.4 sans-serif;max-width:60rem;margin:auto;padding:1rem}img{width:9rem;margin:.2rem}"
WARNING = "This page shows the faces as they were: it is for you, not for publication with the photos."


def columns(names: Sequence[str]) -> list[str]:
    """The headings of the report on these recognisers."""
    each = [f"{name}: {what}" for name in names for what in ("before", "after", "threshold", "hidden")]
    return ["photo", "face", "state", "lost", "compared with", *each, "SSIM"]


def unseen(models: Sequence[str]) -> str:
    """The name of a recogniser that these are not: ``UNSEEN``, or another one if that is among them."""
    return next(name for name in (UNSEEN, *recognisers.NAMES) if name not in models)


def folder(
    source: str | Path,
    target: str | Path,
    models: Sequence[str] = MADE_FOR,
    ssim: float = SSIM,
    device: str = "auto",
) -> list[dict]:
    """De-identify every photo below ``source`` into the same place below ``target``; returns the report's rows.

    Written photos carry their colour profile and nothing else of their metadata (no EXIF, place, thumbnail or
    comment), and their rotation is applied to the pixels; those without a face as well. Every other file has a row
    that says why it is left out, but hidden ones. The report is written after each photo: when a run was stopped, the
    same call goes on with the photos that it does not have.

    There is one row per face, a dict of ``columns``, also written to ``target/report.csv``. Distances are those to the
    nearest face of another photo that ``models`` take for the same person; without one, to the face's mirror image.
    "hidden": the distance is at least the threshold. ``target/report.html`` shows the faces before and after.

    Parameters
    ----------
    source : folder with photos, in subfolders and linked ones too; ``Missing`` if it is none, ``Invalid`` without any
    target : folder that is empty, not there yet, or of such a run, neither inside ``source`` nor around it, or
        ``Invalid``
    models : names of the recognisers that are attacked; ``unseen`` of them is reported beside
    ssim : what is left of each face's chip at least
    device : where the recognisers compute (see ``precision.device``)

    Raises
    ------
    Failed : if another call is writing into ``target``
    """
    source, target, ssim = meant(source), meant(target), number("ssim", ssim, 0.5, 0.999)
    files, names = _files(source, target), {}
    for path, why in files.items():
        content = path if not why and os.path.isfile(path) and os.access(path, os.R_OK) else None
        name = path.relative_to(source)
        names[cache.key(str(name), content, why, list(models), ssim)] = name
    _done(target, names)  # a folder of something else is not even locked
    nets = [recognisers.load(name, device) for name in (*models, unseen(models))]
    heads = columns([net.name for net in nets])
    with alone(target / LOCK):
        if found := _done(target, names):
            progress.log.warning("%d of %d files were done before.", len(found), len(names))
        _report(target, heads, names, found)  # by which the next call knows the folder, whenever this one ends
        looked = progress.bar(names.values(), desc="finding faces", unit="photo")
        faces = {name: files[source / name] or _faces(source / name, nets) for name in looked}
        _compare(faces, nets)
        for key, name in progress.bar(names.items(), desc="de-identifying", unit="photo"):
            if key not in found:
                try:
                    rows = _file(source / name, target / name, faces[name], nets, ssim)
                except OSError as e:  # a full disk, or a name that the target's file system does not take
                    rows = [{"state": f"{LEFT_OUT}: {sentence(e, name)}"}]
                found[key] = [{"photo": str(name), **row} for row in rows]
                _report(target, heads, names, found)
        rows = [row for key in names for row in found[key]]
        _page(source, target, faces, rows, nets)
    return rows


def _report(target, heads, names, found):
    """Write the rows of the photos that are done, first those by which the next call knows the folder."""
    cache.write_json(target / NOTE, found)
    # a name that is not Unicode has backslashes there
    with replacing(target / REPORT) as part, open(part, "w", -1, "utf-8", "backslashreplace", "") as file:
        writer = csv.DictWriter(file, heads, restval="")
        writer.writeheader()
        for row in (row for key in names for row in found.get(key, ())):
            writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else csv_safe(v) for k, v in row.items()})


def _done(target, names):
    """What a stopped run has done, rows by key. ``Invalid`` if ``target`` is neither its folder nor empty."""
    old = cache.read_json(target / NOTE) if target.is_dir() else None
    taken = target.is_file() or any(target.glob("[!.]*"))  # hidden are the lock, and what killed runs left
    if taken and (old is None or (old and not old.keys() & names.keys())):
        raise Invalid(f"{target} is there already and not an empty folder, nor one of such a run: name a new one.")
    return {key: rows for key, rows in (old or {}).items() if key in names and (target / names[key]).is_file()}


def _files(source, target):
    """The files below ``source``, each with why it is left out, or "", once it is sure that ``target`` lies elsewhere.

    Hidden ones are none of them: macOS writes a file "._a.jpg", which is no photo, beside each "a.jpg".
    """
    if not source.is_dir():
        raise Missing(f"{source} is not a folder.")
    inside, around = source.resolve(), target.resolve()
    if inside == around or inside in around.parents or around in inside.parents:
        raise Invalid(f"{target} must lie outside {source}, and not around it.")
    files, seen = {}, {inside, around}

    def unreadable(error):
        files[Path(error.filename)] = f"{LEFT_OUT}: a folder that cannot be read"

    for place, folders, names in os.walk(source, onerror=unreadable, followlinks=True):
        for name in [name for name in sorted(folders) if name[0] != "."]:
            if (real := Path(place, name).resolve()) in seen:
                files[Path(place, name)] = f"{LEFT_OUT}: a link to a folder that is here already"
            seen.add(real)
        folders[:] = [name for name in folders if name[0] != "." and Path(place, name) not in files]
        for path in (Path(place, name) for name in names if name[0] != "."):
            files[path] = "" if path.suffix.lower() in PHOTO_ENDINGS else f"{LEFT_OUT}: no photo"
    if "" not in files.values() and not any("cannot be read" in why for why in files.values()):
        raise Invalid(f"{source} holds no photos ({', '.join(sorted(PHOTO_ENDINGS))}).")
    return dict(sorted(files.items()))


def _faces(path, nets):
    """Each face of a photo: landmarks, and embeddings by all recognisers of it and its mirror image; or a reason."""
    try:
        photo = align.read_photo(path)
    except OSError as e:
        return f"{LEFT_OUT}: {'needs the package pillow-heif' if 'pillow-heif' in str(e) else 'unreadable'}"
    found = []
    for points in align.find_every_face([photo])[0]:
        chip = _chip(photo, align.similarity(points))
        clean, mirror = ([recognisers.embed_all(net, image) for net in nets] for image in (chip, chip.flip(3)))
        found.append({"points": points, "clean": clean, "other": mirror, "with": MIRROR})
    return found


def _compare(faces, nets):
    """Give each face of the photos the nearest one of another photo, if the attacked recognisers say: one person."""
    every = [(name, face) for name, found in faces.items() if not isinstance(found, str) for face in found]
    for name, face in every:
        others = [(other, one) for other, one in every if other != name]
        if others:
            known = zip(nets[:-1], face["clean"], zip(*(one["clean"] for _, one in others)))
            apart = torch.stack([torch.cdist(own, torch.cat(them))[0] / net.threshold for net, own, them in known])
            distance, nearest = apart.mean(0).min(0)
            if distance < 1:
                face["with"], face["other"] = str(others[nearest][0]), others[nearest][1]["clean"]


def _file(path, target, faces, nets, ssim):
    """Write one photo, and tell what became of its faces, a row each; or why it was left out."""
    if isinstance(faces, str):
        return [{"state": faces}]
    photo = changed = align.read_photo(path)
    for face in faces:
        changed = protect(changed, align.similarity(face["points"]), nets[:-1], ssim)
    data, lost = _encode(changed, path)
    with replacing(target) as part:
        part.write_bytes(data)
    written = align.read_photo(target)
    (found,) = align.find_every_face([written]) if faces else [[]]
    rows = [{"face": i} | _measure(photo, face, written, found, nets) for i, face in enumerate(faces, 1)]
    return [row | {"lost": lost} for row in rows or [{"state": NO_FACE}]]


def _measure(photo, face, written, found, nets):
    """What a face, found in ``photo``, is like in the file that was written, where ``found`` are, as a row."""
    # a recogniser would cut the chip at the landmarks found anew, unless none of them are near
    points, row = face["points"], {"compared with": face["with"]}
    near = min(found, key=lambda other_points: np.abs(other_points - points).sum(), default=points)
    reach = np.linalg.norm(points[0] - points[1])  # between the eyes
    near = near if np.abs(near - points).max() < reach else points
    chip = _chip(written, align.similarity(near))
    for net, clean, other in zip(nets, face["clean"], face["other"]):
        after = net.distance(recognisers.embed_all(net, chip), other).item()
        facts = net.distance(clean, other).item(), after, net.threshold, after >= net.threshold
        row |= dict(zip(columns([net.name])[5:9], facts))
    hidden = [row[f"{net.name}: hidden"] for net in nets[:-1]]
    row["state"] = "de-identified" if all(hidden) else "changed, but still recognised"
    here = align.similarity(points)
    return row | {"SSIM": metrics.ssim(_chip(written, here), _chip(photo, here)).item()}


def _page(source, target, faces, rows, nets):
    """Write a page with each face before and after, the change, and what each recogniser says."""
    body, heads = [], columns([net.name for net in nets])[4:]
    for row in rows:
        name = row["photo"]
        told = f"<h2>{html.escape(name)}</h2>" if row.get("face", 1) == 1 else ""
        lost = f", lost: {row['lost']}" if row.get("lost") else ""
        told += f"<p>{html.escape(row['state'] + lost)}</p>"
        if "face" in row:
            here = align.similarity(faces[Path(name)][row["face"] - 1]["points"])
            before, after = (_chip(align.read_photo(folder / name), here) for folder in (source, target))
            pictures = {"before": before, "after": after, "change × 10": (0.5 + 10 * (after - before)).clamp(0, 1)}
            told += "".join(_picture(title, image[0]) for title, image in pictures.items())
            shown = ((head, f"{row[head]:.3f}" if isinstance(row[head], float) else row[head]) for head in heads)
            told += f"<p>{'; '.join(html.escape(f'{head} {value}') for head, value in shown)}</p>"
        body.append(told)
    text = f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>De-identified photos</title><style>{STYLE}'
    text += f"</style><body><h1>De-identified photos</h1><p><strong>{WARNING}</strong></p>{''.join(body)}</body></html>"
    with replacing(target / PAGE) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def _picture(title, image):
    file = io.BytesIO()
    to_pil(image).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{title}" title="{title}" src="data:image/png;base64,{data}">'


def protect(
    photo: np.ndarray, matrix: np.ndarray, known: Sequence[Recogniser], ssim: float = SSIM, steps: int = STEPS
) -> np.ndarray:
    """A copy of the photo with one face de-identified, (H, W, 3) uint8; a grey one stays grey.

    PGD on the mean loss over the recognisers and ``VIEWS`` cuts. It goes away from the mean of the face and its mirror
    image, because the squared distance from the face itself has no slope. A photo that shows nothing of the chip comes
    back as it is.

    Parameters
    ----------
    photo : (H, W, 3) uint8
    matrix : (2, 3), from the photo to the face's chip, as ``align.similarity`` gives it
    known : the recognisers that are attacked
    ssim : what is left of the chip
    steps : at most
    """
    if _box(matrix, photo.shape) is None:
        return photo
    small, reduced = align.reduce(photo, matrix)
    left, top, right, bottom = _box(reduced, small.shape)
    device = recognisers.device_of(known[0])
    patch = torch.from_numpy(small[top:bottom, left:right].copy()).permute(2, 0, 1)[None].to(device).float() / 255
    place = _moved(reduced, left, top)
    size = (align.SIZE, align.SIZE)
    out = align.grid(place, patch.shape[2:], size).to(device)
    jittered = [align.inverse(jitter @ np.vstack([place, [0, 0, 1]])) for jitter in _jitters()]
    cuts = torch.cat([align.grid(back, size, patch.shape[2:]) for back in jittered]).to(device)
    chip, grey = _chip(photo, matrix).to(device), (photo == photo[..., :1]).all()
    away, views, weight = _away(chip, known), torch.arange(VIEWS), _texture(chip)

    def change(images):
        moved = weight * (images - chip)
        return moved.mean(1, keepdim=True).expand_as(moved) if grey else moved

    def objective(images, rows, exact=False):
        # what a recogniser will get: chips, cut again from the photo into which the change was carried
        changed = (patch + _carry(change(images), out)).clamp(0, 1)
        shown = F.grid_sample(changed.expand(VIEWS, -1, -1, -1), cuts, padding_mode="border", align_corners=False)
        loss, _ = away(shown.clamp(0, 1), views, exact)
        return loss.mean()[None], metrics.ssim(chip + change(images.detach()), chip).to(device) < ssim

    objective.fast = away.fast
    options = {"eps": align.SIZE, "alpha": ALPHA, "steps": steps, "norm": "l2", "seed": None, "stop_early": True}
    added = change(attacks.pgd(chip, objective, **options))
    gone = 1 - metrics.ssim(chip + added, chip).item()  # about the square of what is added
    added = added.cpu() * min(1, (1 - ssim) / max(gone, 1e-9)) ** 0.5
    left, top, right, bottom = _box(matrix, photo.shape)  # the same at the photo's own size
    carried = _carry(added, align.grid(_moved(matrix, left, top), (bottom - top, right - left), size))
    result = photo.copy()
    region = result[top:bottom, left:right] + 255 * carried[0].permute(1, 2, 0).numpy()
    result[top:bottom, left:right] = region.round().clip(0, 255).astype(np.uint8)
    return result


@torch.no_grad()
def _away(chip, known):
    """The objective of being far from a face for all recognisers, each distance in its own threshold."""
    parts = []
    for net in known:
        reference = net.embed(torch.cat([chip, chip.flip(3)])).mean(0, keepdim=True)
        parts.append(objectives.dodging(net, reference.expand(VIEWS, -1)))
    return objectives.ensemble(parts, [net.threshold**-2 for net in known])


def _texture(chip):
    """How easily each pixel (1, 1, 112, 112) may move: 1 where the grey around it varies most, and 0 where it does not.

    Source: contrast masking, the denominator of the structural similarity (Wang et al. 2004, equation 13).
    """
    grey = F.pad(chip.mean(1, keepdim=True), (3, 3, 3, 3), mode="reflect")
    mean, square = F.avg_pool2d(grey, 7, 1), F.avg_pool2d(grey**2, 7, 1)
    spread = (square - mean**2).clamp_min(0).sqrt()
    weight = spread / (spread + TEXTURE)
    return weight / weight.max().clamp_min(1e-6)


def _encode(photo, like):
    """The bytes of a photo (H, W, 3) uint8 in the format of the file ``like``, and what of it they do not hold.

    Of the metadata the colour profile alone is kept.
    """
    with Image.open(like) as original:
        mode, profile = original.mode, original.info.get("icc_profile")
        gone = {
            "all frames but the first": getattr(original, "n_frames", 1) > 1,
            "all but 8 bits a colour": mode in ("I", "F") or ";16" in str([tile[3] for tile in original.tile]),
            "transparency": original.has_transparency_data,
            "CMYK": mode == "CMYK",
        }
    made, file, kind = Image.fromarray(photo), io.BytesIO(), PHOTO_ENDINGS[Path(like).suffix.lower()]
    made = made.convert("L") if mode[0] in "1LIF" else made  # a grey one
    kept = {"icc_profile": profile} if profile and mode != "CMYK" and kind not in ("GIF", "BMP", "PPM") else {}
    gone["colour profile"] = profile and not kept
    made.save(file, kind, **OPTIONS.get(kind, {}), **kept)
    return file.getvalue(), ", ".join(what for what, is_gone in gone.items() if is_gone)


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
