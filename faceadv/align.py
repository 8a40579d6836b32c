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
unreadable            skipped, reason "unreadable"; also a photo over Pillow's limit of 89 megapixels
====================  =========================================================================
"""

import functools
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

SIZE = 112
DETECT_AT_MOST, SMALL, PAD = 640, 160, 60
# eyes, nose and mouth corners in a 150-pixel frame, scaled to the chip
TEMPLATE = np.array([[47.6, 46.6], [100.5, 46.6], [74.0, 76.6], [50.4, 103.0], [97.6, 103.0]]) * SIZE / 150
MTCNN_SETTINGS = {"min_face_size": 40, "factor": 0.709, "thresholds": [0.6, 0.7, 0.7]}
SECOND_LOOK = {"min_face_size": 20, "factor": 0.709, "thresholds": [0.5, 0.5, 0.5]}
VERSION = "1"  # part of the cache's key: raise it when chips of the same photo would come out different


@functools.lru_cache(maxsize=2)
def detector(lenient=False):
    """facenet-pytorch's MTCNN (its weights ship in the wheel), frozen, on the CPU."""
    from facenet_pytorch import MTCNN

    settings = SECOND_LOOK if lenient else MTCNN_SETTINGS
    return MTCNN(keep_all=True, **settings).requires_grad_(False).eval()


def read_photo(path):
    """Read a photo as (H, W, 3) uint8 RGB, upright.

    Raises ``OSError`` in one sentence if it cannot be read or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as photo:
                photo = ImageOps.exif_transpose(photo)
                if photo.mode.startswith("I;16"):  # which convert() would clip at 255
                    photo = Image.fromarray((np.asarray(photo) >> 8).astype(np.uint8))
                if photo.has_transparency_data:
                    photo = photo.convert("RGBA")
                    photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
                return np.asarray(photo.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise OSError(f"{path} is not a readable photo: {e}.") from e


def detection_view(photo):
    """The photo as the detector should see it, with the scale and offset that lead there.

    Returns ``(view, scale, offset)``: a point p of the photo lies at ``scale * p + offset`` in the view.
    """
    height, width = photo.shape[:2]
    if min(height, width) < SMALL:
        view = np.asarray(Image.fromarray(photo).resize((3 * width, 3 * height), Image.Resampling.BICUBIC))
        return np.pad(view, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="edge"), 3.0, PAD
    scale = min(1.0, DETECT_AT_MOST / max(height, width))
    if scale == 1.0:
        return photo, 1.0, 0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BOX)), scale, 0


def find_landmarks(photos):
    """Five landmarks of the main face of each photo.

    photos: list of (H, W, 3) uint8, of any sizes. Returns a list of ``(points, count)``: points (5, 2) float
    in pixels of the photo, ordered eyes, nose, mouth corners, or None without a face; count is the number of
    faces seen. Source: Zhang et al. 2016 (MTCNN), facenet-pytorch's weights.
    """
    return [(points[0] if len(points) else None, len(points)) for points in find_every_face(photos)]


def find_every_face(photos):
    """Landmarks of all faces of each photo, the main one first: a list of lists of points as in ``find_landmarks``."""
    views = [detection_view(photo) for photo in photos]
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
    with torch.no_grad():
        try:
            boxes, _, points = detector(lenient).detect(batch, landmarks=True)
        except (RuntimeError, ValueError):  # facenet-pytorch cannot concatenate "no box in the whole batch"
            if len(batch) == 1:
                return [((), ())]
            return [_detect(image[None], lenient)[0] for image in batch]
    return [((), ()) if b is None else (b, p) for b, p in zip(boxes, points)]


def _main_face(boxes, shape):
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    centre = (boxes[:, :2] + boxes[:, 2:4]) / 2
    offset = ((centre - np.array([shape[1], shape[0]]) / 2) ** 2).sum(1)
    return int(np.argmax((area - 2 * offset).astype(float)))


def similarity(points):
    """The least-squares similarity transform from five landmarks onto the template.

    points: (5, 2) in pixels of the photo. Returns a (2, 3) matrix M: chip = M[:, :2] @ photo + M[:, 2].
    Source: least squares over z' = a z + b with complex a and b (Umeyama 1991 without reflection).
    """
    z, t = points @ [1, 1j], TEMPLATE @ [1, 1j]
    a = np.vdot(z - z.mean(), t - t.mean()) / np.vdot(z - z.mean(), z - z.mean()).real
    b = t.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def cut(photo, matrix, size=SIZE):
    """Cut the chip out of the photo: bilinear, the border repeated where the chip reaches beyond it.

    photo: (H, W, 3) uint8; matrix: (2, 3) photo to chip. Returns (3, size, size) uint8.
    """
    shrink = int(1 / np.hypot(matrix[0, 0], matrix[1, 0]))
    if shrink > 1:  # average first, or a large photo would alias
        photo = np.asarray(Image.fromarray(photo).reduce(shrink))
        matrix = np.c_[matrix[:, :2] * shrink, matrix[:, 2]]
    height, width = photo.shape[:2]
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    ys, xs = np.mgrid[:size, :size]
    x, y = np.tensordot(inverse, np.stack([xs, ys, np.ones_like(xs)]), 1)
    # pixel i has its centre at i here and at (i + 1/2) / n in grid_sample's frame
    grid = torch.from_numpy(np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)[None])
    source = torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1)))[None].float()
    chip = F.grid_sample(source, grid.float(), mode="bilinear", padding_mode="border", align_corners=False)
    return chip[0].round().clamp(0, 255).byte().numpy()


def align(paths):
    """Read, detect and cut a batch of photos.

    Returns a list with, for each path, ``(chip, matrix, count)`` or the reason (str) why it was skipped.
    """
    results, photos = [None] * len(paths), {}
    for i, path in enumerate(paths):
        try:
            photos[i] = read_photo(path)
        except OSError:
            results[i] = "unreadable"
    for (i, photo), (points, count) in zip(photos.items(), find_landmarks(list(photos.values()))):
        if points is None:
            results[i] = "no face found"
        else:
            matrix = similarity(points)
            results[i] = cut(photo, matrix), matrix, count
    return results
