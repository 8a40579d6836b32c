"""What an attack wants.

An objective is called with images (N, 3, H, W) and ``rows`` (N,), their positions in the batch it was made for, and
returns ``(loss, reached)``: a loss (N,) that the attack descends, differentiable in the images, and whether each
image already does what is wanted (N,) bool. With ``exact=True`` both are in float32, else in the fast precision of the
recogniser. Any function of this form is an objective. Its attribute ``fast``, True if there is none, says whether it
may compute in the fast precision at all; without it the gradient is in float32 too.
"""

import contextlib
import dis
import functools
import inspect
import math
import types
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from faceadv.errors import Invalid, number
from faceadv.images import believing, check_images
from faceadv.metrics import finite
from faceadv.precision import autocast, in_parts, together
from faceadv.recognisers import Recogniser

__all__ = ["Objective", "dodging", "ensemble", "impersonation", "success", "targeted", "untargeted"]

Objective = Callable[..., tuple[torch.Tensor, torch.Tensor]]
BATCH = 64  # images per forward pass where nothing else is asked for


def dodging(recogniser: Recogniser, references: torch.Tensor, threshold: float | None = None) -> Objective:
    """Push each image away from its reference: loss = -d², reached when d >= threshold.

    At d = 0 the gradient of d² is 0, so an image must not be its own reference (or the attack must start at random).

    Parameters
    ----------
    recogniser : the one that is attacked
    references : embeddings (N, D) of the photos with which the images would be matched, one row per image
    threshold : a distance, by default the recogniser's own

    Raises
    ------
    Invalid : for references that are no embeddings, and a threshold that is no number from 0 on; when called, for an
        image without a reference, and for losses that are not finite
    """
    return _verification(recogniser, references, threshold, away=True)


def impersonation(recogniser: Recogniser, references: torch.Tensor, threshold: float | None = None) -> Objective:
    """Pull each image towards its reference: loss = d², reached when d < threshold.

    Parameters
    ----------
    recogniser, references, threshold : as in ``dodging``, and the same errors
    """
    return _verification(recogniser, references, threshold, away=False)


def _verification(recogniser, references, threshold, away):
    if references.ndim != 2 or not references.is_floating_point():
        raise Invalid(f"references must be embeddings (N, D), not {tuple(references.shape)} of {references.dtype}.")
    references = _mover(references.detach().float())
    threshold = number("threshold", recogniser.threshold if threshold is None else threshold, 0)

    def objective(images, rows, exact=False):
        evaluating(recogniser)
        embeddings = recogniser.embed(images, fast=not exact)
        wanted = _rows(references(embeddings.device), rows, "references")
        # squared: smooth where d = 0, and the same direction for signed steps, because d grows with its square
        squared = (embeddings - wanted).square().sum(1)
        if away:
            return -squared, squared.detach() >= threshold**2
        return squared, squared.detach() < threshold**2

    objective.fast = getattr(recogniser, "precision", "auto") == "auto"
    return objective


def ensemble(objectives: Sequence[Objective], weights: Sequence[float] | None = None) -> Objective:
    """Several objectives at once: the weighted mean of their losses, reached where all of them are.

    What fools two networks at once more often fools a third. Where losses have different units, weights make them
    comparable: 1 / threshold² for the squared distances of ``dodging`` and ``impersonation``.
    Source: Liu et al. 2017 (the idea); Dong et al. 2018, section 3.4 (averaging losses is one of its three ways).

    Parameters
    ----------
    objectives : at least one; all for the same images
    weights : as many, positive; by default equal

    Raises
    ------
    Invalid : without objectives, and for other weights
    """
    objectives, weights = list(objectives), [1.0] * len(objectives) if weights is None else [float(w) for w in weights]
    if not objectives or len(weights) != len(objectives) or not all(0 < w < math.inf for w in weights):
        raise Invalid(f"An ensemble needs one positive weight for each objective, not {weights} for {len(objectives)}.")

    def objective(images, rows, exact=False):
        given = [answer(one(images, rows, exact=exact), len(images)) for one in objectives]
        losses = [weight * loss.float() for weight, (loss, _) in zip(weights, given)]
        return sum(losses) / sum(weights), torch.stack([reached for _, reached in given]).all(0)

    objective.fast = all(getattr(one, "fast", True) for one in objectives)
    return objective


def targeted(classifier: Callable, labels: torch.Tensor, fast: bool = True) -> Objective:
    """Make ``classifier`` say the target labels: loss = cross-entropy to them, reached when argmax = target.

    Parameters
    ----------
    classifier : from images to logits (N, people)
    labels : the targets (N,) of any integer type
    fast : loss and gradient in bfloat16 where the hardware has it

    Raises
    ------
    Invalid : for other labels and for a classifier in training mode; when called, for an image without a label too
    """
    return _classification(classifier, labels, fast, towards=True)


def untargeted(classifier: Callable, labels: torch.Tensor, fast: bool = True) -> Objective:
    """Make ``classifier`` miss the true labels: loss = -cross-entropy, reached when argmax differs.

    Parameters
    ----------
    classifier, fast : as in ``targeted``, and the same errors
    labels : the true labels (N,) of any integer type
    """
    return _classification(classifier, labels, fast, towards=False)


def _classification(classifier, labels, fast, towards):
    evaluating(classifier)
    labels = _mover(integers(labels))

    def objective(images, rows, exact=False):
        evaluating(classifier)
        with autocast(images.device, fast and not exact):
            logits = classifier(images.float()).float()
        wanted = _rows(labels(logits.device), rows, "labels")
        loss = F.cross_entropy(logits, wanted, reduction="none")
        said = logits.detach().argmax(1)
        return (loss, said == wanted) if towards else (-loss, said != wanted)

    objective.fast = fast
    return objective


def _mover(values):
    """A function that gives the values on a device, moved once and not at each step of an attack."""
    return functools.cache(values.to)


def _rows(values, rows, what):
    """The references or labels of the images at ``rows``, which must not be more than there are."""
    if not believing() and len(rows) and rows.max() >= len(values):
        raise Invalid(f"Each image needs one of the {what}, and there are only {len(values)} {what}.")
    return values[rows]


@torch.no_grad()
def success(objective: Objective, images: torch.Tensor) -> torch.Tensor:
    """Whether each image (N, 3, H, W) reaches the objective, in float32: (N,) bool, on the CPU."""
    images, rows = enter(images), torch.arange(len(images))
    evaluating(objective)

    def hit(part):
        return answer(objective(images[part], part, exact=True), len(part))[1].cpu()

    with autocast(images.device, fast=False):
        return torch.cat([torch.zeros(0, dtype=torch.bool), *in_parts(hit, rows, together(BATCH, images.device))])


def answer(given: tuple, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What an objective has given for ``count`` images. ``Invalid`` unless it is two tensors (count,).

    Losses that are not finite are refused too: what is reached could not be told then.
    """
    shapes = [getattr(part, "shape", None) for part in given] if isinstance(given, tuple) else []
    if shapes != [(count,)] * 2 or not all(isinstance(part, torch.Tensor) for part in given):
        raise Invalid("An objective must return (loss, reached), two tensors with one number for each image.")
    if not believing():
        finite(given[0], "losses")
    return given


def slope(loss: torch.Tensor, x: torch.Tensor, exact: bool) -> torch.Tensor:
    """The gradient of the sum of the losses in x, in the shape of x.

    Parameters
    ----------
    loss : of any shape
    x : what it was computed from
    exact : without TensorFloat-32, which the context of the loss keeps out of the forward pass alone
    """
    with autocast(x.device, fast=False) if exact else contextlib.nullcontext():
        return torch.autograd.grad(loss.sum(), x)[0]


def enter(images: torch.Tensor) -> torch.Tensor:
    """Images as attacks compute with them: detached, in float32. Raises ``Invalid`` for what ``check_images`` does."""
    check_images(images)
    return images.detach().float()


def integers(labels: torch.Tensor) -> torch.Tensor:
    """Labels (N,) of any integer type as int64. Raises ``Invalid`` for others and for negative ones."""
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or labels.dtype == torch.bool or labels.is_floating_point() or (labels.long() < 0).any():
        raise Invalid(f"labels must be whole numbers (N,) from 0 on, not {tuple(labels.shape)} of {labels.dtype}.")
    return labels.long()


def evaluating(*chain) -> None:
    """Raise ``Invalid`` if a module in the chain is in training mode, where an attack would change it.

    The chain is looked for in closures, defaults, methods, in what callable objects hold, and in the modules and the
    notebook's functions that a function finds by a global name.
    """
    todo, seen = [] if believing() else list(chain), {}
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing  # kept, because the id of what is gone is given to another
        if isinstance(thing, nn.Module):
            for module in thing.modules():
                if module.training:
                    name = type(module).__name__
                    raise Invalid(f"A {name} is in training mode, where an attack would change it: call .eval() first.")
                todo += [value for name, value in vars(module).items() if name[0] != "_"]
        elif isinstance(thing, (list, tuple, dict)):
            todo += thing.values() if isinstance(thing, dict) else thing
        elif inspect.isfunction(thing):
            todo += [thing.__defaults__, thing.__kwdefaults__]
            todo += [cell.cell_contents for cell in thing.__closure__ or () if cell != types.CellType()]
            loaded = {step.argval for step in dis.get_instructions(thing) if step.opname == "LOAD_GLOBAL"}
            known = [thing.__globals__.get(name) for name in loaded]
            todo += [k for k in known if isinstance(k, nn.Module) or getattr(k, "__module__", "") == "__main__"]
        elif callable(thing) or hasattr(thing, "embed"):
            names = ("__self__", "__func__", "func", "args", "keywords", "__dict__")
            todo += [getattr(thing, name, None) for name in names]
