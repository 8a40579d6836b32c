"""Trackers: who trains on photos to recognise people, and the protocol by which a cloak is judged.

Source: Radiya-Dixit et al. 2022, Data poisoning won't save you from facial recognition (FaceCure), section 4: one user
cloaks all training photos, everybody else is natural, 70 % of each person's photos train, the user's natural ones test.
"""

import torch

from faceadv import classifiers


def split(labels, seed=10, share=0.7):
    """Which photos train: a mask (N,), ``share`` of each person's photos, drawn by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for person in labels.unique():
        places = torch.where(labels == person)[0]
        order = torch.randperm(len(places), generator=generator)
        mask[places[order[: round(share * len(places))]]] = True
    return mask


def nearest_neighbour(train, labels, test):
    """For each test embedding (M, D) the label of the nearest of the training embeddings (N, D): (M,)."""
    return labels[torch.cdist(test, train).argmin(1)]


def logistic_regression(train, labels, test):
    """Labels of test embeddings by a linear head: standardised, multinomial logistic regression."""
    people, rows = labels.unique(return_inverse=True)
    return people[classifiers.linear_head(train, rows, scaled=True)(test).argmax(1)]


def end_to_end(train, labels, test, epochs=8, seed=0):
    """Labels of test chips by a small network trained from nothing on the training chips (notebook 02's Model A)."""
    model, _ = classifiers.model_a(train, labels, int(labels.max()) + 1, epochs=epochs, seed=seed)
    return classifiers.logits(model, test).argmax(1)


def judge(tracker, natural, cloaked, tested, labels, train, users):
    """Attack success and normal accuracy, one user (or group of users) cloaking at a time.

    natural, cloaked: what the tracker may train on, embeddings or chips of all N photos (behind a purifier, if there is
    one), without and with a cloak; tested: the same photos as they are shown to the tracker later, always without a
    cloak. train: the mask of ``split``; users: labels of those who cloak, or lists of labels who cloak at once.
    Returns ``(success, normal)``, each (number of users,): the share of the user's own test photos that get a wrong
    name, and the share of the test photos of those who do not cloak that get the right one.
    """
    success, normal = [], []
    for user in users:
        group = torch.as_tensor(user).reshape(-1)
        own = torch.isin(labels, group)
        shape = [-1] + [1] * (natural.ndim - 1)
        data = torch.where((own & train).reshape(shape), cloaked, natural)[train]
        right = tracker(data, labels[train], tested[~train]) == labels[~train]
        others = right[~own[~train]].float().mean()
        for one in group:
            success.append(1 - right[labels[~train] == one].float().mean())
            normal.append(others)
    return torch.stack(success), torch.stack(normal)
