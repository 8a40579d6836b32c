"""What an attack wants.

An objective is called with images (N, 3, H, W) and ``rows`` (N,), their positions in the batch it was made for, and
returns ``(loss, reached)``: a loss (N,) that the attack descends, differentiable in the images, and whether each
image already does what is wanted (N,) bool. With ``exact=True`` both are in float32, else in the fast precision of the
recogniser. Any function of this form is an objective.
"""

import torch
import torch.nn.functional as F

from faceadv.errors import Invalid
from faceadv.precision import autocast


def dodging(recogniser, references, threshold=None):
    """Push each image away from its reference: loss = -d², reached when d >= threshold.

    references: embeddings (N, D) of the photos the images would be matched with; threshold: ``recogniser.threshold``
    by default. At d = 0 the gradient of d² is 0, so an image must not be its own reference (or start at random).
    """
    return _verification(recogniser, references, threshold, away=True)


def impersonation(recogniser, references, threshold=None):
    """Pull each image towards its reference: loss = d², reached when d < threshold. Arguments as in ``dodging``."""
    return _verification(recogniser, references, threshold, away=False)


def _verification(recogniser, references, threshold, away):
    if references.ndim != 2:
        raise Invalid(f"references must be embeddings (N, D), not {tuple(references.shape)}.")
    references = references.detach()
    threshold = recogniser.threshold if threshold is None else threshold

    def objective(images, rows, exact=False):
        embeddings = recogniser.embed(images, fast=not exact)
        # squared: smooth where d = 0, and the same direction for signed steps (facts: s(d) is monotone in d)
        squared = (embeddings - references[rows].to(embeddings)).square().sum(1)
        if away:
            return -squared, squared.detach() >= threshold**2
        return squared, squared.detach() < threshold**2

    return objective


def targeted(classifier, labels, fast=True):
    """Make ``classifier`` say the target ``labels`` (N,): loss = cross-entropy to them, reached at argmax = target.

    fast: gradients in bfloat16 where the hardware has it. Raises ``ValueError`` for a classifier in training mode.
    """
    return _classification(classifier, labels, fast, towards=True)


def untargeted(classifier, labels, fast=True):
    """Make ``classifier`` miss the true ``labels`` (N,): loss = -cross-entropy, reached when argmax differs.

    Options and errors as in ``targeted``.
    """
    return _classification(classifier, labels, fast, towards=False)


def _classification(classifier, labels, fast, towards):
    if getattr(classifier, "training", False):
        raise Invalid("The classifier is in training mode, where an attack would change it: call .eval() first.")

    def objective(images, rows, exact=False):
        with autocast(images.device, fast and not exact):
            logits = classifier(images).float()
        wanted = labels[rows].to(logits.device)
        loss = F.cross_entropy(logits, wanted, reduction="none")
        said = logits.detach().argmax(1)
        return (loss, said == wanted) if towards else (-loss, said != wanted)

    return objective


@torch.no_grad()
def success(objective, images, batch=64):
    """Whether each image (N, 3, H, W) reaches the objective, in float32: (N,) bool."""
    rows = torch.arange(len(images))
    return torch.cat([objective(images[i], i, exact=True)[1].cpu() for i in rows.split(batch)])
