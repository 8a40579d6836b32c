"""Closed-set classifiers: chips in, one logit per person out. P-FGVM's Model A and Model B.

Source: Chatzikyriakidis, Papaioannidis and Pitas 2019 (P-FGVM), slide "Experiments - Models".
"""

import os

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import trange

from faceadv.errors import Invalid

L2 = 1e-3  # Keras' L2Regularizer: weight times the sum of squares, without a half


class ModelA(nn.Module):
    """Two convolutions and two fully connected layers, on chips of 112; (N, 3, 112, 112) to (N, people)."""

    def __init__(self, people, size=112):
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
    """A frozen face network and a head: FC256, batch norm, ReLU, FC; (N, 3, 112, 112) to (N, people).

    backbone: any module from chips to (N, D) features. Give a recogniser's ``network``: the recogniser itself stays in
    float32 where an attack asks for bfloat16, at twice the time.
    """

    def __init__(self, people, backbone, dimension):
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


def fit(model, inputs, labels, epochs, lr=1e-3, batch=32, forward=None, seed=0):
    """Train a classifier with Adam on cross-entropy + L2 over its ``regularised`` weights; returns the loss by epoch.

    inputs (N, …): chips in [0, 1], or a frozen backbone's features with ``forward=model.classify``; labels (N,) int64.
    ``seed`` fixes the order of the batches; dropout draws from torch's own generator. The model is left in evaluation
    mode, frozen.
    """
    forward, generator = forward or model, torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr)
    losses = []
    model.train()
    for _ in trange(epochs, desc="training", disable=bool(os.environ.get("FACEADV_QUIET"))):
        total = 0.0
        for rows in torch.randperm(len(inputs), generator=generator).split(batch):
            if len(rows) == 1:  # batch norm needs two
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


def model_a(images, labels, people, epochs=12, seed=0):
    """A trained Model A: ``(model, losses)``; the same seed gives the same model on one machine."""
    torch.manual_seed(seed)
    model = ModelA(people, images.shape[-1])
    return model, fit(model, images, labels, epochs, seed=seed)


def model_b(images, labels, people, backbone, epochs=60, seed=0):
    """A trained Model B on a frozen ``backbone`` (chips to features), whose features are computed once."""
    torch.manual_seed(seed)
    with torch.no_grad():
        features = torch.cat([backbone(batch).float() for batch in images.split(32)])
    model = ModelB(people, backbone, features.shape[1])
    return model, fit(model, features, labels, epochs, forward=model.classify, seed=seed)


def linear_head(features, labels, scaled=False, C=1.0):
    """A linear layer from features (N, D) to logits of labels 0 to K - 1: multinomial logistic regression.

    scaled: learned on standardised features, the scaling folded into the layer; C: inverse strength of the L2 penalty,
    as in scikit-learn. It has no gradients. Deterministic.
    """
    scaler = StandardScaler(with_mean=scaled, with_std=scaled).fit(features.numpy())
    found = LogisticRegression(C=C, solver="newton-cg").fit(scaler.transform(features.numpy()), labels.numpy())
    weight, bias = torch.from_numpy(found.coef_), torch.from_numpy(found.intercept_)
    if scaled:
        weight = weight / torch.from_numpy(scaler.scale_)
        bias = bias - weight @ torch.from_numpy(scaler.mean_)
    if len(weight) == 1:  # two people: scikit-learn keeps the second one's alone
        weight, bias = torch.cat([0 * weight, weight]), torch.cat([0 * bias, bias])
    layer = nn.Linear(*weight.T.shape).requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer


@torch.no_grad()
def logits(model, images, batch=64):
    """Logits (N, people) of any number of chips (N, 3, H, W), in float32 and without gradients."""
    return torch.cat([model(part).float() for part in images.split(batch)])


def targets(scores, labels, rule, seed=0):
    """Target labels (N,), never the true ones, from a classifier's logits ``scores`` (N, people).

    rule: "random" other person, "second" most likely, or "farthest", the least likely. ``ValueError`` for another.
    """
    if rule == "random":
        step = torch.randint(1, scores.shape[1], (len(labels),), generator=torch.Generator().manual_seed(seed))
        return (labels + step) % scores.shape[1]
    wrong = scores.scatter(1, labels[:, None], float("-inf"))
    if rule == "second":
        return wrong.argmax(1)
    if rule == "farthest":
        return scores.scatter(1, labels[:, None], float("inf")).argmin(1)
    raise Invalid(f'The target rule must be "random", "second" or "farthest", not {rule!r}.')
