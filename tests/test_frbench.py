"""A network of the package frbench, from files that the test writes as frbench's release has them."""

import json

import frbench
import pytest
import torch
import yaml
from frbench.backbones import build_backbone

from faceadv import attacks, errors, metrics, objectives, recognisers
from faceadv.benchmark import cell, grid

NAME = "frbench:mobilenet-wd4_arcface_ms1m"


@pytest.fixture
def released(tmp_path, monkeypatch):
    """frbench's cache with one network of random weights, and its backbone."""
    monkeypatch.setenv("FRBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("FRBENCH_CONFIG", str(tmp_path / "config.json"))
    monkeypatch.setattr("frbench.utils.download._http_download", offline)
    key, options = NAME.removeprefix("frbench:"), {"num_features": 64}
    torch.manual_seed(0)
    backbone = build_backbone("mobilenet-wd4", options, torch.device("cpu")).eval()
    (tmp_path / key).mkdir()
    torch.save(backbone.state_dict(), tmp_path / key / "weight.pt")
    config = {
        "backbone": {"name": "mobilenet-wd4", "kwargs": options},
        "input": {"channel": "bgr", "mean": [0.4, 0.5, 0.6]},
    }
    (tmp_path / key / "config.yaml").write_text(yaml.safe_dump(config))
    names = [key, "retinaface_mobilenetv1"]
    entries = {
        n: {"asset_name": f"{n}.tar.gz", "target_name": n, "contents": {"weight": "weight.pt", "config": "config.yaml"}}
        for n in names
    }
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    return tmp_path / key / "weight.pt", backbone


def offline(url, *_, **__):
    raise frbench.FRBenchDownloadError("no network here")


def test_embeddings_are_those_of_frbench(released, orl):
    _, chips = released, orl.images[:3]
    recogniser = recognisers.load(NAME)
    places, mean = recogniser.network.places.expand(3, -1, -1, -1), torch.tensor([0.6, 0.5, 0.4]).reshape(3, 1, 1)
    warped = mean + torch.nn.functional.grid_sample(chips - mean, places, align_corners=False)  # the mean around it
    key = NAME.removeprefix("frbench:").split("_")
    with frbench.configure_scoped(update_check=False):
        theirs = frbench.FR(*key)(255 * warped, need_crop=False, tta=(), l2_normalize=True).embeddings
    torch.testing.assert_close(recogniser.embed(chips), theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(recogniser.embed(chips[1:2]), theirs[1:2], atol=1e-5, rtol=1e-4)


def test_its_landmarks_lie_where_frbench_has_them(released):
    """The warp is that of ``mobilefacenet``, which has the same template."""
    ours, other = (recognisers.load(name).network.places for name in (NAME, "mobilefacenet"))
    torch.testing.assert_close(ours, other, atol=1e-6, rtol=0)


def test_it_can_be_attacked(released, orl):
    recogniser = recognisers.load(NAME)
    before = recognisers.fingerprint(recogniser)
    embeddings = recognisers.embed_faces(recogniser, orl)
    assert embeddings.shape == (400, 64)
    x = orl.images[:4]
    objective = objectives.dodging(recogniser, embeddings[1:5])
    y = attacks.pgd(x, objective, eps=8 / 255, steps=3)
    far = recogniser.distance(recogniser.embed(y), embeddings[1:5])
    assert (far > recogniser.distance(recogniser.embed(x), embeddings[1:5])).all()
    assert metrics.linf(x, y).max() <= 8 / 255 + 1e-6
    assert recognisers.fingerprint(recogniser) == before


def test_the_benchmark_takes_it(released):
    assert grid.present(["dlib", NAME]) == ["dlib", NAME]
    known = cell.Cell("PGD", "none", NAME, "dodging", source="dlib")
    cell.check(known)
    settings = cell.Settings(pair_count=2, seeds=(0,), steps=2)
    before, row = cell.version(known, settings), cell.measure(known, settings, 0)
    assert row["recogniser"] == NAME
    path, _ = released
    path.write_bytes(path.read_bytes() + b"more")
    assert cell.version(known, settings) != before


def test_weights_that_have_changed_are_refused(released):
    path, _ = released
    recognisers.load(NAME)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(errors.Invalid, match="SHA-256 differs"):
        recognisers.load(NAME)


def test_what_it_cannot_have_is_one_sentence(released, monkeypatch):
    path, _ = released
    with pytest.raises(errors.UserError, match=r"could not be downloaded|There is no recogniser"):
        recognisers.load("frbench:irse-5000_arcface_ms1m")
    path.unlink()
    with pytest.raises(errors.Failed, match=r"could not be downloaded: .*no network here"):
        recognisers.load(NAME)
    monkeypatch.setitem(__import__("sys").modules, "frbench", None)
    with pytest.raises(errors.Missing, match="pip install"):
        recognisers.load(NAME)
