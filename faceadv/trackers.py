"""Trackers: who trains on photos to recognise people, and the protocol by which a cloak is judged.

Source: Radiya-Dixit et al. 2022, Data poisoning won't save you from facial recognition (FaceCure), section 4: one user
cloaks all training photos, everybody else is natural, 70 % of each person's photos train, the user's natural ones test.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from faceadv import classifiers
from faceadv.errors import Invalid
from faceadv.metrics import finite
from faceadv.networks.common import generator

__all__ = ["end_to_end", "judge", "logistic_regression", "nearest_neighbour", "split"]


def split(labels: Tensor, seed: int = 10, share: float = 0.7) -> Tensor:
    """Which photos train: a mask (N,), drawn for each person anew.

    Parameters
    ----------
    labels : who is on the photos, (N,)
    seed : of the draw
    share : of each person's photos that train; it lies between 0 and 1, or ``Invalid``
    """
    if not 0 < share < 1:
        raise Invalid(f"share must lie between 0 and 1, not {share!r}.")
    draw = generator(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for person in labels.unique():
        places = torch.where(labels == person)[0]
        order = torch.randperm(len(places), generator=draw)
        mask[places[order[: round(share * len(places))]]] = True
    return mask


def nearest_neighbour(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """For each test embedding the label of the nearest training embedding: (M,).

    Parameters
    ----------
    train, labels : embeddings (N, D) and labels (N,) to learn from
    test : embeddings (M, D)

    Raises
    ------
    Invalid : for an embedding that is not finite
    """
    return labels[torch.cdist(finite(test, "embeddings"), finite(train, "embeddings")).argmin(1).to(labels.device)]


def logistic_regression(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Labels (M,) of test embeddings by a linear head: standardised, multinomial logistic regression.

    Parameters
    ----------
    train, labels, test : as in ``nearest_neighbour``
    """
    people, rows = labels.unique(return_inverse=True)
    return people[classifiers.linear_head(train, rows, scaled=True)(test).argmax(1).to(people.device)]


def end_to_end(train: Tensor, labels: Tensor, test: Tensor, epochs: int = 8, seed: int = 0) -> Tensor:
    """Labels (M,) of test chips by Model A of notebook 02, a small network that is trained from nothing.

    Parameters
    ----------
    train, labels : chips (N, 3, S, S) in [0, 1] and labels (N,) to learn from
    test : chips (M, 3, S, S)
    epochs, seed : of the training
    """
    model, _ = classifiers.model_a(train, labels, int(labels.max()) + 1, epochs=epochs, seed=seed)
    return classifiers.logits(model, test).argmax(1)


def judge(
    tracker: Callable, natural: Tensor, cloaked: Tensor, tested: Tensor, labels: Tensor, train: Tensor, users: Sequence
) -> tuple[Tensor, Tensor]:
    """Attack success and normal accuracy, one user (or group of users) cloaking at a time.

    Parameters
    ----------
    tracker : a function of training data, their labels and test data to labels, such as ``nearest_neighbour``
    natural, cloaked : what the tracker may train on, embeddings or chips of all N photos without and with a cloak
        (behind a purifier, if there is one)
    tested : the same photos as they are shown to the tracker later, always without a cloak
    labels : who is on the photos, (N,)
    train : the mask of ``split``
    users : labels of those who cloak, or lists of labels of those who cloak at once

    Returns
    -------
    ``(success, normal)``: for each user the share of their own test photos that get a wrong name; and for each person,
    in the order of their labels, the share of their test photos that get the right name while others cloak, NaN for
    whoever cloaks each time or has no test photo

    Raises
    ------
    Invalid : for a user without a test photo
    """
    people, names = labels.unique(), labels[~train]
    own_photos = (names == people[:, None]).float()
    success, right, runs = [], torch.zeros(len(people)), torch.zeros(len(people))
    for user in users:
        group = torch.as_tensor(user).reshape(-1)
        shape = [-1] + [1] * (natural.ndim - 1)
        cloaking = (torch.isin(labels, group) & train).reshape(shape).to(natural.device)
        data = torch.where(cloaking, cloaked, natural)[train]
        found = (tracker(data, labels[train], tested[~train]) == names).float()
        shares, others = own_photos @ found / own_photos.sum(1), ~torch.isin(people, group)
        right[others], runs[others] = right[others] + shares[others], runs[others] + 1
        for one in group:
            mine = shares[people == one]
            if not mine.isfinite().all() or not len(mine):
                raise Invalid(f"Person {int(one)} has no test photo: choose another user, or a smaller share to train.")
            success.append(1 - mine[0])
    return torch.stack(success), right / runs
