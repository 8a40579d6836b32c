"""Fixtures: real faces and a real network, loaded once."""

import os
from pathlib import Path

import pytest

os.environ["FACEADV_QUIET"] = "1"


@pytest.fixture(scope="session")
def orl():
    from faceadv import faces

    return faces.load("orl")


@pytest.fixture(scope="session")
def dlib():
    from faceadv import recognisers

    return recognisers.load("dlib")


@pytest.fixture
def killed_after(monkeypatch):
    """``killed_after(n)``: a training dies right after its n-th checkpoint; returns the list of the steps saved."""

    def arrange(count):
        from faceadv.training import loop

        saved, save = [], loop.save

        def killing(path, state):
            save(path, state)
            saved.append(state["step"])
            if len(saved) == count:
                raise KeyboardInterrupt

        monkeypatch.setattr(loop, "save", killing)
        return saved

    return arrange


@pytest.fixture(scope="session")
def lfw_root():
    from faceadv.store import datasets

    root = os.environ.get("FACEADV_DATA")
    if not root:
        pytest.skip("FACEADV_DATA is not set: no LFW")
    try:
        datasets.lfw_folder(root)
    except FileNotFoundError:
        pytest.skip("no LFW under FACEADV_DATA")
    return Path(root)
