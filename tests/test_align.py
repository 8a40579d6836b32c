"""From photos to chips: where the pixels go, what the detector may hide, how much is in memory, odd pixel formats."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from faceadv import align, deidentify


def blob(shape, centre, sigma):
    """A smooth spot on black, centred at (x, y): (H, W, 3) uint8."""
    ys, xs = np.mgrid[: shape[0], : shape[1]]
    spot = 250 * np.exp(-((xs - centre[0]) ** 2 + (ys - centre[1]) ** 2) / (2 * sigma**2))
    return np.repeat(spot.round().astype(np.uint8)[..., None], 3, 2)


@pytest.mark.parametrize("angle", [0.0, 0.4])
@pytest.mark.parametrize("s", range(1, 11))
def test_a_spot_lies_where_the_matrix_says(s, angle):
    scale = s + 0.3  # photo pixels per chip pixel: averaged over s x s pixels first
    linear = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    centre, expected = np.array([70 * s + 0.25, 60 * s + 0.75]), np.array([57.0, 52.0])
    chip = align.cut(blob((130 * s, 140 * s), centre, 5 * s), np.c_[linear, expected - linear @ centre])
    weights = chip[0].astype(float)
    ys, xs = np.mgrid[: align.SIZE, : align.SIZE]
    found = np.array([(weights * xs).sum(), (weights * ys).sum()]) / weights.sum()
    assert np.abs(found - expected).max() < 0.03


def test_what_is_added_to_a_large_photo_lies_where_the_chip_is():
    """A spot added to the chip, carried into the photo as ``deidentify`` does it, and cut again, has not moved."""
    matrix = np.array([[1 / 6.3, 0, -3.0], [0, 1 / 6.3, 1.0]])
    change = torch.from_numpy(blob((112, 112), (50, 60), 6).transpose(2, 0, 1).copy())[None].float()
    carried = deidentify._carry(change, align.grid(matrix, (700, 720), (112, 112)))
    photo = carried[0].permute(1, 2, 0).round().byte().numpy()
    weights = align.cut(photo, matrix)[0].astype(float)
    ys, xs = np.mgrid[:112, :112]
    assert (weights * xs).sum() / weights.sum() == pytest.approx(50, abs=0.03)
    assert (weights * ys).sum() / weights.sum() == pytest.approx(60, abs=0.03)


def first_edition(photo, matrix):
    """How ``cut`` did it in the first edition, where the photo was not averaged."""
    height, width = photo.shape[:2]
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    ys, xs = np.mgrid[: align.SIZE, : align.SIZE]
    x, y = np.tensordot(back, np.stack([xs, ys, np.ones_like(xs)]), 1)
    grid = torch.from_numpy(np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)[None])
    source = torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1)))[None].float()
    chip = F.grid_sample(source, grid.float(), mode="bilinear", padding_mode="border", align_corners=False)
    return chip[0].round().clamp(0, 255).byte().numpy()


def test_chips_of_small_photos_are_those_of_the_first_edition(orl):
    for file, matrix, chip in zip(orl.files[::40], orl.matrices[::40], orl.chips[::40]):
        expected = first_edition(align.read_photo(file), matrix)
        assert np.array_equal(align.cut(align.read_photo(file), matrix), expected)
        assert np.array_equal(chip, expected)


class Broken:
    """A detector that fails."""

    def __init__(self, error):
        self.error = error

    def detect(self, batch, landmarks):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory."),
        ValueError("could not broadcast input array"),
    ],
)
def test_a_failing_detector_is_not_a_photo_without_a_face(error, monkeypatch, tmp_path):
    for name in ("_detector", "detector"):
        monkeypatch.setattr(align, name, lambda lenient=False: Broken(error), raising=False)
    Image.new("RGB", (300, 300)).save(tmp_path / "a.png")
    with pytest.raises(type(error), match=r"memory|broadcast"):
        align.align([tmp_path / "a.png"])


def test_where_the_detector_has_nothing_to_concatenate_there_is_no_face():
    assert align._detect(np.zeros((2, 15, 200, 3), np.uint8)) == [((), ())] * 2


def test_few_large_photos_are_in_memory_at_once(monkeypatch):
    held = []

    def find(photos):
        held.append([photo.shape[0] * photo.shape[1] for photo in photos])
        return [(None, 0)] * len(photos)

    sizes = [(3000, 4000), (250, 250), (3000, 4000), (250, 250), (250, 250), (6000, 6000), (3000, 4000)]
    monkeypatch.setattr(align, "read_photo", lambda size: np.zeros((*size, 3), np.uint8))
    monkeypatch.setattr(align, "find_landmarks", find)
    assert align.align(sizes) == ["no face found"] * len(sizes)
    assert [pixels for group in held for pixels in group] == [height * width for height, width in sizes]
    assert all(sum(group) <= 16e6 or len(group) == 1 for group in held)
    held.clear()
    align.align([(250, 250)] * 32)  # a batch of LFW stays one batch
    assert held == [[62500] * 32]


def test_results_keep_their_order(orl, tmp_path, monkeypatch):
    (tmp_path / "no.png").write_text("no photo")
    Image.new("RGB", (300, 300), "grey").save(tmp_path / "blank.png")
    paths = [orl.files[0], tmp_path / "no.png", orl.files[1], tmp_path / "blank.png"]
    for pixels in (16_000_000, 1):
        monkeypatch.setattr(align, "PIXELS", pixels)
        one, unreadable, two, blank = align.align(paths)
        assert (unreadable, blank) == ("unreadable", "no face found")
        for result, chip in ((one, orl.chips[0]), (two, orl.chips[1])):
            assert np.abs(result[0].astype(int) - chip).max() <= 1


@pytest.mark.parametrize("kind", ["png of 16 bits", "pgm of 16 bits", "pgm of 10 bits", "tiff of 32 bits"])
def test_grey_photos_of_many_bits(kind, orl, tmp_path):
    grey, path = np.asarray(Image.open(orl.files[3])), tmp_path / f"a.{kind.split()[0]}"
    if kind == "png of 16 bits":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif kind == "tiff of 32 bits":  # with values of 8
        Image.fromarray(grey.astype(np.int32)).save(path)
    else:
        top = 65535 if "16" in kind else 1023
        data = (grey * (top / 255)).round().astype(">u2").tobytes()
        path.write_bytes(b"P5\n%d %d\n%d\n" % (grey.shape[1], grey.shape[0], top) + data)
    photo = align.read_photo(path)
    assert photo.shape == (*grey.shape, 3)
    assert np.abs(photo[..., 0].astype(int) - grey).max() <= 1


def test_a_dark_photo_of_16_bits_is_dark(tmp_path):
    Image.fromarray(np.full((20, 20), 200, np.uint16)).save(tmp_path / "dark.png")
    assert align.read_photo(tmp_path / "dark.png").max() == 0


def test_chips_do_not_depend_on_the_number_of_threads(orl, monkeypatch):
    seen, detect = [], align._detect
    photo = align.read_photo(orl.files[0])
    monkeypatch.setattr(align._detector(False), "detect", lambda *a, **k: seen.append(torch.get_num_threads()) or 1 / 0)
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with pytest.raises(ZeroDivisionError):
                detect(photo[None])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]
