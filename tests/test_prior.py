"""The diffusion prior: learns, survives a kill, and is saved in diffusers' own layout."""

import numpy as np
import pytest
import torch

from faceadv import ddnm
from faceadv.networks import prior
from faceadv.store import weights
from faceadv.training import loop
from faceadv.training import prior as train_prior

SMALL = {"side": 16, "widths": (16, 32), "batch": 8}


@pytest.fixture(scope="module")
def chips(orl):
    return np.array(orl.chips[:40])


def test_training_learns_resumes_and_saves(chips, tmp_path, monkeypatch, killed_after):
    def run(out, **more):
        return train_prior.train(chips, steps=60, out=out, every=20, lr=2e-3, **SMALL, **more)

    whole, log = run(tmp_path / "whole")
    assert np.mean([row["loss"] for row in log[-10:]]) < 0.6 * np.mean([row["loss"] for row in log[:5]])
    saved = killed_after(1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    resumed, _ = run(tmp_path / "cut", resume=True)
    assert saved == [20, 40, 60]
    assert all(torch.equal(v, resumed.state_dict()[key]) for key, v in whole.state_dict().items())
    assert (tmp_path / "cut" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    assert not any(p.requires_grad for p in whole.parameters())

    monkeypatch.setitem(train_prior.SETTINGS, "smoke", SMALL | {"steps": 60})
    train_prior.save(tmp_path / "pipeline", "smoke", tmp_path / "whole")
    unet, schedule = prior.load(str(tmp_path / "pipeline"))
    assert len(schedule.alphas_cumprod) == 1000
    assert all(torch.allclose(v, unet.state_dict()[key], atol=1e-3) for key, v in whole.state_dict().items())
    x, t = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), 10
    torch.testing.assert_close(unet(x, t).sample, whole(x, t).sample, atol=0.02, rtol=0.02)


def test_shipping(chips, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    monkeypatch.setattr(train_prior, "LOG", tmp_path / "prior.log.jsonl")
    monkeypatch.setitem(train_prior.SETTINGS, "smoke", SMALL | {"steps": 2})
    train_prior.train(chips, steps=2, out=tmp_path / "run", **SMALL)
    assert train_prior.ship("smoke", tmp_path / "run") == tmp_path / "prior" == weights.find("prior")
    assert weights.check_one("prior") == (True, "prior: SHA-256 as shipped")
    assert len(weights.shipped()["prior"]) == 4
    unet, schedule = prior.load()
    faces = ddnm.sample(unet, schedule, 2, steps=3)
    assert faces.shape == (2, 3, 16, 16)
    torch.testing.assert_close(ddnm.sample(unet, schedule, 1, steps=3, seed=1), faces[1:], atol=0.02, rtol=0)
    assert (tmp_path / "prior.png").stat().st_size > 1000
    assert [row["step"] for row in loop.read_log(tmp_path / "prior.log.jsonl")] == [2]
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name not in ("run", "prior")]


def test_a_prior_that_is_not_there(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="is no diffusion model here"):
            prior.load(str(place))
