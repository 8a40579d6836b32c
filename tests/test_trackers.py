"""Trackers: the split is fair, the trackers know faces, and the protocol counts what it says."""

import pytest
import torch

from faceadv import errors, recognisers, trackers


@pytest.fixture(scope="module")
def ten(orl, dlib):
    """Embeddings, labels and training mask of ORL's first ten people."""
    faces = orl[orl.labels.numpy() < 10]
    return recognisers.embed_faces(dlib, faces), faces.labels, trackers.split(faces.labels)


def test_split(orl):
    mask = trackers.split(orl.labels)
    for person in orl.labels.unique():
        assert mask[orl.labels == person].sum() == 7
    assert torch.equal(mask, trackers.split(orl.labels))
    assert not torch.equal(mask, trackers.split(orl.labels, seed=11))


@pytest.mark.parametrize("tracker", [trackers.nearest_neighbour, trackers.logistic_regression])
def test_trackers_on_embeddings_know_natural_faces(tracker, ten):
    embeddings, labels, train = ten
    found = tracker(embeddings[train], labels[train], embeddings[~train])
    assert (found == labels[~train]).float().mean() >= 0.95


def test_the_tracker_from_nothing_learns(orl):
    faces = orl[orl.labels.numpy() < 10]
    train = trackers.split(faces.labels)
    x = torch.nn.functional.interpolate(faces.images, (28, 28), mode="area")  # a sixteenth of the work
    found = trackers.end_to_end(x[train], faces.labels[train], x[~train], epochs=40)
    assert (found == faces.labels[~train]).float().mean() >= 0.6


def test_without_a_cloak_nothing_succeeds(ten):
    embeddings, labels, train = ten
    success, normal = trackers.judge(
        trackers.nearest_neighbour, embeddings, embeddings, embeddings, labels, train, [0, 3, 7]
    )
    assert success.tolist() == [0, 0, 0]
    assert normal.tolist() == [1] * 10


def test_a_cloak_hides_its_user_and_nobody_else(ten):
    embeddings, labels, train = ten
    cloaked = embeddings + 10  # the published photos of whoever cloaks lie far from everybody's
    success, normal = trackers.judge(trackers.nearest_neighbour, embeddings, cloaked, embeddings, labels, train, [2, 5])
    assert success.tolist() == [1, 1]
    assert normal.tolist() == [1] * 10  # those two as well, each while the other one cloaks


def test_the_user_is_tested_on_natural_photos_and_trained_on_cloaked_ones_alone():
    seen = {}

    def tracker(data, labels, tested):
        seen.update(data=data, labels=labels, tested=tested)
        return torch.zeros(len(tested), dtype=torch.int64)

    labels, train = torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, True, False])
    natural, cloaked, tested = torch.zeros(4, 1), torch.ones(4, 1), torch.full((4, 1), 2.0)
    success, normal = trackers.judge(tracker, natural, cloaked, tested, labels, train, [1])
    assert seen["data"].tolist() == [[0], [1]]
    assert seen["tested"].tolist() == [[2], [2]]
    assert success.tolist() == [1]
    assert normal[0] == 1
    assert normal[1].isnan()  # person 1 cloaks each time


def test_users_who_cloak_at_once(ten):
    embeddings, labels, train = ten
    success, normal = trackers.judge(
        trackers.nearest_neighbour, embeddings, embeddings + 10, embeddings, labels, train, [[2, 5]]
    )
    assert success.tolist() == [1, 1]
    assert normal.isnan().nonzero().flatten().tolist() == [2, 5]
    assert normal[~normal.isnan()].tolist() == [1] * 8


def test_normal_accuracy_is_each_persons_own():
    """Person 0 is right in one of two photos whoever cloaks, person 1 never while person 2 cloaks."""
    labels, train = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([1, 0, 0, 1, 0, 1, 0]).bool()

    def tracker(data, labels, tested):
        return torch.tensor([0, 9, 9 if data[2] else 1, 2])

    natural, cloaked = torch.zeros(7, 1), torch.ones(7, 1)
    success, normal = trackers.judge(tracker, natural, cloaked, natural, labels, train, [0, 1, 2])
    assert success.tolist() == [0.5, 0, 0]
    assert normal.tolist() == [0.5, 0.5, 1]


def test_a_user_without_a_test_photo_is_an_error(ten):
    embeddings, labels, train = ten
    with pytest.raises(ValueError, match="Person 2 has no test photo"):
        trackers.judge(
            trackers.nearest_neighbour, embeddings, embeddings, embeddings, labels, train | (labels == 2), [2]
        )


@pytest.mark.parametrize("share", [0, 1, -0.5, 70, float("nan")])
def test_impossible_shares_are_refused(share):
    with pytest.raises(ValueError, match="share must lie between 0 and 1"):
        trackers.split(torch.zeros(10, dtype=torch.long), share=share)


def test_impossible_seeds_are_refused():
    for seed in ("a", -1, 0.5):
        with pytest.raises(errors.Invalid, match="seed must be a whole number"):
            trackers.split(torch.zeros(10, dtype=torch.long), seed=seed)
