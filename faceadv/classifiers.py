"""Closed-set classifiers: chips in, one logit per person out. P-FGVM's Model A and Model B.

Source: Chatzikyriakidis, Papaioannidis and Pitas 2019 (P-FGVM), slide "Experiments - Models".
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceadv.errors import Invalid, whole
from faceadv.metrics import finite
from faceadv.networks.common import checked, generator
from faceadv.objectives import BATCH, enter, evaluating, integers
from faceadv.precision import autocast, in_parts, together
from faceadv.store import progress

__all__ = ["ModelA", "ModelB", "fit", "linear_head", "logits", "model_a", "model_b", "targets"]

L2 = 1e-3  # Keras' L2Regularizer: weight times the sum of squares, without a half
RATE, SMALL = 1e-3, 32  # learning rate and batch of the training


class ModelA(nn.Module):
    """Two convolutions and two fully connected layers: chips (N, 3, size, size) in [0, 1] to logits (N, people).

    Raises ``Invalid`` for other images.
    """

    def __init__(self, people: int, size: int = 112):
        super().__init__()
        self.size = size
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 32, 5, padding=2), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2, 2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2, 2)),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(64 * (size // 4) ** 2, 512)
        # Keras' Dropout(0.9) drops 90 %, as torch's does
        self.head = nn.Sequential(nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.9), nn.Linear(512, people))
        self.regularised = [self.features[0].weight, self.features[4].weight, self.hidden.weight]
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        images = checked(images)
        if images.shape[2:] != (self.size, self.size):
            raise Invalid(f"This Model A is for chips of {self.size} x {self.size}, not {tuple(images.shape[2:])}.")
        return self.head(self.hidden(self.features(images)))


class ModelB(nn.Module):
    """A frozen face network and a head of FC256, batch norm, ReLU, FC: chips (N, 3, H, W) to logits (N, people).

    Raises ``Invalid`` for images outside [0, 1].

    Parameters
    ----------
    people : number of logits
    backbone : any module from chips to features. Give a recogniser's ``network``: the recogniser itself computes in
        float32 where an attack asks for bfloat16, in twice the time
    dimension : numbers in a feature
    """

    def __init__(self, people: int, backbone: nn.Module, dimension: int):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.hidden = nn.Linear(dimension, 256)
        self.head = nn.Sequential(nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, people))
        self.regularised = [self.hidden.weight]

    def train(self, mode: bool = True) -> "ModelB":
        """Training mode for the head alone."""
        super().train(mode)
        self.backbone.eval()  # its batch norm is frozen too
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.backbone(checked(images)))

    def classify(self, features: Tensor) -> Tensor:
        """Logits from the backbone's features (N, D), which are computed once for training."""
        return self.head(self.hidden(features))


def fit(
    model: nn.Module, inputs: Tensor, labels: Tensor, epochs: int, forward: Callable | None = None, seed: int = 0
) -> list[float]:
    """Train a classifier with Adam on cross-entropy + L2 over its ``regularised`` weights; returns the loss by epoch.

    A last batch of one input is left out, because batch normalisation needs two. The model is left in evaluation mode,
    frozen.

    Parameters
    ----------
    model : it is changed
    inputs : chips (N, 3, H, W) in [0, 1], or whatever ``forward`` takes
    labels : (N,) of any integer type
    epochs : how often each input is seen
    forward : the function that is trained, by default the model itself; ``model.classify`` for a backbone's features
    seed : of the order of the inputs; dropout draws from torch's own generator

    Raises
    ------
    Invalid : for fewer than two inputs, other labels or options
    """
    labels, draw = integers(labels).to(inputs.device), generator(seed)
    if len(inputs) < 2 or len(labels) != len(inputs):
        raise Invalid(f"Training needs two inputs or more, with a label each: {len(inputs)} and {len(labels)} came.")
    optimiser, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], RATE), []
    model.train()
    for _ in progress.bar(range(whole("epochs", epochs, 0)), desc="training"):
        total = 0.0
        for rows in torch.randperm(len(inputs), generator=draw).split(SMALL):
            if len(rows) == 1:
                continue
            loss = F.cross_entropy((forward or model)(inputs[rows]), labels[rows])
            loss = loss + L2 * sum(weight.square().sum() for weight in model.regularised)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(rows)
        losses.append(total / len(inputs))
    model.eval().requires_grad_(False)
    return losses


def model_a(images: Tensor, labels: Tensor, people: int, epochs: int = 12, seed: int = 0) -> tuple[ModelA, list[float]]:
    """A trained Model A: ``(model, losses)``; the same seed gives the same model on one machine.

    Parameters
    ----------
    images, labels : chips (N, 3, S, S) in [0, 1] and labels (N,) to learn from
    people : number of logits, one more than the largest label
    epochs, seed : of the training, as in ``fit``; torch's global seed is set too
    """
    images = checked(images)
    torch.manual_seed(whole("seed", seed, 0))
    model = ModelA(people, images.shape[-1]).to(images.device)
    return model, fit(model, images, labels, epochs, seed=seed)


def model_b(
    images: Tensor, labels: Tensor, people: int, backbone: nn.Module, epochs: int = 60, seed: int = 0
) -> tuple[ModelB, list[float]]:
    """A trained Model B: ``(model, losses)``. The features of the frozen backbone are computed once.

    Parameters
    ----------
    images, labels, people, epochs, seed : as in ``model_a``, of chips (N, 3, H, W)
    backbone : as in ``ModelB``
    """
    images = checked(images)
    torch.manual_seed(whole("seed", seed, 0))
    backbone.eval()
    with torch.no_grad():
        features = torch.cat([backbone(batch).float() for batch in images.split(SMALL)])
    model = ModelB(people, backbone, features.shape[1]).to(images.device)
    return model, fit(model, features, labels, epochs, forward=model.classify, seed=seed)


def linear_head(features: Tensor, labels: Tensor, scaled: bool = False, C: float = 1.0) -> nn.Linear:
    """A linear layer from features to logits (N, K): multinomial logistic regression. Deterministic, and frozen.

    Parameters
    ----------
    features : (N, D) on any device, where the layer will be too
    labels : (N,), 0 to K - 1, each at least once
    scaled : learn on standardised features, with the scaling folded into the layer
    C : inverse strength of the L2 penalty, as in scikit-learn

    Raises
    ------
    Invalid : for other labels, and for features that are not finite
    """
    from sklearn.linear_model import LogisticRegression  # take seconds
    from sklearn.preprocessing import StandardScaler

    x, names = finite(features, "features").detach().cpu().numpy(), labels.cpu().numpy()
    scaler = StandardScaler(with_mean=scaled, with_std=scaled).fit(x)
    found = LogisticRegression(C=C, solver="newton-cg").fit(scaler.transform(x), names)
    if found.classes_.tolist() != list(range(len(found.classes_))):
        raise Invalid(f"labels must be 0 to K - 1, each at least once, not {found.classes_.tolist()}.")
    weight, bias = torch.from_numpy(found.coef_), torch.from_numpy(found.intercept_)
    if scaled:
        weight = weight / torch.from_numpy(scaler.scale_)
        bias = bias - weight @ torch.from_numpy(scaler.mean_)
    if len(weight) == 1:  # two people: scikit-learn keeps the second one's alone
        weight, bias = torch.cat([0 * weight, weight]), torch.cat([0 * bias, bias])
    layer = nn.Linear(*weight.T.shape).requires_grad_(False).eval()
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer.to(features.device)


@torch.no_grad()
def logits(model: Callable, images: Tensor) -> Tensor:
    """Logits (N, people) of chips (N, 3, H, W), float32 on the CPU, without gradients.

    Raises ``Invalid`` for other images, for a model in training mode, and for logits that are not finite.
    """
    evaluating(model)
    with autocast(images.device, fast=False):
        images = enter(images)
        if not len(images):
            return model(images).float().cpu()
        rows = torch.arange(len(images), device=images.device)
        found = in_parts(lambda part: model(images[part]).float(), rows, together(BATCH, images.device))
        return finite(torch.cat(found).cpu(), "logits")


def targets(scores: Tensor, labels: Tensor, rule: str, seed: int = 0) -> Tensor:
    """Target labels (N,), never the true ones.

    Parameters
    ----------
    scores : a classifier's logits (N, people)
    labels : the true labels (N,)
    rule : "random" for any other person, "second" for the most likely one, "farthest" for the least likely one
    seed : of the rule "random"

    Raises
    ------
    Invalid : for another rule, for scores of one person only, and for scores that are not finite
    """
    labels = integers(labels).to(scores.device)
    if scores.shape[1] < 2:
        raise Invalid("A target is another person, and the scores are for one person only.")
    if rule == "random":
        step = torch.randint(1, scores.shape[1], (len(labels),), generator=generator(seed))
        return (labels + step.to(labels.device)) % scores.shape[1]
    wrong = finite(scores, "scores").scatter(1, labels[:, None], float("-inf"))
    if rule == "second":
        return wrong.argmax(1)
    if rule == "farthest":
        return scores.scatter(1, labels[:, None], float("inf")).argmin(1)
    raise Invalid(f'The target rule must be "random", "second" or "farthest", not {rule!r}.')
