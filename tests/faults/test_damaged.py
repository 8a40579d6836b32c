"""Damaged files that no checksum protects, numbers that are none, and links: each is one sentence."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook, writes
from PIL import Image

from faceadv import pairs, recognisers
from faceadv.course import assignments, profiles, run
from faceadv.errors import Failed, Invalid
from faceadv.networks import dlib
from faceadv.store import datasets, weights
from faceadv.training import loop

LIST = "1\t1\nann\t1\t2\nann\t1\tbob\t1\n"


def said(caught):
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "\n", "x\n", "1\n", "0\t0\n", "1\t1\nann\t1\t2\n"),  # the last one was cut short
        *(LIST + "ann\t1\t2\n", LIST.replace("2", "two"), LIST.replace("bob\t1", "bob\tx"), "<html>\n<p>no</p>\n"),
        LIST.replace("ann\t1\t2", "ann\t1\udcff"),
    ],
)
def test_a_list_of_pairs_that_is_damaged_is_refused(text, tmp_path):
    """Also one that is only cut short, which would be another, easier protocol without a word."""
    files = [Path(f"{name}_{i:04d}.jpg") for name, i in (("ann", 1), ("ann", 2), ("bob", 1))]
    faces = SimpleNamespace(name="lfw", files=files)
    path = tmp_path / "pairs.txt"
    path.write_text(LIST)
    assert pairs._read_lfw(faces, path).same.tolist() == [True, False]
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(Invalid, match=r"pairs\.txt has") as caught:
        pairs._read_lfw(faces, path)
    said(caught)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", ".nan", "-.inf", float("nan"), [1.0, float("inf")]])
def test_a_parameter_that_is_no_number_is_refused(value, tmp_path, monkeypatch):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "orl.yaml").write_text("all: {}\n")
    cell = new_code_cell("lr: float = 0.1\nmany: list[float] = [1.0]", metadata={"tags": ["parameters"]})
    (tmp_path / "00_a.ipynb").write_text(writes(new_notebook(cells=[cell])))
    monkeypatch.setattr(profiles, "NOTEBOOKS", tmp_path)
    given = {"many" if isinstance(value, list) else "lr": value}
    with pytest.raises(Invalid, match=r"must be (a number of at least|of type float)") as caught:
        profiles.parameters("orl", tmp_path / "00_a.ipynb", given)
    said(caught)


@pytest.mark.parametrize("content", [b"abc\n", b"<html>\n", b"\xff\xfe\n", b"0" * 64, b"0" * 64 + b" x\n"])
def test_damaged_sums_of_what_ships(content, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    (tmp_path / "SHA256SUMS").write_bytes(content)
    with pytest.raises(Invalid, match="SHA256SUMS in models/ is damaged") as caught:
        weights.shipped()
    said(caught)


def test_a_damaged_note_beside_fetched_weights(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "net.pt")
    (tmp_path / "net.pt.sha256").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Invalid, match="delete it and fetch it again") as caught:
        weights.read_state(tmp_path / "net.pt")
    said(caught)


def test_dlibs_file_with_one_bit_changed(tmp_path, monkeypatch):
    whole = weights.find("dlib")
    content = bytearray(whole.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / whole.name).write_bytes(content)
    monkeypatch.setitem(weights.PACKAGED["dlib"], "package", "email")  # any that is there
    monkeypatch.setitem(weights.PACKAGED["dlib"], "folder", str(tmp_path))
    for use in (dlib.load, lambda: recognisers.load("dlib")):
        with pytest.raises(Invalid, match="SHA-256 differs"):
            use()
    assert not weights.check_one("dlib")[0]


@pytest.mark.parametrize("line", ["5", "[1]", "{}", '{"step": "two"}', "null"])
def test_rows_of_a_log_that_are_none(line, tmp_path):
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(Failed, match=r"log\.jsonl is damaged") as caught:
        loop.read_log(tmp_path / "log.jsonl")
    said(caught)


def test_a_checkpoint_of_another_version_of_the_network(tmp_path):
    def train(network, resume):
        optimisers = {"adam": torch.optim.Adam(network.parameters())}
        plan = loop.Plan("tiny", {"steps": 1, "lr": 0.1}, (), {"net": network}, optimisers, lambda *_: {"loss": 0.0})
        loop.train(plan, tmp_path, resume)

    train(torch.nn.Linear(2, 2), False)
    train(torch.nn.Linear(2, 2), True)
    for other in (torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.PReLU()):
        with pytest.raises(Failed, match="is of another version of tiny: train anew") as caught:
            train(other, True)
        said(caught)


def test_photos_that_are_pipes_or_broken_fail_the_check(tmp_path, monkeypatch):
    (tmp_path / "ann").mkdir()
    monkeypatch.setattr(datasets, "lfw_folder", lambda root: tmp_path)
    os.mkfifo(tmp_path / "ann" / "ann_0001.jpg")
    ok, told = datasets.check("lfw")[-1]
    assert not ok
    assert "ann_0001.jpg cannot be read" in told
    (tmp_path / "ann" / "ann_0001.jpg").unlink()
    Image.new("RGB", (9, 9)).save(tmp_path / "ann" / "ann_0001.png")
    content = (tmp_path / "ann" / "ann_0001.png").read_bytes()
    (tmp_path / "ann" / "ann_0001.png").write_bytes(content.replace(b"IDAT", b"\0\0\0\0"))
    assert not datasets.check("lfw")[-1][0]


def test_a_folder_of_results_whose_name_is_no_unicode(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "select", lambda names: [])
    with pytest.raises(Invalid, match="is no Unicode: name another") as caught:
        run.run("all", out=tmp_path / os.fsdecode(b"caf\xe9"))
    said(caught)
    assert list(tmp_path.iterdir()) == []


def test_a_submission_with_links_is_not_graded(tmp_path):
    """nbgrader copies what they lead to, our solutions say, to where code of the student can read it."""
    from test_students import RIGHT, hand_in

    hand_in(tmp_path, dict.fromkeys(("file", "folder", "pipe"), RIGHT))
    places = {name: tmp_path / "submitted" / name / "tiny" / "data.txt" for name in ("file", "folder", "pipe")}
    places["file"].symlink_to(tmp_path / "source" / "tiny" / "tiny.ipynb")
    places["folder"].symlink_to(tmp_path / "source" / "tiny")
    os.mkfifo(places["pipe"])
    errors = {row["student"]: row["error"] for row in assignments.grade(["tiny"], tmp_path)}
    assert errors == {name: f"{place} is a link, or a pipe: delete it." for name, place in places.items()}
    assert not (tmp_path / "autograded").exists()


def test_two_that_ship_at_once_lose_no_line(tmp_path, monkeypatch):
    """The second one reads the sums only when the first has written its own."""
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_text(name)
    real, held = weights.shipped, []

    def shipped():
        held.append(weights.cache.FileLock(tmp_path / "cache" / "locks" / "ship", is_singleton=True).is_locked)
        return real()

    monkeypatch.setattr(weights, "shipped", shipped)
    for name in ("a", "b"):
        weights.enter(name, [tmp_path / f"{name}.safetensors"])
    assert held == [True, True]
    assert sorted(real()) == ["a", "b"]
    assert json.dumps(real())
