"""From a photo to an aligned chip: read, detect with MTCNN, cut by a similarity transform.

What becomes of odd photos:

====================  =========================================================================
greyscale             the grey channel is repeated
transparency          blended onto white
EXIF rotation         undone first
small (< 160 pixels)  enlarged threefold and padded by repeating the border, for detection only
large (> 640 pixels)  shrunk to 640 on the longer side for detection; the chip is cut from the full photo
several faces         the one with the largest area minus twice its squared distance from the centre
no face               a second, slower look for smaller and fainter ones; then skipped, reason "no face found"
unreadable            skipped, reason "unreadable"; also a photo over Pillow's limit of 89 megapixels,
                      and one of floating-point numbers that are not finite
HEIC                  read with the package pillow-heif; without it skipped, "needs the package pillow-heif"
no regular file       skipped, reason "no regular file": a pipe, or a link that leads nowhere
====================  =========================================================================
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from faceadv.images import eight_bits

__all__ = ["SIZE", "TEMPLATE", "align", "cut", "find_every_face", "find_landmarks", "read_photo", "similarity"]

SIZE = 112
DETECT_AT_MOST, SMALL, PAD = 640, 160, 60
PIXELS = 16_000_000  # of all photos that are held in memory at once; a larger one is held alone
# eyes, nose and mouth corners in a 150-pixel frame, scaled to the chip
TEMPLATE = np.array([[47.6, 46.6], [100.5, 46.6], [74.0, 76.6], [50.4, 103.0], [97.6, 103.0]]) * SIZE / 150
MTCNN_SETTINGS = {"min_face_size": 40, "factor": 0.709, "thresholds": [0.6, 0.7, 0.7]}
SECOND_LOOK = {"min_face_size": 20, "factor": 0.709, "thresholds": [0.5, 0.5, 0.5]}
VERSION = "3"  # part of the cache's key: raise it when chips of the same photo would come out different
NOTHING = "expected a non-empty list of Tensors"  # torch's error where facenet-pytorch concatenates no boxes


@functools.lru_cache(maxsize=2)
def _detector(lenient=False):
    """facenet-pytorch's MTCNN (its weights ship in the wheel), frozen, on the CPU."""
    from facenet_pytorch import MTCNN

    settings = SECOND_LOOK if lenient else MTCNN_SETTINGS
    return MTCNN(keep_all=True, **settings).requires_grad_(False).eval()


def read_photo(path: str | Path) -> np.ndarray:
    """A photo as (H, W, 3) uint8 RGB, upright. ``OSError`` if it cannot be read or has too many pixels."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise OSError(f"{path} is no regular file.")
    if Path(path).suffix.lower() in (".heic", ".heif") and not _heif():
        raise OSError(f"{path} can be read with the package pillow-heif alone: install it.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as photo:
                photo = eight_bits(ImageOps.exif_transpose(photo, in_place=True) or photo)
                if photo.has_transparency_data:
                    photo = photo.convert("RGBA")
                    photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
                return _array(photo if photo.mode == "RGB" else photo.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise OSError(f"{path} is not a readable photo: {e}.") from e


@functools.cache
def _heif():
    """Whether Pillow can read HEIF, once this has told it how."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _array(photo):
    """The pixels of an RGB photo, taken in strips: as a whole they would be in memory three times."""
    pixels = np.empty((photo.height, photo.width, 3), np.uint8)
    for top in range(0, photo.height, 256):
        pixels[top : top + 256] = photo.crop((0, top, photo.width, min(top + 256, photo.height)))
    return pixels


def _view(photo):
    """What the detector should see: ``(view, scale, offset)``; point p of the photo lies there at scale p + offset."""
    height, width = photo.shape[:2]
    if min(height, width) < SMALL:
        view = np.asarray(Image.fromarray(photo).resize((3 * width, 3 * height), Image.Resampling.BICUBIC))
        return np.pad(view, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="edge"), 3.0, PAD
    scale = min(1.0, DETECT_AT_MOST / max(height, width))
    if scale == 1.0:
        return photo, 1.0, 0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BOX)), scale, 0


def find_landmarks(photos: Sequence[np.ndarray]) -> list[tuple[np.ndarray | None, int]]:
    """For each photo, (H, W, 3) uint8, the landmarks of its main face and the number of faces: ``(points, count)``.

    points: (5, 2) float in pixels of the photo, ordered eyes, nose, mouth corners; None without a face.
    Source: Zhang et al. 2016 (MTCNN), facenet-pytorch's weights.
    """
    return [(points[0] if len(points) else None, len(points)) for points in find_every_face(photos)]


def find_every_face(photos: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Landmarks of all faces of each photo, the main one first: a list of lists of points as in ``find_landmarks``."""
    views = [_view(photo) for photo in photos]
    found = [[]] * len(photos)
    by_shape = {}
    for i, (view, _, _) in enumerate(views):
        by_shape.setdefault(view.shape, []).append(i)
    for indices in by_shape.values():  # MTCNN takes batches of one size only
        batch = np.stack([views[i][0] for i in indices])
        for i, (boxes, points) in zip(indices, _detect(batch)):
            if not len(boxes):
                boxes, points = _detect(views[i][0][None], lenient=True)[0]
            if len(boxes):
                view, scale, offset = views[i]
                best = _main_face(boxes, view.shape)
                order = [best, *(j for j in range(len(boxes)) if j != best)]
                found[i] = [(points[j].astype(np.float64) - offset) / scale for j in order]
    return found


def _detect(batch, lenient=False):
    with torch.no_grad(), _one_thread():
        try:
            boxes, _, points = _detector(lenient).detect(batch, landmarks=True)
        except (RuntimeError, ValueError) as e:
            if NOTHING not in str(e):  # out of memory, say
                raise
            if len(batch) == 1:
                return [((), ())]
            return [_detect(image[None], lenient)[0] for image in batch]
    return [((), ()) if b is None else (b, p) for b, p in zip(boxes, points)]


@contextlib.contextmanager
def _one_thread():
    """With two, convolutions round otherwise: a few chips of ORL in a hundred would depend on the machine's cores."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _main_face(boxes, shape):
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    centre = (boxes[:, :2] + boxes[:, 2:4]) / 2
    offset = ((centre - np.array([shape[1], shape[0]]) / 2) ** 2).sum(1)
    return int(np.argmax((area - 2 * offset).astype(float)))


def similarity(points: np.ndarray) -> np.ndarray:
    """The least-squares similarity transform from five landmarks onto the template.

    points: (5, 2) in pixels of the photo. Returns a (2, 3) matrix M: chip = M[:, :2] @ photo + M[:, 2].
    Source: least squares over z' = a z + b with complex a and b (Umeyama 1991 without reflection).
    """
    z, t = points @ [1, 1j], TEMPLATE @ [1, 1j]
    a = np.vdot(z - z.mean(), t - t.mean()) / np.vdot(z - z.mean(), z - z.mean()).real
    b = t.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def reduce(photo: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A photo with more than twice the chip's resolution, averaged over s x s pixels, and the matrix from there.

    Any other photo, and its matrix, as they are. Without the average, the chip would show aliasing.
    """
    s = int(1 / np.hypot(matrix[0, 0], matrix[1, 0]))
    if s <= 1:
        return photo, matrix
    # pixel q of the small photo is the mean of pixels s q to s q + s - 1, and lies at s q + (s - 1) / 2
    moved = matrix[:, 2] + matrix[:, :2].sum(1) * (s - 1) / 2
    return np.asarray(Image.fromarray(photo).reduce(s)), np.c_[matrix[:, :2] * s, moved]


def cut(photo: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Cut the chip, (3, 112, 112) uint8, out of a photo: bilinear, the border repeated where the photo ends.

    photo: (H, W, 3) uint8; matrix: (2, 3) photo to chip, as ``similarity`` gives it.
    """
    photo, matrix = reduce(photo, matrix)
    source = torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1)))[None].float()
    places = grid(inverse(matrix), (SIZE, SIZE), photo.shape)
    chip = F.grid_sample(source, places, padding_mode="border", align_corners=False)
    return chip[0].round().clamp(0, 255).byte().numpy()


def inverse(matrix: np.ndarray) -> np.ndarray:
    """The matrix (2, 3) of the way back."""
    return np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]


def grid(matrix: np.ndarray, size: Sequence[int], source: Sequence[int]) -> torch.Tensor:
    """Where each pixel of an image of ``size`` (h, w) lies in a source of that shape (H, W, …), by the matrix there.

    Returns (1, h, w, 2) float32 for ``grid_sample``, in whose frame the centre of pixel i of n is at (i + 1/2) / n.
    """
    ys, xs = np.mgrid[: size[0], : size[1]]
    x, y = np.tensordot(matrix, np.stack([xs, ys, np.ones_like(xs)]), 1)
    places = np.stack([(2 * x + 1) / source[1] - 1, (2 * y + 1) / source[0] - 1], -1)
    return torch.from_numpy(places[None]).float()


def align(paths: Sequence[Path]) -> list[tuple[np.ndarray, np.ndarray, int] | str]:
    """Read, detect and cut photos; ``PIXELS`` of them are in memory at once, or a single larger one.

    Returns a list with, for each path, ``(chip, matrix, count)`` or the reason (str) why it was skipped.
    """
    results, photos = ["unreadable"] * len(paths), {}
    for i, path in enumerate(paths):
        try:
            photo = read_photo(path)
        except OSError as e:
            results[i] = "unreadable" if os.path.isfile(path) or os.path.isdir(path) else "no regular file"
            if "pillow-heif" in str(e):
                results[i] = "needs the package pillow-heif"
            continue
        if photos and sum(held.shape[0] * held.shape[1] for held in [photo, *photos.values()]) > PIXELS:
            _cut_all(photos, results)
        photos[i] = photo
    _cut_all(photos, results)
    return results


def _cut_all(photos, results):
    """Put the chips of the photos, or why there are none, into ``results``; ``photos`` is then empty."""
    for (i, photo), (points, count) in zip(photos.items(), find_landmarks(list(photos.values()))):
        if points is None:
            results[i] = "no face found"
        else:
            matrix = similarity(points)
            results[i] = cut(photo, matrix), matrix, count
    photos.clear()
