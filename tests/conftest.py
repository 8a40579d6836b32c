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


@pytest.fixture(scope="session")
def lfw_root():
    from faceadv import fetch

    root = os.environ.get("FACEADV_DATA")
    if not root:
        pytest.skip("FACEADV_DATA is not set: no LFW")
    try:
        fetch.lfw_folder(root)
    except FileNotFoundError:
        pytest.skip("no LFW under FACEADV_DATA")
    return Path(root)
