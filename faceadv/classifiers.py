"""Closed-set classifiers: chips in, one logit per person out. P-FGVM's Model A and Model B.

Source: Chatzikyriakidis, Papaioannidis and Pitas 2019 (P-FGVM), slide "Experiments - Models".
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from faceadv.errors import Invalid
from faceadv.networks.common import whole
from faceadv.objectives import enter, evaluating, integers
from faceadv.precision import autocast
from faceadv.store import progress

__all__ = ["ModelA", "ModelB", "fit", "linear_head", "logits", "model_a", "model_b", "targets"]

L2 = 1e-3  # Keras' L2Regularizer: weight times the sum of squares, without a half


class ModelA(nn.Module):
    """Two convolutions and two fully connected layers: chips (N, 3, size, size) in [0, 1] to logits (N, people)."""

    def __init__(self, people: int, size: int = 112):
        super().__init__()
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

    def forward(self, images):
        return self.head(self.hidden(self.features(images)))


class ModelB(nn.Module):
    """A frozen face network and a head of FC256, batch norm, ReLU, FC: chips (N, 3, H, W) to logits (N, people).

    backbone: any module from chips to features (N, dimension). Give a recogniser's ``network``: the recogniser itself
    computes in float32 where an attack asks for bfloat16, in twice the time.
    """

    def __init__(self, people: int, backbone: nn.Module, dimension: int):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.hidden = nn.Linear(dimension, 256)
        self.head = nn.Sequential(nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, people))
        self.regularised = [self.hidden.weight]

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()  # its batch norm is frozen too
        return self

    def forward(self, images):
        return self.classify(self.backbone(images))

    def classify(self, features):
        """Logits from the backbone's features (N, D), which are computed once for training."""
        return self.head(self.hidden(features))


def fit(
    model: nn.Module, inputs: Tensor, labels: Tensor, epochs: int, lr: float = 1e-3, batch: int = 32,
    forward: Callable | None = None, seed: int = 0,
) -> list[float]:  # fmt: skip
    """Train a classifier with Adam on cross-entropy + L2 over its ``regularised`` weights; returns the loss by epoch.

    inputs (N, …): chips in [0, 1], or a frozen backbone's features with ``forward=model.classify``; labels (N,) of any
    integer type. ``seed`` fixes the order of the batches; dropout draws from torch's own generator. A last batch of one
    input is left out, because batch normalisation needs two. The model is left in evaluation mode, frozen.
    """
    batch, labels = whole("batch", batch, 2), integers(labels).to(inputs.device)
    if len(inputs) < 2 or len(labels) != len(inputs):
        raise Invalid(f"Training needs two inputs or more, with a label each: {len(inputs)} and {len(labels)} came.")
    forward, generator = forward or model, torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr)
    losses = []
    model.train()
    for _ in progress.bar(range(whole("epochs", epochs, 0)), desc="training"):
        total = 0.0
        for rows in torch.randperm(len(inputs), generator=generator).split(batch):
            if len(rows) == 1:
                continue
            loss = F.cross_entropy(forward(inputs[rows]), labels[rows])
            loss = loss + L2 * sum(weight.square().sum() for weight in model.regularised)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(rows)
        losses.append(total / len(inputs))
    model.eval().requires_grad_(False)
    return losses


def model_a(images: Tensor, labels: Tensor, people: int, epochs: int = 12, seed: int = 0) -> tuple[ModelA, list[float]]:
    """A trained Model A: ``(model, losses)``; the same seed gives the same model on one machine."""
    torch.manual_seed(seed)
    model = ModelA(people, images.shape[-1]).to(images.device)
    return model, fit(model, images, labels, epochs, seed=seed)


def model_b(
    images: Tensor, labels: Tensor, people: int, backbone: nn.Module, epochs: int = 60, seed: int = 0
) -> tuple[ModelB, list[float]]:
    """A trained Model B on a frozen ``backbone`` (chips to features), whose features are computed once."""
    torch.manual_seed(seed)
    backbone.eval()
    with torch.no_grad():
        features = torch.cat([backbone(batch).float() for batch in images.split(32)])
    model = ModelB(people, backbone, features.shape[1]).to(images.device)
    return model, fit(model, features, labels, epochs, forward=model.classify, seed=seed)


def linear_head(features: Tensor, labels: Tensor, scaled: bool = False, C: float = 1.0) -> nn.Linear:
    """A linear layer from features (N, D) to logits of labels 0 to K - 1: multinomial logistic regression.

    scaled: learned on standardised features, the scaling folded into the layer; C: inverse strength of the L2 penalty,
    as in scikit-learn. It has no gradients, and is where the features are. Deterministic.
    """
    device, features, labels = features.device, features.detach().cpu().numpy(), labels.cpu().numpy()
    scaler = StandardScaler(with_mean=scaled, with_std=scaled).fit(features)
    found = LogisticRegression(C=C, solver="newton-cg").fit(scaler.transform(features), labels)
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
    return layer.to(device)


@torch.no_grad()
def logits(model: Callable, images: Tensor, batch: int = 64) -> Tensor:
    """Logits (N, people) of chips (N, 3, H, W), float32 on the CPU, no gradients. Not of a model in training mode."""
    evaluating(model)
    with autocast(images.device, fast=False):
        return torch.cat([model(part).float() for part in enter(images).split(whole("batch", batch, 1))]).cpu()


def targets(scores: Tensor, labels: Tensor, rule: str, seed: int = 0) -> Tensor:
    """Target labels (N,), never the true ones, from a classifier's logits ``scores`` (N, people).

    rule: "random" other person, "second" most likely, or "farthest", the least likely. ``Invalid`` for another.
    """
    labels = integers(labels).to(scores.device)
    if scores.shape[1] < 2:
        raise Invalid("A target is another person, and the scores are for one person only.")
    if rule == "random":
        step = torch.randint(1, scores.shape[1], (len(labels),), generator=torch.Generator().manual_seed(seed))
        return (labels + step.to(labels.device)) % scores.shape[1]
    wrong = scores.scatter(1, labels[:, None], float("-inf"))
    if rule == "second":
        return wrong.argmax(1)
    if rule == "farthest":
        return scores.scatter(1, labels[:, None], float("inf")).argmin(1)
    raise Invalid(f'The target rule must be "random", "second" or "farthest", not {rule!r}.')
