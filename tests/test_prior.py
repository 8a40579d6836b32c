"""The diffusion prior: learns, and is saved in diffusers' own layout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from faceadv import ddnm
from faceadv.errors import Invalid, UserError
from faceadv.networks import prior
from faceadv.store import cache, weights
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


HUB = """
import torch
from faceadv.networks import prior
unet, schedule = prior.load("google/ddpm-celebahq-256")
print(unet.config.sample_size, len(schedule.alphas_cumprod), unet(torch.zeros(1, 3, 16, 16), 5).sample.sum().item())
"""


def as_of_2022(pipeline, hub):
    """Write a model into the hub's cache as google/ddpm-celebahq-256 lies there: all at its root, pickled weights."""
    home = hub / "models--google--ddpm-celebahq-256"
    old, new = home / "snapshots" / ("0" * 40), hub / "new"
    pipeline.save_pretrained(new, safe_serialization=False)
    old.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    for file in ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin",
                 "scheduler/scheduler_config.json"):  # fmt: skip
        shutil.copy(new / file, old)
    return old


@pytest.fixture
def of_2022(tmp_path):
    """The folder of a small one, and its UNet."""
    torch.manual_seed(0)
    unet = prior.build(16, (16, 32))
    return as_of_2022(DDPMPipeline(unet, DDPMScheduler()), tmp_path / "hub"), unet.eval()


def test_a_model_in_the_layout_of_2022_is_loaded_and_remembered(of_2022):
    folder, unet = of_2022
    x = torch.rand(1, 3, 16, 16)
    for _ in range(2):
        torch.testing.assert_close(prior.load(folder)[0](x, 5).sample, unet(x, 5).sample)
    path = folder / "diffusion_pytorch_model.bin"
    assert path.with_name(path.name + ".sha256").read_text().strip() == cache.sha256(path)
    state = torch.load(path, weights_only=True)
    torch.save({key: value + 1 for key, value in state.items()}, path)
    with pytest.raises(Invalid, match="is not the file"):
        prior.load(folder)


def test_a_pickle_that_runs_code_is_not_run(of_2022, tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = of_2022[0] / "diffusion_pytorch_model.bin"
    torch.save({"conv_in.weight": Code()}, path)
    with pytest.raises(UserError):
        prior.load(of_2022[0])
    assert not (tmp_path / "ran").exists()


def test_a_model_is_found_in_the_hubs_cache_without_a_network(of_2022, tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    side, steps, total = done.stdout.split()
    assert (side, steps) == ("16", "1000")
    assert float(total) == pytest.approx(of_2022[1](torch.zeros(1, 3, 16, 16), 5).sample.sum().item(), rel=1e-3)
