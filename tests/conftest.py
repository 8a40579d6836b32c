"""Fixtures: real faces and a real network, loaded once."""

import importlib.util
import os
from pathlib import Path

import pytest

from faceadv.store import threads

os.environ["FACEADV_QUIET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: more threads would only be in each other's way
    os.environ["OMP_NUM_THREADS"] = "1"
threads.settle()  # before torch is imported


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
    """``killed_after(n)``: the next training dies while it writes the row of step n into its log."""

    def arrange(count):
        from faceadv.training import loop

        append = loop.append

        def killing(path, row):
            append(path, row)
            if row["step"] == count:
                path.write_text(path.read_text()[:-20])  # without the end of the row and its line break
                monkeypatch.setattr(loop, "append", append)
                raise KeyboardInterrupt

        monkeypatch.setattr(loop, "append", killing)

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


@pytest.fixture(scope="session")
def lfw(lfw_root):
    """LFW without its chips: aligning all of it takes ten minutes, and lists and splits need names only."""
    import numpy as np
    import torch

    from faceadv import faces
    from faceadv.store import datasets

    folder, files = datasets.photos("lfw", lfw_root)
    people = [file.split("/")[0] for file in files]
    place = {name: i for i, name in enumerate(dict.fromkeys(people))}
    nothing = np.zeros((len(files), 3, 1, 1), np.uint8)
    labels = torch.tensor([place[person] for person in people])
    return faces.FaceSet("lfw", nothing, labels, list(place), [folder / file for file in files], nothing, nothing, [])


@pytest.fixture(scope="session")
def script():
    """A function that imports a script of ``benchmarks/``, which is no package, by its name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
