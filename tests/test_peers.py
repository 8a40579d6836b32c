"""The comparison with other libraries runs, is of equals, and docs/measured.md shows its record."""

import pytest
import torch

from faceadv import ddnm, records
from faceadv.networks import prior
from faceadv.store.paths import PROJECT


@pytest.fixture(scope="module")
def peers(script):
    return script("peers")


@pytest.mark.filterwarnings("ignore")  # the peers'
def test_all_take_part_and_are_right_about_the_same_thing(peers, tmp_path):
    path = tmp_path / "peers.json"
    options = {"chips": 4, "steps": 3, "repeats": 2, "restored": 1, "sampling_steps": 2, "networks": ["dlib"]}
    record = peers.measure(path=path, **options)
    names = {entry["name"] for entry in record["numbers"]}
    for library in ("torchattacks", "foolbox", "ART"):
        name = f"PGD on dlib: {library}"
        assert {name, f"{name} / faceadv", f"{name} / faceadv, float32"} <= names
    assert all(entry["value"] > 0 for entry in records.read(path)["numbers"])
    assert "torchattacks" in peers.table(record)


def test_facenets_architecture_takes_part_without_its_weights(peers, monkeypatch):
    def absent(name):
        raise FileNotFoundError

    monkeypatch.setattr(peers.recognisers, "load", absent)
    model, x, labels = peers.classifier_and_chips("facenet-vggface2", 2)
    assert model(x).shape == (2, 40)
    assert labels.tolist() == model(x).argmax(1).tolist()


@pytest.mark.filterwarnings("ignore")
def test_the_peers_attack_is_ours(peers):
    model, x, labels = peers.classifier_and_chips("dlib", 4)
    made = {name: run() for name, run in peers.contestants(model, x, labels, 8 / 255, 2 / 255, 3).items()}
    for name in ("torchattacks", "foolbox", "ART"):
        # a slope of nearly 0 has either sign
        assert ((made[name] - made["faceadv, float32"]).abs() > 1e-4).float().mean() < 0.02, name


def test_the_plain_loop_is_ddnm(peers):
    unet, schedule = prior.load()
    y = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        plain = peers.plain_ddnm(y, ddnm.super_resolution(2), unet, schedule, 3)
        ours = ddnm.ddnm(y, ddnm.super_resolution(2), unet, schedule, steps=3)
    assert (plain - ours).abs().mean() < 0.02


def test_the_readme_shows_the_record(peers):
    table = peers.table(records.read(peers.RECORD))
    assert f"<!-- peers -->\n{table}<!-- /peers -->\n" in (PROJECT / "docs" / "measured.md").read_text(encoding="utf-8")
