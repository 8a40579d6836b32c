"""The diffusion prior: learns, and is saved in diffusers' own layout."""

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


def test_training_learns(chips):
    unet, log = train_prior.train(chips, SMALL | {"steps": 60, "lr": 2e-3})
    assert np.mean([row["loss"] for row in log[-10:]]) < 0.6 * np.mean([row["loss"] for row in log[:5]])
    assert not unet.training
    assert not any(p.requires_grad for p in unet.parameters())


def test_shipping(chips, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    whole, _ = train_prior.train(chips, SMALL | {"steps": 30, "lr": 2e-3}, out=tmp_path / "run")
    assert loop.ship("prior", "smoke", tmp_path / "run") == tmp_path / "prior" == weights.find("prior")
    assert weights.check_one("prior") == (True, "prior: SHA-256 as shipped")
    assert len(weights.shipped()["prior"]) == 4
    unet, schedule = prior.load()
    assert len(schedule.alphas_cumprod) == 1000
    x, t = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), 10
    torch.testing.assert_close(unet(x, t).sample, whole(x, t).sample, atol=0.02, rtol=0.02)  # the mean weights
    faces = ddnm.sample(unet, schedule, 2, steps=3)
    assert faces.shape == (2, 3, 16, 16)
    torch.testing.assert_close(ddnm.sample(unet, schedule, 1, steps=3, seed=1), faces[1:], atol=0.02, rtol=0)
    assert (tmp_path / "prior.png").stat().st_size > 1000
    assert [row["step"] for row in loop.read_log(tmp_path / "prior.log.jsonl")] == [30]
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name not in ("run", "prior")]


def test_a_prior_that_is_not_there(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="is no diffusion model here"):
            prior.load(str(place))
