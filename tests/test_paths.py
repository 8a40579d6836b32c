"""Files are written whole or not at all, and can be read by whom the user's umask lets read them."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from faceadv.errors import Failed, Invalid
from faceadv.store import paths


@pytest.fixture(params=[0o022, 0o077, 0o002])
def mode(request):
    """What the user's umask makes of a new file; whoever sets the umask is found out."""
    old = os.umask(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "umask", lambda mask: pytest.fail("the umask is the user's"))
        yield 0o666 & ~request.param
    os.umask(old)


def bits(path):
    return path.stat().st_mode & 0o777


def test_a_new_file_has_the_mode_of_the_umask(tmp_path, mode):
    for _ in range(2):  # new, and in place of an old one
        with paths.replacing(tmp_path / "new" / "a.txt") as part:
            part.write_text("text")
        assert bits(tmp_path / "new" / "a.txt") == mode


def test_the_private_mode_of_safetensors_does_not_stay(tmp_path, mode):
    with paths.replacing(tmp_path / "a.safetensors") as part:
        save_file({"w": torch.zeros(1)}, part)
        os.chmod(part, 0o600)
    assert bits(tmp_path / "a.safetensors") == mode


def test_a_scratch_folder_has_the_mode_of_the_umask(tmp_path, mode):
    with paths.scratch(tmp_path / "room" / "entry") as work:
        work.rename(tmp_path / "room" / "entry")
    assert bits(tmp_path / "room" / "entry") == mode | (mode & 0o444) >> 2


def test_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def killed():
        with paths.replacing(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert path.read_text() == "old"
    with paths.replacing(str(path)) as part:
        assert part.parent == tmp_path  # on the same disk
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_is_left_in_a_scratch_folder_goes(tmp_path):
    with paths.scratch(tmp_path / "entry") as work:
        (work / "deep").mkdir()
        (work / "deep" / "file").write_text("x")
    assert os.listdir(tmp_path) == []


def test_folders_are_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("FACEADV_DATA", "~/faces")
    monkeypatch.setenv("FACEADV_CACHE", "~/cache")
    assert (paths.data_root(), paths.cache_root()) == (Path.home() / "faces", Path.home() / "cache")
    monkeypatch.setenv("FACEADV_DATA", "faces")
    monkeypatch.setenv("FACEADV_CACHE", "../cache")
    assert (paths.data_root(), paths.cache_root()) == (Path.cwd() / "faces", Path.cwd() / ".." / "cache")
    monkeypatch.setenv("FACEADV_DATA", "")
    assert paths.data_root() == paths.PROJECT / "data"
    assert (paths.PROJECT / "pyproject.toml").is_file()


def test_nobody_s_home(monkeypatch):
    """A user whom the system does not know, and no HOME."""
    for name in ("HOME", "XDG_CACHE_HOME", "FACEADV_CACHE", "FACEADV_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(Failed, match=r"^Your home folder, for the cache, is not known: set FACEADV_CACHE"):
        paths.cache_root()
    with pytest.raises(Invalid, match=r"^~/faces begins with ~, and your home folder is not known: write the whole"):
        paths.meant("~/faces")
    assert paths.data_root() == paths.PROJECT / "data"


def test_nearest():
    assert paths.nearest("dlbi", ["dlib", "mtcnn"]) == " (did you mean dlib?)"
    assert paths.nearest("xyz", ["dlib", "mtcnn"]) == ""
