"""Chips from photos of every kind, and the cache that holds them."""

import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from faceadv import align, faces
from faceadv.store import datasets


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def originals(orl, tmp_path_factory):
    """A folder of two people with ten enlarged ORL photos each, as greyscale PNG."""
    folder = tmp_path_factory.mktemp("originals")
    for i in range(20):
        person = folder / f"person{i // 10}"
        person.mkdir(parents=True, exist_ok=True)
        photo = Image.open(orl.files[i]).resize((276, 336))
        canvas = Image.new("L", (400, 480), 90)
        canvas.paste(photo, (62, 72))
        canvas.save(person / f"{i % 10}.png")
    return folder


@pytest.fixture
def photos(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "photos")


@pytest.fixture(scope="module")
def remembered():
    """``align.align``, but photos that it has seen in this module are not aligned again."""
    original, known = align.align, {}

    def remembering(paths):
        key = tuple(path.read_bytes() for path in paths)
        if key not in known:
            known[key] = original(paths)
        return known[key]

    return remembering


def test_orl(orl):
    assert (len(orl), len(orl.names), orl.skipped) == (400, 40, [])
    assert orl.images.shape == (400, 3, 112, 112)
    assert orl.images.dtype == torch.float32
    assert 0 <= orl.images.min() < 0.1 < 0.9 < orl.images.max() <= 1
    assert orl.labels.dtype == torch.int64
    assert orl.labels.bincount().tolist() == [10] * 40
    assert all(file.parent.name == orl.names[label] for file, label in zip(orl.files, orl.labels))


def test_landmarks_lie_on_the_template(orl):
    """Alignment did its work if detecting again on the chips finds the template."""
    found = align.find_landmarks([np.ascontiguousarray(chip.transpose(1, 2, 0)) for chip in orl.chips[:40:4]])
    points = np.stack([p for p, _ in found if p is not None])
    assert len(points) >= 9
    assert np.abs(points.mean(0) - align.TEMPLATE).max() < 4


def test_subsets(orl):
    few = orl.people(["s3", "s1"])
    assert few.names == ["s3", "s1"]
    assert few.labels.tolist() == [1] * 10 + [0] * 10
    assert torch.equal(few.images[:10], orl.images[:10])
    assert len(orl.first_photos(3)) == 120
    assert torch.equal(orl[[5, 2]].images, orl.images[[5, 2]])
    assert len(orl[orl.labels == 7]) == 10
    with pytest.raises(ValueError, match="no one called nobody"):
        orl.people(["nobody"])


def test_subsets_by_all_that_numpy_takes(orl):
    backwards = orl[::-1]
    assert backwards.files == orl.files[::-1]
    assert torch.equal(backwards.labels, orl.labels.flip(0))
    assert np.array_equal(backwards.chips, orl.chips[::-1])
    nothing = np.zeros(400, bool)
    for index in ([], (), slice(0, 0), nothing, torch.from_numpy(nothing), torch.tensor([], dtype=torch.int64)):
        none = orl[index]
        assert (len(none), none.labels.shape, none.images.shape) == (0, (0,), (0, 3, 112, 112))
    for index in (-1, np.int32(399), torch.tensor(399), [399], torch.tensor([399], dtype=torch.int32)):
        assert orl[index].files == orl.files[-1:]
    assert orl[::7][torch.arange(2)].files == [orl.files[0], orl.files[7]]
    assert len(orl.people([])) == 0
    for wrong in (np.ones(399, bool), [400], [0.0]):
        with pytest.raises(IndexError):
            orl[wrong]


def test_photos_of_every_kind(photos, cache, tmp_path):
    plain = Image.open(photos / "person0" / "0.png")
    person = photos / "person9"
    person.mkdir()
    plain.convert("RGBA").save(person / "rgba.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # "turn right by 90 degrees to view"
    plain.transpose(Image.Transpose.ROTATE_90).convert("RGB").save(person / "turned.jpg", exif=turned, quality=95)
    plain.resize((4000, 4800)).convert("RGB").save(person / "huge.jpg", quality=90)
    Image.new("RGB", (300, 300), "grey").save(person / "blank.png")
    data = faces.load(photos)
    chips = {file.name: chip for file, chip in zip(data.files, data.images) if file.parent.name == "person9"}
    assert set(chips) == {"rgba.png", "turned.jpg", "huge.jpg"}
    assert [(path.name, reason) for path, reason in data.skipped] == [("blank.png", "no face found")]
    for chip in chips.values():
        assert (chip - data.images[0]).abs().mean() < 0.03


def test_of_a_known_set_few_may_be_skipped_of_own_photos_many(photos, cache, monkeypatch, caplog):
    (photos / "person0" / "broken.jpg").write_text("no photo")
    Image.new("RGB", (200, 200)).save(photos / "person0" / "black.png")
    own = faces.load(photos)
    assert len(own) == 20
    assert sorted(file.name for file, _ in own.skipped) == ["black.png", "broken.jpg"]
    assert "2 of 22 photos" in caplog.text
    assert "the others are used" in caplog.text
    shutil.rmtree(cache)
    known = datasets.photos(photos)
    monkeypatch.setattr(datasets, "photos", lambda name, root=None: known)
    with pytest.raises(RuntimeError, match=r"2 of 22 photos .* more than 5%.*unreadable.*: remove them"):
        faces.load("lfw")
    assert list((cache / "chips").iterdir()) == []


def test_a_folder_without_a_single_face_is_an_error(tmp_path, cache):
    (tmp_path / "own" / "ann").mkdir(parents=True)
    Image.new("RGB", (200, 200)).save(tmp_path / "own" / "ann" / "black.png")
    with pytest.raises(RuntimeError, match=r"1 of 1 photos .* gave no chip.*black.png: no face found.*: remove them"):
        faces.load(tmp_path / "own")


def test_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match='neither "orl" nor "lfw" nor a folder'):
        faces.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no photos"):
        faces.load(tmp_path)


def test_cache_is_used_and_notices_changes(photos, cache, monkeypatch, remembered):
    calls = []
    monkeypatch.setattr(align, "align", lambda paths: calls.append(len(paths)) or remembered(paths))
    first = faces.load(photos)
    assert calls == [20]
    calls.clear()
    assert torch.equal(faces.load(photos).images, first.images)
    assert calls == []
    os.utime(photos / "person1" / "9.png", (1, 1))  # another time, the same photo
    assert torch.equal(faces.load(photos).images, first.images)
    assert calls == []
    (photos / "person1" / "9.png").unlink()
    assert len(faces.load(photos)) == 19
    assert sum(calls) == 19
    (photos / "person1").rename(photos / "somebody")
    assert faces.load(photos).names == ["person0", "somebody"]


def test_the_fingerprint_is_of_the_content(photos, cache):
    before = faces.fingerprint(photos)
    a, b = photos / "person0" / "0.png", photos / "person0" / "1.png"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    assert faces.fingerprint(photos) != before
    a.write_bytes(first)
    b.write_bytes(second)
    os.utime(a, (1, 1))
    assert faces.fingerprint(photos) == before


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def become_a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "a byte flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "emptied": lambda path: path.write_bytes(b""),
    "lost": lambda path: path.unlink(),
    "a folder instead": become_a_folder,
}


@pytest.mark.parametrize("file", ["chips.npy", "index.json", "matrices.npy"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_chips_are_cut_again(damage, file, photos, cache, caplog, monkeypatch, remembered):
    calls = []
    monkeypatch.setattr(align, "align", lambda paths: calls.append(len(paths)) or remembered(paths))
    for path in [*photos.glob("*/[1-9].png")]:
        path.unlink()
    first = faces.load(photos)
    (home,) = (cache / "chips").iterdir()
    expected = np.array(first.chips)
    DAMAGES[damage](home / file)
    caplog.clear()
    again = faces.load(photos)
    assert np.array_equal(again.chips, expected)
    assert np.array_equal(again.matrices, first.matrices)
    assert again.files == first.files
    assert len(caplog.records) == 1
    assert home.name in caplog.text
    assert "made again" in caplog.text
    caplog.clear()
    assert np.array_equal(faces.load(photos).chips, expected)
    assert caplog.records == []
    assert calls == [2, 2]


def test_names_of_all_kinds(photos, cache):
    """Digits that int() does not take, and what macOS leaves beside each photo."""
    (photos / "person0" / "0.png").rename(photos / "person0" / "².png")
    (photos / "person1").rename(photos / "s²")
    (photos / "person0" / "._1.png").write_bytes(b"Mac OS X")
    (photos / "person0" / ".hidden.png").write_bytes(b"no photo")
    (photos / "._person0").write_bytes(b"Mac OS X")
    data = faces.load(photos)
    assert (len(data), data.skipped, sorted(data.names)) == (20, [], ["person0", "s²"])
    assert "².png" in {file.name for file in data.files}


def _load(folder):
    return faces.load(folder).images.sum().item()


def test_two_processes_at_once(photos, cache):
    for path in [*photos.glob("*/[2-9].png")]:
        path.unlink()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, other = pool.map(_load, [photos, photos])
    assert one == other == _load(photos)
    assert len([path for path in (cache / "chips").iterdir() if not path.name.startswith(".")]) == 1


def test_similarity_is_exact_for_similar_landmarks():
    turn = np.array([[0.8, -0.3], [0.3, 0.8]])
    points = align.TEMPLATE @ turn.T + [12, -7]
    matrix = align.similarity(points)
    np.testing.assert_allclose(points @ matrix[:, :2].T + matrix[:, 2], align.TEMPLATE, atol=1e-9)


def test_cut(orl):
    photo = np.ascontiguousarray(orl.chips[0].transpose(1, 2, 0))
    identity = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    assert np.array_equal(align.cut(photo, identity), orl.chips[0])
    shifted = align.cut(photo, np.add(identity, [[0, 0, 5], [0, 0, 0]]))
    assert np.array_equal(shifted[:, :, 5:], orl.chips[0][:, :, :-5])
    assert np.array_equal(shifted[:, :, 0], orl.chips[0][:, :, 0])  # the border is repeated


def test_lfw(lfw, tmp_path):
    assert (len(lfw), len(lfw.names)) == (13233, 5749)
    people = sorted({file.parent for file in lfw.files})[::60]  # all of it takes ten minutes
    for person in people:
        (tmp_path / person.name).symlink_to(person)
    data = faces.load(tmp_path)
    assert data.skipped == []
    assert len(data) == sum(len(list(person.iterdir())) for person in people) > 150
