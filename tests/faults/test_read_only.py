"""Folders that can only be read are enough for whoever finds everything there."""

import os
from pathlib import Path

import pytest

from faceadv.store import cache, datasets, weights


@pytest.fixture
def frozen(monkeypatch):
    """Nothing can be written any more. (Rights alone do not stop root.)"""

    def freeze():
        def refused(path, *args, **kwargs):
            raise OSError(30, os.strerror(30), str(path))

        for name in ("mkdir", "write_text", "touch"):
            monkeypatch.setattr(Path, name, refused)
        monkeypatch.setattr(cache.FileLock, "acquire", lambda lock, *args, **kwargs: refused(lock.lock_file))

    return freeze


def test_weights_that_are_there_are_fetched_without_a_lock(tmp_path, monkeypatch, frozen):
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path))
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / weights.DOWNLOADS["facenet-casia"]["file"]
    path.write_bytes(b"there")
    frozen()
    assert weights.fetch("facenet-casia") == path
    with pytest.raises(RuntimeError, match=f"cache under {tmp_path} cannot be written"):
        weights.fetch("vgg-face")
    assert list(tmp_path.iterdir()) == [tmp_path / "weights"]


def test_a_data_set_that_is_there_is_fetched_without_a_lock(tmp_path, monkeypatch, frozen):
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "lfw" / "lfw_funneled"
    (folder / datasets.SOMEBODY).mkdir(parents=True)
    lists = [tmp_path / "lfw" / file for file, *_ in datasets.SOURCES["lfw"]["lists"]]
    for file in lists:
        file.write_text("pairs")
    frozen()
    assert datasets.fetch("lfw", tmp_path) == folder
    lists[0].unlink()
    with pytest.raises(RuntimeError, match="cannot be written"):
        datasets.fetch("lfw", tmp_path)
    assert not (tmp_path / "cache").exists()
