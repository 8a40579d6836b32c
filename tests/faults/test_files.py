"""Files that are no photos: pipes, links that lead nowhere, folders that nobody may read; names of any bytes."""

import csv
import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from faceadv import align, cli, deidentify, faces
from faceadv.store import cache, datasets
from faceadv.store.paths import alone

LATIN = os.fsdecode(b"caf\xe9.png")  # no UTF-8
ODD = ("pipe.jpg", "dangling.jpg", "loop.jpg", "folder.jpg")


def odd(folder):
    """Put one of each into a folder."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "folder.jpg").mkdir()


def locked(monkeypatch, folder):
    """Nobody may list this folder. (Rights alone do not stop root.)"""
    for name in ("listdir", "scandir"):
        real = getattr(os, name)

        def refused(path=".", real=real):
            if os.fspath(path) == str(folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path)

        monkeypatch.setattr(os, name, refused)


@pytest.fixture
def photos(orl, tmp_path, monkeypatch):
    """A folder of two people with a photo each, and of a third one with whatever is no photo."""
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path / "cache"))
    for person, i in (("ann", 0), ("bob", 10)):
        (tmp_path / "photos" / person).mkdir(parents=True)
        shutil.copy(orl.files[i], tmp_path / "photos" / person / "a.pgm")
    return tmp_path / "photos"


def test_what_is_no_photo_is_skipped_with_its_reason(photos, monkeypatch):
    (photos / "cid").mkdir()
    odd(photos / "cid")
    (photos / "dan").mkdir()
    shutil.copy(photos / "ann" / "a.pgm", photos / "dan")
    (photos / "ann" / "link.pgm").symlink_to(photos / "ann" / "a.pgm")  # of a photo: is one
    locked(monkeypatch, photos / "dan")
    data = faces.load(photos)
    assert [str(path.relative_to(photos)) for path in data.files] == ["ann/a.pgm", "ann/link.pgm", "bob/a.pgm"]
    skipped = {str(path.relative_to(photos)): reason for path, reason in data.skipped}
    folders = {"cid/folder.jpg": "unreadable", "dan": "unreadable"}
    assert skipped == {f"cid/{name}": "no regular file" for name in ODD} | folders
    before = datasets.fingerprint(photos)
    (photos / "cid" / "dangling.jpg").unlink()
    (photos / "cid" / "dangling.jpg").write_bytes(b"a file now")
    assert datasets.fingerprint(photos) != before


def test_a_file_that_may_not_be_read_is_skipped(photos, monkeypatch):
    (photos / "ann" / "b.pgm").write_bytes((photos / "bob" / "a.pgm").read_bytes())
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "b.pgm" and real(path, mode))
    assert len(cache.content("photos", [photos / "ann" / "a.pgm", photos / "ann" / "b.pgm"])) == 64


@pytest.mark.parametrize("name", ODD)
def test_only_regular_files_are_read(name, tmp_path):
    odd(tmp_path)
    with pytest.raises(OSError, match=name):
        align.read_photo(tmp_path / name)


@pytest.fixture
def source(tmp_path):
    """Photos without a face, which are copied: nothing is attacked, and all is quick."""
    for name in ("a.png", "b.png", LATIN, "deep/c.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "grey").save(tmp_path / "in" / name)
    return tmp_path / "in"


@pytest.fixture
def calls(monkeypatch, source):
    """Lists the photos that are de-identified, without a network."""
    real, seen = deidentify._file, []

    def file(path, target, *rest):
        name = path.relative_to(source).as_posix()
        seen.append(name)
        if name == end[0]:
            target.write_bytes(b"half")
            raise KeyboardInterrupt
        return real(path, target, *rest)

    end = [None]  # the photo at which the run is killed
    monkeypatch.setattr(deidentify, "_file", file)
    monkeypatch.setattr(deidentify.align, "find_every_face", lambda photos: [[]] * len(photos))
    monkeypatch.setattr(deidentify.recognisers, "load", lambda name, *args: SimpleNamespace(name=name))
    return SimpleNamespace(seen=seen, end=end)


def reported(target):
    with open(target / deidentify.REPORT, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_killed_run_is_continued(source, calls, tmp_path, caplog):
    whole = deidentify.folder(source, tmp_path / "whole")
    assert [row["photo"] for row in whole] == ["a.png", "b.png", LATIN, "deep/c.png"]
    calls.seen.clear()
    calls.end[0] = LATIN
    with pytest.raises(KeyboardInterrupt):
        deidentify.folder(source, tmp_path / "out")
    assert [row["photo"] for row in reported(tmp_path / "out")] == ["a.png", "b.png"]
    calls.end[0] = None
    calls.seen.clear()
    assert deidentify.folder(source, tmp_path / "out") == whole
    assert calls.seen == [LATIN, "deep/c.png"]
    assert "2 of 4 files were done before." in caplog.messages
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    calls.seen.clear()
    assert deidentify.folder(source, tmp_path / "out") == whole  # nothing is left to do
    assert calls.seen == []


def test_killed_before_the_first_photo(source, calls, tmp_path):
    calls.end[0] = "a.png"
    with pytest.raises(KeyboardInterrupt):
        deidentify.folder(source, tmp_path / "out")
    calls.end[0] = None
    assert len(deidentify.folder(source, tmp_path / "out")) == 4


def test_killed_while_its_first_report_is_written(source, calls, tmp_path):
    """A process that is killed leaves its lock and half a file, and clears nothing."""
    (tmp_path / "out").mkdir()
    for name in (deidentify.LOCK, ".report.json.77-0a1b2c3d"):
        (tmp_path / "out" / name).touch()
    assert len(deidentify.folder(source, tmp_path / "out")) == 4


def test_a_second_run_into_the_same_folder_is_refused(source, calls, tmp_path, capsys):
    said = f"faceadv: Another run is writing into {tmp_path / 'out'}: wait for its end, or choose another folder.\n"
    with alone(tmp_path / "out" / deidentify.LOCK):
        assert cli.main(["deidentify", str(source), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == said
    assert calls.seen == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == [deidentify.LOCK]
    assert len(deidentify.folder(source, tmp_path / "out")) == 4


def test_a_folder_of_something_else_is_not_even_locked(source, calls, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        deidentify.folder(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_what_has_changed_is_done_again(source, calls, tmp_path):
    deidentify.folder(source, tmp_path / "out")
    Image.new("RGB", (50, 50)).save(source / "a.png")
    Image.new("RGB", (50, 50)).save(source / "new.png")
    (tmp_path / "out" / "b.png").unlink()
    calls.seen.clear()
    assert len(deidentify.folder(source, tmp_path / "out")) == 5
    assert calls.seen == ["a.png", "b.png", "new.png"]
    assert len(reported(tmp_path / "out")) == 5


def test_a_run_with_other_options_is_not_continued(source, calls, tmp_path):
    deidentify.folder(source, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for options in ({"models": ["mobilefacenet"]}, {"ssim": 0.9}):
        with pytest.raises(ValueError, match="not an empty folder, nor one of such a run: name a new one"):
            deidentify.folder(source, tmp_path / "out", **options)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_full_disk_keeps_what_is_done(source, calls, tmp_path, monkeypatch, capsys):
    real = Path.write_bytes

    def full(path, data):
        if "c.png" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert cli.main(["deidentify", str(source), str(tmp_path / "out")]) == 0
    assert "3 photos without a face were written without metadata, 1 files were left out." in capsys.readouterr().out
    (row,) = [row for row in reported(tmp_path / "out") if row["photo"] == "deep/c.png"]
    place = tmp_path / "out" / "deep" / "c.png"
    assert (
        row["state"]
        == f"left out: {place} cannot be read or written (no space left on device): mend that, or name another place."
    )
    assert not list(place.parent.iterdir())
    monkeypatch.setattr(Path, "write_bytes", real)
    calls.seen.clear()
    assert cli.main(["deidentify", str(source), str(tmp_path / "out")]) == 0
    assert calls.seen == ["deep/c.png"]
    assert "caf\\udce9.png" in capsys.readouterr().out
    assert len(reported(tmp_path / "out")) == 4


def test_the_report_names_what_is_no_photo(source, calls, tmp_path, monkeypatch):
    odd(source / "deep")
    (source / "shut").mkdir()
    Image.new("RGB", (40, 40)).save(source / "shut" / "d.png")
    locked(monkeypatch, source / "shut")
    rows = {row["photo"]: row["state"] for row in deidentify.folder(source, tmp_path / "out")}
    left_out = {name for name, state in rows.items() if state.startswith(deidentify.LEFT_OUT)}
    assert left_out == {f"deep/{name}" for name in ODD if name != "folder.jpg"} | {"shut"}
    assert len(rows) == 4 + len(left_out)
