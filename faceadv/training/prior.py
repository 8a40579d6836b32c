"""Train the face diffusion prior on LFW's training people: `faceadv train prior`.

Source: Ho, Jain and Abbeel 2020, Denoising diffusion probabilistic models, algorithm 1 and section 4.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.training_utils import EMAModel
from torchvision.utils import save_image

from faceadv import ddnm
from faceadv.networks import prior as network
from faceadv.precision import autocast
from faceadv.store import weights
from faceadv.store.paths import cache_root, replacing
from faceadv.training import loop

SETTINGS = {
    "smoke": {"side": 16, "widths": (16, 32), "steps": 6, "batch": 4},
    "lfw": {"side": 64, "widths": (64, 128, 192), "steps": 3000, "batch": 32},
    "paper": {"side": 112, "widths": (64, 128, 192, 256), "steps": 100_000, "batch": 64},
}
SETTINGS["orl"] = SETTINGS["smoke"]
DECAY = 0.999  # of the running mean of the weights, which is what ships
LOG = weights.SHIPPED / "prior.log.jsonl"
MEAN = 50  # steps a row of the shipped log


def train(chips, *, side, widths, steps, batch, out=None, resume=False, seed=0, device="cpu", every=100, lr=3e-4):
    """Train on chips (N, 3, 112, 112) uint8, in [-1, 1] at ``side``; returns ``(unet, log)``, the UNet of mean weights.

    The loss is the plain mean squared error of the noise, the 1000 steps of DDPM's linear schedule equally likely; half
    of the images are mirrored. out, resume, every: as for the other trainings here.
    """
    torch.manual_seed(seed)
    unet = network.build(side, widths).to(device, memory_format=torch.channels_last).train()
    mean = EMAModel(unet.parameters(), decay=DECAY)
    optimiser = torch.optim.AdamW(unet.parameters(), lr, weight_decay=0)
    schedule = DDPMScheduler()
    start, rows = 0, []
    state = loop.begin(out, resume)
    if state:
        unet.load_state_dict(state["unet"])
        mean.load_state_dict(state["mean"])
        optimiser.load_state_dict(state["optimiser"])
        start = state["step"]
    for step in loop.progress(start, steps):
        draw = loop.generator(seed, step)
        x = torch.from_numpy(chips[torch.randint(len(chips), (batch,), generator=draw).numpy()]).float().div_(127.5) - 1
        flip = torch.rand(batch, 1, 1, 1, generator=draw) < 0.5
        x = F.interpolate(torch.where(flip, x.flip(3), x), side, mode="bilinear", antialias=True, align_corners=False)
        noise = torch.randn(x.shape, generator=draw)
        t = torch.randint(1000, (batch,), generator=draw)
        noisy = schedule.add_noise(x, noise, t).to(device).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            guess = unet(noisy, t.to(device)).sample
        loss = F.mse_loss(guess.float(), noise.to(device))
        for group in optimiser.param_groups:
            group["lr"] = loop.one_cycle(step, steps, lr)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        mean.step(unet.parameters())
        rows.append({"step": step + 1, "loss": loss.item()})
        if out:
            loop.log(out / "log.jsonl", rows[-1])
            if (step + 1) % every == 0 or step + 1 == steps:
                state = {
                    "step": step + 1,
                    "unet": unet.state_dict(),
                    "mean": mean.state_dict(),
                    "optimiser": optimiser.state_dict(),
                }
                loop.save(out / "last.pt", state)
    mean.copy_to(unet.parameters())
    return unet.eval().requires_grad_(False), rows


def main(profile="lfw", resume=False, root=None, out=None, seed=0):
    """Train with the profile's size, checkpointing every 100 steps; returns the folder with the checkpoint and log."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = out or cache_root() / "train" / f"prior-{profile}"
    chips = np.array(loop.students(root).chips)
    train(chips, out=out, resume=resume, seed=seed, device=device, **SETTINGS[profile])
    return out


def save(folder, profile="lfw", out=None):
    """Write the mean weights of a run, finished or not, as a pipeline in diffusers' layout and float16."""
    out = out or cache_root() / "train" / f"prior-{profile}"
    state = loop.resume(out / "last.pt")
    unet = network.build(SETTINGS[profile]["side"], SETTINGS[profile]["widths"])
    mean = EMAModel(unet.parameters())
    mean.load_state_dict(state["mean"])
    mean.copy_to(unet.parameters())
    DDPMPipeline(unet.half(), DDPMScheduler()).save_pretrained(folder)


def ship(profile="lfw", out=None):
    """Write the shipped folder, log and samples from a finished run's checkpoint; returns the folder."""
    out = out or cache_root() / "train" / f"prior-{profile}"
    folder = weights.SHIPPED / "prior"
    with tempfile.TemporaryDirectory(dir=weights.SHIPPED) as part:
        save(part, profile, out)
        for path in sorted(Path(part).rglob("*.*")):
            place = folder / path.relative_to(part)
            with replacing(place) as new:
                shutil.copyfile(path, new)
    loop.write_log(weights.SHIPPED / LOG.name, loop.read_log(out / "log.jsonl", MEAN))
    weights.enter("prior", [path for path in sorted(folder.rglob("*")) if path.is_file()])
    with replacing(weights.SHIPPED / "prior.png") as part:
        save_image(ddnm.sample(*network.load(), 32), part, nrow=8, padding=1, format="png")
    return folder
