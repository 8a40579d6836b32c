"""De-identification of folders: what the written files show, hold and keep, and every refusal."""

import csv
import functools
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from faceadv import align, cli, deidentify, metrics, recognisers
from faceadv.store.tables import csv_safe

ICC, GPS, ORIENTATION = "icc_profile", 0x8825, 0x0112


@pytest.fixture(scope="module")
def photos(orl):
    """Four ORL photos of four people, enlarged threefold: (336, 276, 3) uint8."""
    return [np.asarray(enlarged(align.read_photo(orl.files[i]), 3)) for i in (0, 42, 77, 133)]


def enlarged(photo, factor):
    height, width = photo.shape[:2]
    kind = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.BOX
    return Image.fromarray(photo).resize((round(factor * width), round(factor * height)), kind)


def side_by_side(*photos):
    """Photos on a grey canvas, with room around them."""
    height, width = photos[0].shape[:2]
    canvas = np.full((height + 80, len(photos) * (width + 60) + 60, 3), 128, np.uint8)
    for i, photo in enumerate(photos):
        canvas[40 : 40 + height, 60 + i * (width + 60) : 60 + i * (width + 60) + width] = photo
    return canvas


def write(path, photo, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo).save(path, **options)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def chip(photo, points):
    return torch.from_numpy(align.cut(photo, align.similarity(points)))[None].float() / 255


def recognised(before, after, recogniser):
    """Distance of each face of one file to the nearest one of the other, as anybody would measure it."""
    embeddings = []
    for path in (before, after):
        photo = align.read_photo(path)
        (faces,) = align.find_every_face([photo])
        with torch.no_grad():
            embeddings.append(torch.cat([recogniser.embed(chip(photo, points)) for points in faces]))
    return torch.cdist(*embeddings).amin(1)


def outside(photo, margin=2.0):
    """Where the chips of a photo's faces do not reach, by mapping every pixel into each chip."""
    ys, xs = np.mgrid[: photo.shape[0], : photo.shape[1]]
    far = np.ones(photo.shape[:2], bool)
    for points in align.find_every_face([photo])[0]:
        matrix = align.similarity(points)
        place = np.tensordot(matrix, np.stack([xs, ys, np.ones_like(xs)]), 1)
        far &= (place < -margin).any(0) | (place > align.SIZE - 1 + margin).any(0)
    return far


def run(source, target, *more):
    return cli.main(["deidentify", str(source), str(target), *more])


@pytest.fixture(scope="module")
def done(photos, orl, tmp_path_factory):
    """One run over photos of all kinds, in folders: ``(source, target, rows by photo, contents before)``."""
    source, target = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out") / "new" / "folder"
    write(source / "a.png", photos[0])
    write(source / "b.JPG", photos[1], quality=95)
    write(source / "small.png", align.read_photo(orl.files[77]))
    write(source / "deep" / "er" / "half.png", np.asarray(enlarged(align.read_photo(orl.files[133]), 0.5)))
    write(source / "deep" / "large.jpeg", np.asarray(enlarged(align.read_photo(orl.files[0]), 9)), quality=92)
    write(source / "two.png", side_by_side(photos[1], photos[3]))
    write(source / "none.png", np.tile(np.linspace(0, 255, 300).astype(np.uint8)[:, None, None], (1, 300, 3)))
    write(source / "cut.jpg", photos[0])
    (source / "cut.jpg").write_bytes((source / "cut.jpg").read_bytes()[:3000])
    (source / "empty.png").write_bytes(b"")
    (source / "notes.txt").write_text("no photo")
    before = contents(source)
    rows = {}
    for row in deidentify.folder(source, target):
        rows.setdefault(row["photo"], []).append(row)
    return source, target, rows, before


@pytest.fixture
def quick(monkeypatch):
    """One step of the attack."""
    monkeypatch.setattr(deidentify, "protect", functools.partial(deidentify.protect, steps=1))


FACES = ["a.png", "b.JPG", "small.png", "deep/er/half.png", "deep/large.jpeg", "two.png"]


@pytest.mark.parametrize("name", FACES)
def test_the_written_file_is_somebody_else(name, done, dlib):
    """Judged from the files alone: detected, cut and embedded anew."""
    source, target, rows, _ = done
    assert (recognised(source / name, source / name, dlib) < 1e-3).all()
    for recogniser in (dlib, recognisers.load("mobilefacenet")):
        distances = recognised(source / name, target / name, recogniser)
        assert len(distances) == len(rows[name])
        assert (distances > 0.85 * recogniser.threshold).all()
    for row in rows[name]:
        assert row["state"] == "de-identified"
        for net in deidentify.MADE_FOR:
            assert row[f"{net}: before"] < row[f"{net}: threshold"] <= row[f"{net}: after"]
            assert row[f"{net}: hidden"] is True
        assert row["SSIM"] > 0.94
    photo, written = align.read_photo(source / name), align.read_photo(target / name)
    assert written.shape == photo.shape
    assert np.abs(written.astype(int) - photo).max() < (64 if min(photo.shape[:2]) > 50 else 80)  # still the same photo
    assert np.ptp(written, 2).max() <= 2  # grey stays grey, but for JPEG's rounding


def test_what_is_reported_is_in_the_file(done, dlib):
    """Each number of the report, computed again from the files; the face is judged by another photo of the person."""
    source, target, rows, _ = done
    nets = [dlib, *(recognisers.load(name) for name in ("mobilefacenet", "mobilenet-vggface2"))]
    for name, other in (("a.png", "deep/large.jpeg"), ("b.JPG", "two.png"), ("small.png", None)):
        photo, written = align.read_photo(source / name), align.read_photo(target / name)
        ((points,), (found,)) = align.find_every_face([photo]), align.find_every_face([written])
        points, found = points[0], found[0]
        clean, after = chip(photo, points), chip(written, found)
        (row,) = rows[name]
        assert row["compared with"] == (other or deidentify.MIRROR)
        compared = clean.flip(3)
        if other:
            another = align.read_photo(source / other)
            chips = [chip(another, one) for one in align.find_every_face([another])[0]]
            compared = min(chips, key=lambda one: (dlib.embed(one) - dlib.embed(clean)).norm())
        with torch.no_grad():
            for net in nets:
                for when, shown in (("before", clean), ("after", after)):
                    distance = net.distance(net.embed(shown), net.embed(compared)).item()
                    assert row[f"{net.name}: {when}"] == pytest.approx(distance, abs=1e-3)
                assert row[f"{net.name}: threshold"] == net.threshold
                assert row[f"{net.name}: hidden"] == (distance >= net.threshold)
        assert row["SSIM"] == pytest.approx(metrics.ssim(chip(written, points), clean).item(), abs=1e-3)


def test_far_from_the_face_nothing_changes(done):
    source, target, _, _ = done
    for name in ("a.png", "two.png"):
        photo, written = align.read_photo(source / name), align.read_photo(target / name)
        far = outside(photo)
        assert 0.1 < far.mean() < 0.9
        assert np.array_equal(photo[far], written[far])
        assert (photo[~far] != written[~far]).any(1).mean() > 0.3


def test_a_row_for_each_face_and_each_file(done):
    _, target, rows, before = done
    assert set(rows) == set(before)
    assert [row["face"] for row in rows["two.png"]] == [1, 2]
    assert [row["face"] for row in rows["a.png"]] == [1]
    for name in ("cut.jpg", "empty.png"):
        assert rows[name] == [{"photo": name, "state": "left out: unreadable"}]
    assert rows["notes.txt"] == [{"photo": "notes.txt", "state": "left out: no photo"}]
    assert rows["none.png"] == [{"photo": "none.png", "state": deidentify.NO_FACE, "lost": ""}]
    with open(target / deidentify.REPORT, newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == deidentify.columns(["dlib", "mobilefacenet", "mobilenet-vggface2"])
    assert len(written) == sum(map(len, rows.values()))
    for line in written:
        if line["face"]:
            row = rows[line["photo"]][int(line["face"]) - 1]
            assert float(line["dlib: after"]) == pytest.approx(row["dlib: after"], abs=1e-4)
            assert line["dlib: hidden"] == str(row["dlib: hidden"])


def test_the_page_shows_each_face(done):
    _, target, rows, _ = done
    page = (target / deidentify.PAGE).read_text(encoding="utf-8")
    faces = [row for several in rows.values() for row in several if "face" in row]
    for title in ("before", "after", "change × 10"):
        assert page.count(f'alt="{title}"') == len(faces)
    assert deidentify.WARNING in page
    assert "<script" not in page
    assert "mobilenet-vggface2: hidden" in page
    for name in rows:
        assert f"<h2>{name}</h2>" in page


def test_what_lies_where(done):
    source, target, _, before = done
    assert contents(source) == before  # the input is as it was
    written = {*FACES, "none.png", deidentify.REPORT, deidentify.PAGE, deidentify.NOTE, deidentify.LOCK}
    assert set(contents(target)) == written  # nothing temporary, nothing unreadable
    assert np.array_equal(align.read_photo(target / "none.png"), align.read_photo(source / "none.png"))
    formats = {name: Image.open(target / name) for name in FACES}
    for name, picture in formats.items():
        with picture:
            assert picture.format == ("PNG" if name.endswith("png") else "JPEG")


def test_metadata_go_and_the_colour_profile_stays(photos, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F], exif[0x0132] = "Maker of cameras", "2020:01:01 00:00:00"
    exif.get_ifd(GPS).update({1: "N", 2: (48.0, 51.0, 30.0), 3: "E", 4: (2.0, 17.0, 40.0)})
    options = {"exif": exif, ICC: profile, "comment": b"at home", "quality": 95}
    write(tmp_path / "in" / "a.jpg", photos[0], **options)
    write(tmp_path / "in" / "b.png", photos[0], exif=exif, **{ICC: profile})
    with Image.open(tmp_path / "in" / "a.jpg") as picture:
        assert picture.getexif().get_ifd(GPS)[1] == "N"  # the test's own photo has it
    write(tmp_path / "in" / "faceless.jpg", np.full((90, 90, 3), 90, np.uint8), **options)
    rows = deidentify.folder(tmp_path / "in", tmp_path / "out")
    assert [row["state"] for row in rows] == ["de-identified"] * 2 + [deidentify.NO_FACE]
    for name in ("a.jpg", "b.png", "faceless.jpg"):
        data = (tmp_path / "out" / name).read_bytes()
        for trace in (b"Exif", b"eXIf", b"Maker of cameras", b"2020:01:01", b"at home"):
            assert trace not in data
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.info[ICC] == profile
            assert not picture.getexif()
            assert "comment" not in picture.info


def test_the_rotation_in_the_metadata_is_applied(photos, tmp_path, dlib):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # lies on its side, and is shown turned clockwise
    write(tmp_path / "in" / "a.png", np.rot90(photos[1]), exif=exif)
    (row,) = deidentify.folder(tmp_path / "in", tmp_path / "out")
    assert row["state"] == "de-identified"
    with Image.open(tmp_path / "out" / "a.png") as picture:
        assert not picture.getexif()
        written = np.asarray(picture)
    assert written.shape == photos[1].shape
    far = outside(photos[1])
    assert np.array_equal(written[far], photos[1][far])
    assert (recognised(tmp_path / "in" / "a.png", tmp_path / "out" / "a.png", dlib) > 0.85 * dlib.threshold).all()


MODES = {
    "L": ("a.png", "L", ""),
    "LA": ("a.png", "L", "transparency"),
    "P": ("a.png", "RGB", ""),
    "RGBA": ("a.png", "RGB", "transparency"),
    "CMYK": ("a.jpg", "RGB", "CMYK"),
    "I;16": ("a.png", "L", "all but 8 bits a colour"),
    "16-bit TIFF": ("a.tiff", "L", "all but 8 bits a colour"),
    "frames": ("a.tif", "RGB", "all frames but the first"),
    "WebP": ("a.webp", "RGB", ""),
    "GIF": ("a.GIF", "RGB", ""),
    "AVIF": ("a.avif", "RGB", ""),
    "JFIF": ("a.jfif", "L", ""),
}


@pytest.mark.parametrize("kind", MODES)
def test_other_kinds_of_pixels_and_files(kind, orl, tmp_path, quick):
    """Each is read, is written in its own format, grey if it was grey, and what is lost of it is said."""
    name, mode, lost = MODES[kind]
    photo, more = Image.fromarray(align.read_photo(orl.files[42])), {}
    if "16" in kind:
        photo = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    elif kind == "frames":
        more = {"save_all": True, "append_images": [photo]}
    else:
        photo = photo.convert("L" if kind == "JFIF" else kind if kind in ("L", "LA", "P", "RGBA", "CMYK") else "RGB")
    (tmp_path / "in").mkdir()
    photo.save(tmp_path / "in" / name, **({"format": "JPEG"} if kind == "JFIF" else {}), **more)
    (row,) = deidentify.folder(tmp_path / "in", tmp_path / "out")
    assert row["face"] == 1
    assert row["lost"] == lost
    with Image.open(tmp_path / "in" / name) as before, Image.open(tmp_path / "out" / name) as after:
        assert after.format == before.format
        assert after.size == before.size
        assert after.mode == mode or kind in ("GIF", "AVIF")
        assert getattr(after, "n_frames", 1) == 1


def test_heic_without_its_package_has_a_row_that_says_so(orl, tmp_path, monkeypatch):
    monkeypatch.setattr(align, "_heif", lambda: False)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.HEIC").write_bytes(b"....ftypheic")
    assert deidentify.folder(tmp_path / "in", tmp_path / "out") == [
        {"photo": "a.HEIC", "state": "left out: needs the package pillow-heif"}
    ]
    assert align.align([tmp_path / "in" / "a.HEIC"]) == ["needs the package pillow-heif"]


def test_links_hidden_files_and_long_names(orl, tmp_path, quick):
    photo, long = align.read_photo(orl.files[42]), "n" * 246 + ".png"
    write(tmp_path / "elsewhere" / "b.png", photo)
    write(tmp_path / "in" / "deep" / "c.png", photo)
    write(tmp_path / "in" / long, photo)
    for hidden in (".a.png", ".hidden/a.png"):
        write(tmp_path / "in" / hidden, photo)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "round").symlink_to(tmp_path / "in")
    rows = {row["photo"]: row for row in deidentify.folder(tmp_path / "in", tmp_path / "out")}
    assert set(rows) == {"link/b.png", "deep/c.png", long, "round"}
    assert rows.pop("round")["state"] == "left out: a link to a folder that is here already"
    for name, row in rows.items():
        assert row["face"] == 1
        assert (tmp_path / "out" / name).is_file()


def test_a_photo_that_cannot_be_written_does_not_end_the_run(orl, tmp_path, monkeypatch, quick):
    for name in ("a.png", "b.png"):
        write(tmp_path / "in" / name, align.read_photo(orl.files[42]))
    encode = deidentify._encode

    def failing(photo, like):
        if like.name == "a.png":
            raise OSError(36, "File name too long", str(like))
        return encode(photo, like)

    monkeypatch.setattr(deidentify, "_encode", failing)
    first, second = deidentify.folder(tmp_path / "in", tmp_path / "out")
    assert first["state"].startswith("left out: ")
    assert "file name too long" in first["state"]
    assert second["face"] == 1


def test_smooth_skin_changes_less_than_hair_and_eyes(photos, dlib):
    """What is added is larger where the grey around a pixel varies more."""
    photo = photos[2]
    (faces,) = align.find_every_face([photo])
    clean = chip(photo, faces[0])
    moved = (chip(deidentify.protect(photo, align.similarity(faces[0]), [dlib]), faces[0]) - clean).abs().mean(1)[0]
    weight = deidentify._texture(clean)[0, 0]
    inside = torch.zeros_like(weight, dtype=torch.bool)
    inside[12:-12, 12:-12] = True
    smooth, lively = weight < weight[inside].quantile(0.25), weight > weight[inside].quantile(0.75)
    assert moved[inside & smooth].mean() < 0.5 * moved[inside & lively].mean()


@pytest.mark.parametrize("floor", [0.98, 0.95])
def test_what_is_left_of_the_chip_is_what_was_asked_for(floor, photos, dlib):
    (faces,) = align.find_every_face([photos[1]])
    matrix = align.similarity(faces[0])
    changed = deidentify.protect(photos[1], matrix, [dlib], floor)
    kept = metrics.ssim(chip(changed, faces[0]), chip(photos[1], faces[0])).item()
    assert floor - 0.003 < kept < floor + 0.02


def test_protect_leaves_photo_and_recogniser_as_they_are(photos, dlib):
    photo, before = photos[0].copy(), {key: value.clone() for key, value in dlib.state_dict().items()}
    (faces,) = align.find_every_face([photo])
    matrix = align.similarity(faces[0])
    changed = deidentify.protect(photo, matrix, [dlib])
    assert changed.dtype == np.uint8
    assert not np.array_equal(changed, photo)
    assert np.array_equal(photo, photos[0])
    assert all(torch.equal(before[key], value) for key, value in dlib.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in dlib.parameters())
    assert np.array_equal(deidentify.protect(photo, matrix, [dlib]), changed)
    away = np.c_[matrix[:, :2], matrix[:, 2] + 10000]  # a chip of which the photo shows nothing
    assert np.array_equal(deidentify.protect(photo, away, [dlib]), photo)


def test_the_chip_reaches_beyond_the_photo(photos, dlib):
    cropped = photos[0][:270, :].copy()
    (faces,) = align.find_every_face([cropped])
    changed = deidentify.protect(cropped, align.similarity(faces[0]), [dlib])
    clean, after = chip(cropped, faces[0]), chip(changed, faces[0])
    with torch.no_grad():
        assert dlib.distance(dlib.embed(after), dlib.embed(clean.flip(3))) >= dlib.threshold


def test_the_seam_is_soft(photos, dlib):
    """What is added fades out: at the border of the chip it is nothing, in the middle it is most."""
    photo = photos[2]
    (faces,) = align.find_every_face([photo])
    matrix = align.similarity(faces[0])
    changed = deidentify.protect(photo, matrix, [dlib])
    ys, xs = np.mgrid[: photo.shape[0], : photo.shape[1]]
    x, y = np.tensordot(matrix, np.stack([xs, ys, np.ones_like(xs)]), 1)
    inside = np.minimum(np.minimum(x, align.SIZE - 1 - x), np.minimum(y, align.SIZE - 1 - y))
    size = np.abs(changed.astype(int) - photo).max(2)
    assert size[(inside > -2) & (inside < 1)].mean() < 0.25 * size[inside > 12].mean()


def test_the_command(photos, tmp_path, capsys):
    write(tmp_path / "in" / "me" / "a.png", photos[3])
    write(tmp_path / "in" / "b.png", np.full((200, 200, 3), 90, np.uint8))
    (tmp_path / "in" / "notes.txt").write_text("no photo")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"b.png: {deidentify.NO_FACE}"
    assert told[1].startswith("me/a.png face 1: de-identified, hidden from dlib, hidden from mobilefacenet, ")
    assert told[2] == "notes.txt: left out: no photo"
    assert told[3:5] == [f"1 of 1 faces are hidden from {name}." for name in ("dlib", "mobilefacenet")]
    assert told[5].endswith("hidden from mobilenet-vggface2, which the protection did not use.")
    assert told[6] == "1 photos without a face were written without metadata, 1 files were left out."
    for name in (deidentify.REPORT, deidentify.PAGE):
        assert str(tmp_path / "out" / name) in told[7]
    assert (tmp_path / "out" / "me" / "a.png").is_file()


def test_relative_folders_and_one_recogniser(photos, tmp_path, capsys, monkeypatch):
    """The landmarks, found anew, may lie elsewhere. What is said is what the files show."""
    for i, photo in enumerate(photos[:2]):
        write(tmp_path / "in" / f"{i}.png", photo)
    monkeypatch.chdir(tmp_path)
    assert run("in", "out", "--model", "mobilenet-vggface2", "--ssim", "0.97") == 0
    told, net = capsys.readouterr().out, recognisers.load("mobilenet-vggface2")
    with open(tmp_path / "out" / deidentify.REPORT, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    hidden = [float(row[f"{net.name}: after"]) >= net.threshold for row in rows]
    for row, is_hidden in zip(rows, hidden):
        assert row[f"{net.name}: hidden"] == str(is_hidden)
        assert row["state"] == ("de-identified" if is_hidden else "changed, but still recognised")
        assert f"{row['photo']} face 1: {row['state']}, " in told
    assert f"{sum(hidden)} of 2 faces are hidden from mobilenet-vggface2.\n" in told
    assert "faces are hidden from dlib, which the protection did not use" in told
    for i in range(2):
        assert recognised(tmp_path / "in" / f"{i}.png", tmp_path / "out" / f"{i}.png", net) > net.threshold / 2


REFUSALS = {
    "target not empty": (["in", "full"], 2, "full is there already and not an empty folder"),
    "target is a file": (["in", "in/../file"], 2, "not an empty folder"),
    "target inside": (["in", "in/out"], 2, "must lie outside"),
    "target around": (["in", "."], 2, "must lie outside"),
    "the same": (["in", "./in"], 2, "must lie outside"),
    "no photos": (["bare", "out"], 2, "bare holds no photos"),
    "no folder": (["nowhere", "out"], 2, "nowhere is not a folder"),
    "a photo for a folder": (["in/a.png", "out"], 2, "a.png is not a folder"),
    "not so much": (["in", "out", "--ssim", "95"], 2, "ssim must be a number from 0.5 to 0.999, not 95"),
    "unknown model": (["in", "out", "--model", "dlibb"], 2, 'no recogniser "dlibb" (did you mean dlib?)'),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_sentence_and_touch_nothing(case, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("FACEADV_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in" / "a.png", np.zeros((50, 50, 3), np.uint8))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.txt").write_text("mine")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "notes.txt").write_text("no photo")
    (tmp_path / "file").write_text("a file")
    before = contents(tmp_path)
    argv, status, said = REFUSALS[case]
    assert cli.main(["deidentify", *argv]) == status
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.startswith("faceadv: ")
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_an_empty_target_is_taken(photos, tmp_path):
    write(tmp_path / "in" / "a.png", photos[0])
    (tmp_path / "out").mkdir()
    assert deidentify.folder(tmp_path / "in", tmp_path / "out")[0]["state"] == "de-identified"


def test_photos_of_the_wild(lfw_root, tmp_path):
    """Where LFW is: photos with a background, and with several faces."""
    from faceadv.store import datasets

    paths = sorted(datasets.lfw_folder(lfw_root).glob("A*/*_0001.jpg"))[:60:10]
    (tmp_path / "in").mkdir()
    for path in paths:
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    rows = deidentify.folder(tmp_path / "in", tmp_path / "out")
    faces = [row for row in rows if "face" in row]
    assert len(faces) >= len(paths)
    for net in deidentify.MADE_FOR:
        assert np.mean([row[f"{net}: hidden"] for row in faces]) >= 0.8
    files = {deidentify.REPORT, deidentify.PAGE, deidentify.NOTE, deidentify.LOCK}
    assert set(contents(tmp_path / "out")) == {path.name for path in paths} | files


def test_cells_of_the_report_are_no_formulas(tmp_path):
    names = ["=1+1.png", "+a.png", "-a.png", "@a.png", "a=1.png", "-in/a.png"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"no photo")
    rows = deidentify.folder(tmp_path / "in", tmp_path / "out")
    assert sorted(row["photo"] for row in rows) == sorted(names)
    with open(tmp_path / "out" / deidentify.REPORT, newline="", encoding="utf-8") as file:
        written = [row["photo"] for row in csv.DictReader(file)]
    assert sorted(written) == sorted("'" + name if name[0] in "=+-@" else name for name in names)


def test_numbers_are_no_formulas():
    assert [csv_safe(value) for value in (-0.5, 3, None, True, "", "a", "1")] == [-0.5, 3, None, True, "", "a", "1"]
    assert [csv_safe(value) for value in ("-0.5", "\t=1", "\r=1")] == ["'-0.5", "'\t=1", "'\r=1"]


def test_names_of_all_kinds(tmp_path):
    names = ["ü名.png", os.fsdecode(b"caf\xe9.png"), "._ü名.png"]  # the second is not Unicode, the third is macOS's
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_bytes(b"no photo")
    assert {row["photo"] for row in deidentify.folder(tmp_path / "in", tmp_path / "out")} == set(names[:2])
    text = (tmp_path / "out" / deidentify.REPORT).read_bytes().decode("utf-8")
    assert "ü名.png" in text
    assert "caf\\udce9.png" in text


@pytest.mark.parametrize("s", [2, 5])
def test_a_chip_just_outside_a_large_photo(s, photos, dlib):
    photo = np.asarray(enlarged(photos[0], s))
    for gap in range(12):
        matrix = np.array([[1 / (s + 0.1), 0, 0], [0, 1 / (s + 0.1), 0]])
        matrix[0, 2] = -(photo.shape[1] + gap) / (s + 0.1)  # the chip's left border lies gap pixels right of the photo
        changed = deidentify.protect(photo, matrix, [dlib], steps=1)
        assert changed.shape == photo.shape
