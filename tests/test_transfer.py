"""What helps an attack to transfer: diverse inputs, smoothed gradients, ensembles."""

import warnings

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from torch import nn

from faceadv import attacks, errors, metrics, objectives, recognisers, transfer

EPS = 8 / 255
OPTIONS = {"DI": {"diversity": 3}, "TI": {"smoothing": 7}, "DI and TI": {"diversity": 0, "smoothing": 5}}


@pytest.fixture(scope="module")
def problem(orl, dlib):
    embeddings = recognisers.embed_faces(dlib, orl)
    return orl.images[0:80:10], objectives.dodging(dlib, embeddings[1:81:10])


@pytest.fixture(scope="module")
def pair(orl, dlib):
    """Eight photos, and what dodging two networks means for them."""
    other = recognisers.load("mobilefacenet")
    wanted = [objectives.dodging(r, recognisers.embed_faces(r, orl)[1:81:10]) for r in (dlib, other)]
    return orl.images[0:80:10], wanted, [r.threshold**-2 for r in (dlib, other)]


@pytest.mark.parametrize("option", OPTIONS)
def test_succeeds_within_budget_and_leaves_things_alone(option, problem, dlib):
    x, objective = problem
    original, before = x.clone(), {key: value.clone() for key, value in dlib.state_dict().items()}
    y = attacks.mifgsm(x, objective, eps=EPS, steps=5, **OPTIONS[option])
    assert objectives.success(objective, y).float().mean() >= 0.75
    assert metrics.linf(x, y).max() <= EPS + 1e-6
    assert 0 <= y.min() <= y.max() <= 1
    assert torch.equal(x, original)
    assert all(torch.equal(before[key], value) for key, value in dlib.state_dict().items())
    assert torch.equal(attacks.mifgsm(x[:2], objective, eps=0.0, steps=2, **OPTIONS[option]), x[:2])
    assert not torch.equal(y, attacks.mifgsm(x, objective, eps=EPS, steps=5))


def test_an_image_sees_the_same_in_any_batch_and_other_things_by_another_seed(problem):
    x, objective = problem

    def attack(seed, **options):
        return attacks.mifgsm(x, objective, eps=EPS, steps=3, diversity=seed, **options)

    whole = attack(1)
    assert torch.equal(whole, attack(1))
    assert ((whole - attack(1, batch=3)).abs() > 1e-5).float().mean() < 0.01
    assert (whole - attack(2)).abs().max() > 1e-3
    stopped = attack(1, stop_early=True)
    assert objectives.success(objective, stopped).all()
    assert (stopped - x).abs().mean() < (whole - x).abs().mean()


def test_diverse_inputs_are_smaller_copies_half_of_the_time():
    images = torch.ones(400, 3, 40, 40)
    see, rows = transfer.diverse(2, 400, 0), torch.arange(400)
    seen = see(0, images, rows)
    areas = seen[:, 0].sum((1, 2)) / 1600
    shrunk = (seen != images).flatten(1).any(1)
    assert 0.4 < shrunk.float().mean() < 0.6
    assert areas.min() > 0.8  # a side of at least nine tenths
    assert areas[shrunk].max() > 0.98
    assert not torch.equal(seen, see(1, images, rows))
    assert torch.equal(see(0, images[5:9], rows[5:9]), seen[5:9])
    corners = torch.stack([seen[shrunk, 0, 0, 0], seen[shrunk, 0, -1, -1], seen[shrunk, 0, 0, -1]])
    assert ((corners == 0).float().mean(1) > 0.3).all()  # anywhere, not in the middle or in one corner


def test_shrinking_by_a_half_into_a_corner_is_the_mean_of_four_pixels():
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    got = transfer.shrink(image, torch.tensor([0.5, 1.0]), torch.tensor([[1.0, 0.0], [0.3, 0.3]]))
    torch.testing.assert_close(got[0, :, :4, 4:], nn.functional.avg_pool2d(image, 2)[0])  # right, above
    assert got[0].sum() == pytest.approx(got[0, :, :4, 4:].sum().item())
    torch.testing.assert_close(got[1], image[1])


@pytest.mark.parametrize("side", [3, 7])
def test_smoothing_against_scipy(side):
    g = torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    places = np.linspace(-3, 3, side)
    line = np.exp(-(places**2) / 2)
    kernel = np.outer(line, line) / line.sum() ** 2
    ours = transfer.smooth(g, side).numpy()
    for i in range(2):
        for channel in range(3):
            theirs = correlate(g[i, channel].numpy(), kernel, mode="constant")
            np.testing.assert_allclose(ours[i, channel], theirs, atol=1e-6)
    assert transfer.smooth(g, 1) is g


@pytest.mark.parametrize("side", [0, 4, 7.0, True])
def test_a_kernel_without_a_middle_is_refused(side, problem):
    x, objective = problem
    with pytest.raises(errors.Invalid, match="smoothing must be"):
        attacks.mifgsm(x, objective, eps=EPS, smoothing=side)


def test_ti_agrees_with_torchattacks(orl, dlib):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchattacks
    embeddings = recognisers.embed_faces(dlib, orl)
    centres = torch.stack([embeddings[orl.labels == i].mean(0) for i in range(10)])

    class NearestCentre(nn.Module):
        def __init__(self):
            super().__init__()
            self.centres = nn.Parameter(centres, requires_grad=False)  # torchattacks asks a parameter for the device

        def forward(self, images):
            return -10 * (dlib.embed(images, fast=False)[:, None] - self.centres).square().sum(2)

    classifier, x, labels = NearestCentre().eval(), orl.images[0:40:10], torch.arange(4)
    given = {"eps": EPS, "alpha": EPS / 3, "steps": 3}
    theirs = torchattacks.TIFGSM(classifier, decay=1.0, len_kernel=7, diversity_prob=0.0, **given)(x, labels)
    objective = objectives.untargeted(classifier, labels, fast=False)
    ours = attacks.mifgsm(x, objective, smoothing=7, **given)
    assert ((ours - theirs).norm() / (theirs - x).norm()).item() < 0.05
    plain = attacks.mifgsm(x, objective, **given)
    assert ((plain - theirs).norm() / (theirs - x).norm()).item() > 0.3


def test_an_ensemble_is_the_weighted_mean_and_reached_where_all_are(pair):
    x, wanted, weights = pair
    rows = torch.arange(len(x))
    losses = [one(x, rows, exact=True)[0] for one in wanted]
    loss, both = objectives.ensemble(wanted, weights)(x, rows, exact=True)
    torch.testing.assert_close(loss, (weights[0] * losses[0] + weights[1] * losses[1]) / sum(weights))
    plain, _ = objectives.ensemble(wanted)(x, rows, exact=True)
    torch.testing.assert_close(plain, (losses[0] + losses[1]) / 2)
    dodged = attacks.pgd(x, wanted[0], eps=EPS, steps=5)
    each = [objectives.success(one, dodged) for one in wanted]
    assert torch.equal(objectives.success(objectives.ensemble(wanted), dodged), each[0] & each[1])
    assert each[0].sum() > (each[0] & each[1]).sum()
    assert not both.any()
    assert objectives.ensemble(wanted).fast
    assert not objectives.ensemble([wanted[0], objectives.untargeted(nn.Flatten().eval(), rows, fast=False)]).fast


def test_an_ensemble_fools_all_its_networks(pair):
    x, wanted, weights = pair
    y = attacks.mifgsm(x, objectives.ensemble(wanted, weights), eps=EPS, steps=8)
    assert all(objectives.success(one, y).float().mean() >= 0.75 for one in wanted)
    assert metrics.linf(x, y).max() <= EPS + 1e-6
    alone = attacks.mifgsm(x, wanted[0], eps=EPS, steps=8)
    assert objectives.success(wanted[1], alone).float().mean() < 0.75


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_an_ensemble_needs_a_positive_weight_for_each(weights, pair):
    with pytest.raises(errors.Invalid, match="one positive weight"):
        objectives.ensemble(pair[1], weights)
    with pytest.raises(errors.Invalid, match="one positive weight"):
        objectives.ensemble([])


def test_a_network_of_an_ensemble_in_training_mode_is_refused(pair, dlib):
    x, wanted, _ = pair
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * 112 * 112, 10)).eval()
    objective = objectives.ensemble(
        [wanted[0], objectives.untargeted(classifier, torch.zeros(len(x), dtype=torch.long))]
    )
    classifier.train()
    with pytest.raises(errors.Invalid, match="training mode"):
        attacks.mifgsm(x, objective, eps=EPS, steps=1)
