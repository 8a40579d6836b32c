"""Purifiers: chips in, chips out, with an adversarial perturbation made smaller. ``load(name)`` gives a module."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from faceadv import images as image_ops
from faceadv.images import check_images
from faceadv.paths import nearest


class Jpeg(nn.Module):
    """JPEG at ``quality`` (1 to 95). Its rounding has no gradient: images come back detached."""

    def __init__(self, quality=75):
        super().__init__()
        self.quality = quality

    def forward(self, images):
        check_images(images)
        return image_ops.jpeg(images.detach(), self.quality)


class Randomization(nn.Module):
    """Resize to a random side by nearest neighbour, pad with zeros at a random place; differentiable.

    The published sizes, 299 to a side in [310, 331) padded to 331, are scaled to the chip's: 112 to [116, 124) and
    124. The result is resized to the chip's own side again (bilinear), since some networks take no other. Each image
    draws its own numbers; ``seed`` fixes the series, and each call goes on in it.
    Source: Xie et al. 2018, Mitigating adversarial effects through randomization, section 3.
    """

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, images):
        check_images(images)
        side = images.shape[-1]
        low, high = round(side * 310 / 299), round(side * 331 / 299)
        padded = []
        for image in images:
            new = torch.randint(low, high, (1,), generator=self.generator).item()
            left, top = torch.randint(high - new + 1, (2,), generator=self.generator).tolist()
            resized = F.interpolate(image[None], (new, new), mode="nearest")
            padded.append(F.pad(resized, (left, high - new - left, top, high - new - top)))
        return F.interpolate(torch.cat(padded), (side, side), mode="bilinear", align_corners=False)


def _resgn():
    from faceadv import resgn

    return resgn.load()


def _puface():
    from faceadv import puface

    return puface.load()


def _two_stage(stages="both", prior="shipped", **options):
    from faceadv import ddnm

    return ddnm.TwoStage(*ddnm.load_prior(prior), stages=stages, **options)


def _diffpure(prior="shipped", **options):
    from faceadv import ddnm

    return ddnm.DiffPure(*ddnm.load_prior(prior), **options)


PURIFIERS = {
    "jpeg": Jpeg,
    "randomization": Randomization,
    "resgn": _resgn,
    "puface": _puface,
    "two-stage": _two_stage,
    "super-resolution": functools.partial(_two_stage, "super-resolution"),
    "colourisation": functools.partial(_two_stage, "colourisation"),
    "diffpure": _diffpure,
}


def load(name, device="cpu", **options):
    """A purifier by name: a module from images (N, 3, H, W) in [0, 1] to the same, frozen, in evaluation mode.

    Options go to the purifier: ``load("jpeg", quality=50)``. Raises ``ValueError`` for an unknown name.
    """
    if name not in PURIFIERS:
        known = ", ".join(PURIFIERS)
        raise ValueError(f'There is no purifier "{name}"{nearest(name, PURIFIERS)}; there are {known}.')
    return PURIFIERS[name](**options).to(device).eval().requires_grad_(False)
