"""Full disks: small ones that are really full, or, where nothing can be mounted, errors that say so."""

import errno
import os
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from faceadv import align, cli, faces
from faceadv.course import profiles, run
from faceadv.store import cache

FULL = os.strerror(errno.ENOSPC)
CHIP = np.zeros((3, align.SIZE, align.SIZE), np.uint8), np.eye(3)[:2], 1


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two megabytes; skipped where the user may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place, leave=0):
    """Write a file that takes all space but ``leave`` bytes."""
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    (place / "ballast").write_bytes(b"x" * (free - leave))


@pytest.fixture
def photos(tmp_path):
    """100 photos of one person, whose chips would take 3.7 MB."""
    (tmp_path / "photos" / "ann").mkdir(parents=True)
    for i in range(100):
        (tmp_path / "photos" / "ann" / f"{i}.png").write_bytes(b"%d" % i)
    return tmp_path / "photos"


def test_chips_on_a_full_disk_are_one_sentence_and_leave_nothing(small_disk, photos, monkeypatch):
    """Without a reservation, too: a page of a sparse map that finds no space kills the process."""
    monkeypatch.setenv("FACEADV_CACHE", str(small_disk))
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(align, "align", lambda paths: [CHIP] * len(paths))
    with pytest.raises(RuntimeError) as caught:
        faces.load(photos)
    assert str(caught.value) == f"The cache under {small_disk} cannot be written ({FULL.lower()}): set FACEADV_CACHE."
    assert list((small_disk / "chips").iterdir()) == []
    assert sum(path.stat().st_size for path in small_disk.rglob("*")) < 10000


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no space can be reserved here")
def test_no_photo_is_aligned_for_a_disk_that_is_too_small(small_disk, photos, monkeypatch):
    monkeypatch.setenv("FACEADV_CACHE", str(small_disk))
    monkeypatch.setattr(align, "align", lambda paths: pytest.fail("it had begun"))
    with pytest.raises(RuntimeError, match=f"cache under {small_disk} cannot be written"):
        faces.load(photos)


def test_chips_of_a_folder_with_skipped_photos(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path / "cache"))
    numbered = [(np.full_like(CHIP[0], i), *CHIP[1:]) if i % 3 else "unreadable" for i in range(100)]
    monkeypatch.setattr(align, "align", lambda paths: [numbered[int(path.stem)] for path in paths])
    data = faces.load(photos)
    assert [chip[0, 0, 0] for chip in data.chips] == [i for i in range(100) if i % 3]
    assert (data.chips == data.chips[:, :1, :1, :1]).all()
    (home,) = (tmp_path / "cache" / "chips").iterdir()
    assert not (home / "all").exists()


def test_a_disk_that_can_only_be_read_is_enough_once_it_holds_the_chips(small_disk, photos, monkeypatch):
    monkeypatch.setenv("FACEADV_CACHE", str(small_disk))
    monkeypatch.setattr(align, "align", lambda paths: [CHIP] * len(paths))
    for photo in list((photos / "ann").iterdir())[10:]:
        photo.unlink()
    faces.load(photos)
    monkeypatch.setattr(align, "align", lambda paths: pytest.fail("they are there"))
    before = sorted(small_disk.rglob("*"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for young in (1000, -1):  # the hash of the photos is not kept, or is missing
        monkeypatch.setattr(cache, "YOUNG", young)
        assert len(faces.load(photos)) == 10
    assert sorted(small_disk.rglob("*")) == before


def test_other_entries_on_a_full_disk(small_disk, monkeypatch):
    monkeypatch.setenv("FACEADV_CACHE", str(small_disk))
    with pytest.raises(RuntimeError, match=f"cache under {small_disk} cannot be written .{FULL.lower()}.: set"):
        cache.array("room", "name", "key", lambda: np.zeros(3 * 2**20, np.uint8))
    assert list((small_disk / "room").iterdir()) == []
    with pytest.raises(OSError, match=str(small_disk / "big.json")):
        cache.write_json(small_disk / "big.json", "x" * 3 * 2**20)


@pytest.fixture
def course(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    (folder / "profiles").mkdir(parents=True)
    (folder / "profiles" / "orl.yaml").write_text("all: {}\n")
    monkeypatch.setattr(profiles, "NOTEBOOKS", folder)
    monkeypatch.setattr(run, "_surroundings", lambda: "all as it is")
    for name, code in (("00_a", "print(1)"), ("01_b", "print('x' * 3 * 2**20)"), ("02_c", "print(3)")):
        cells = [new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}), new_code_cell(code)]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    return folder


def test_a_run_into_a_full_disk_prints_what_ran(small_disk, course, capsys):
    """The second notebook prints more than fits."""
    fill(small_disk, 2**20)
    assert cli.main(["run", "all", "--out", str(small_disk / "out")]) == 1
    told = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1] for line in told.out.splitlines()[1:4]}
    assert rows["00_a"] == "ran"
    assert rows["01_b"] == "failed"
    assert "02_c" in rows
    (line,) = [line for line in told.out.splitlines() if line.startswith("01_b: ")]
    assert str(small_disk / "out") in line
    assert FULL.lower() in line.lower()
    assert "Traceback" not in told.out + told.err
    assert not [path for path in small_disk.rglob(".*-????????")]


def no_space(path, *args, **kwargs):
    raise OSError(errno.ENOSPC, FULL)


def test_an_index_or_a_table_that_does_not_fit_is_a_row_of_its_own(course, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.page, "write_index", no_space)
    monkeypatch.setattr(run.pd.DataFrame, "to_csv", no_space)
    monkeypatch.setattr(run, "_run_one", lambda path, *rest: run.Result(path.stem, "ran", 1.0, 1, path))
    out = tmp_path / "out"
    assert cli.main(["run", "00", "--out", str(out)]) == 1
    told = capsys.readouterr().out
    assert "00_a" in told
    assert f"index.html: {out / 'index.html'} cannot be read or written ({FULL.lower()})" in told
    assert cli.main(["run", "00", "-p", "seed", "1,2", "--out", str(out)]) == 1
    told = capsys.readouterr().out
    assert "seed=2 00_a" in told
    assert f"sweep.csv: {out / 'sweep.csv'} cannot be read or written ({FULL.lower()})" in told
