"""The recipe of the face diffusion prior: `faceadv train prior`.

Source: Ho, Jain and Abbeel 2020, Denoising diffusion probabilistic models, algorithm 1 and section 4.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torchvision.utils import save_image

from faceadv import ddnm
from faceadv.networks import prior as network
from faceadv.store import weights
from faceadv.store.paths import replacing
from faceadv.training import loop

__all__ = ["SETTINGS", "photos", "train", "write"]

SETTINGS = {
    "lfw": {"side": 64, "widths": (64, 128, 192), "steps": 3000, "batch": 32, "lr": 3e-4},
    "paper": {"side": 112, "widths": (64, 128, 192, 256), "steps": 100_000, "batch": 64, "lr": 3e-4},
}
SETTINGS["smoke"] = SETTINGS["orl"] = SETTINGS["lfw"] | {"side": 16, "widths": (16, 32), "steps": 6, "batch": 4}
DECAY = 0.999  # of the running mean of the weights; the mean is what ships


def photos(
    profile: str = "lfw", root: loop.Place = None, seed: int = 0, device: loop.Device = "cpu"
) -> tuple[np.ndarray]:
    """What every profile learns from, the first argument of ``train``: the chips of LFW's training people.

    Parameters
    ----------
    profile : a key of ``SETTINGS``; all learn from the same
    root : folder with data sets; by default ``FACEADV_DATA``
    seed, device : not needed
    """
    return (np.asarray(loop.students(root).chips),)


def train(
    chips: np.ndarray,
    settings: dict,
    *,
    out: loop.Place = None,
    resume: bool = False,
    seed: int = 0,
    device: loop.Device = "cpu",
) -> tuple[UNet2DModel, list[dict]]:
    """Train a UNet to predict noise; returns ``(unet, log)``, the UNet with its mean weights, frozen.

    The network sees the chips in [-1, 1], half of them mirrored. The loss is the mean squared error of the noise; the
    1000 steps of DDPM's linear schedule are equally likely.

    Parameters
    ----------
    chips : (N, 3, 112, 112) uint8
    settings : "side" of the pictures, "widths", "steps", "batch", "lr" (the peak); what is missing is as in the profile
        lfw
    out, resume, seed, device : as for ``loop.train``, with its errors
    """
    settings = loop.complete(settings, SETTINGS)
    side, batch = settings["side"], settings["batch"]
    torch.manual_seed(seed)
    unet = network.build(side, tuple(settings["widths"])).to(device, memory_format=torch.channels_last).train()
    mean = EMAModel(unet.parameters(), decay=DECAY)
    optimiser = torch.optim.AdamW(unet.parameters(), settings["lr"], weight_decay=0)
    schedule = DDPMScheduler()

    def step(number, draw):
        rows = torch.randint(len(chips), (batch,), generator=draw)
        x = torch.from_numpy(chips[rows.numpy()]).float().div_(127.5) - 1
        flip = torch.rand(batch, 1, 1, 1, generator=draw) < 0.5
        x = F.interpolate(torch.where(flip, x.flip(3), x), side, mode="bilinear", antialias=True, align_corners=False)
        noise = torch.randn(x.shape, generator=draw)
        t = torch.randint(1000, (batch,), generator=draw)
        noisy = schedule.add_noise(x, noise, t).to(device)
        loss = F.mse_loss(ddnm.guess(unet, noisy, t.to(device), schedule), noise.to(device))
        loop.descend(optimiser, loss, list(unet.parameters()), 1.0)
        mean.step(unet.parameters())
        return {"loss": loss.item()}

    plan = loop.Plan("prior", settings, (chips,), {"unet": unet, "mean": mean}, {"unet": optimiser}, step)
    log = loop.train(plan, out, resume, seed, device)
    mean.copy_to(unet.parameters())
    return unet, log


def write(state: dict, root: loop.Place = None) -> Path:
    """Write the shipped folder, in diffusers' layout and float16, and a picture of samples; returns the folder.

    state: a checkpoint; root is not needed. Raises ``Invalid`` if float16 cannot hold the weights.
    """
    folder = weights.SHIPPED / "prior"
    unet = network.build(state["run"]["side"], tuple(state["run"]["widths"]))
    mean = EMAModel(unet.parameters())
    mean.load_state_dict(state["modules"]["mean"])
    mean.copy_to(unet.parameters())
    weights.half(unet.state_dict())  # raises the error
    DDPMPipeline(unet.half(), DDPMScheduler()).save_pretrained(folder)
    weights.enter("prior", [path for path in sorted(folder.rglob("*")) if path.is_file()])
    with replacing(weights.SHIPPED / "prior.png") as part:
        save_image(ddnm.sample(*network.load(), 32), part, nrow=8, padding=1, format="png")
    return folder
