"""Attacks that know the purifier: gradients through it, averaged over its randomness.

Source: Athalye, Carlini and Wagner 2018, Obfuscated gradients give a false sense of security, section 4.
"""

from types import SimpleNamespace

import torch

from faceadv.precision import autocast


def through(purifier, objective, samples=1):
    """The objective as it is behind a purifier: its loss is the mean over ``samples`` purifications of the images.

    purifier: a differentiable module from images to images; with one that draws random numbers and samples > 1 this is
    EOT. An image counts as reached if more than half of its purifications reach the objective.
    """

    def behind(images, rows, exact=False):
        losses, hits = 0.0, 0.0
        for _ in range(samples):
            with autocast(images.device, not exact):
                purified = purifier(images).float()
            loss, reached = objective(purified, rows, exact)
            losses, hits = losses + loss / samples, hits + reached.float() / samples
        return losses, hits > 0.5

    return behind


def straight_through(purifier, stand_in=None):
    """BPDA: the purifier forwards, a differentiable stand-in backwards, by default the identity.

    Source: the same, section 4.1.
    """

    def behind(images):
        with torch.no_grad():
            clean = purifier(images)
        near = images if stand_in is None else stand_in(images)
        return near + (clean - near).detach()

    return behind


def purified(recogniser, purifier):
    """A recogniser behind a differentiable purifier: an extractor for cloaks, with the gradient through both."""

    def embed(images, fast=False):
        with autocast(images.device, fast):
            clean = purifier(images).float()
        return recogniser.embed(clean, fast=fast)

    return SimpleNamespace(name=f"{recogniser.name} behind a purifier", embed=embed)
