"""Metrics against closed forms and a second implementation."""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from skimage.metrics import structural_similarity

from faceadv import metrics, records


def test_norms():
    a = torch.zeros(2, 3, 4, 4)
    b = a.clone()
    b[1, :, 0, 0] = 0.5
    torch.testing.assert_close(metrics.l2(a, b), torch.tensor([0.0, 0.75**0.5]))
    torch.testing.assert_close(metrics.linf(a, b), torch.tensor([0.0, 0.5]))


def test_ssim_agrees_with_scikit_image(orl):
    a = orl.images[:3]
    b = (a + 0.05 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    options = {"channel_axis": 0, "data_range": 1.0, "gaussian_weights": True, "use_sample_covariance": False}
    maps = [structural_similarity(x.numpy(), y.numpy(), full=True, **options)[1] for x, y in zip(a, b)]
    # the mean of the whole map; scikit-image's own leaves the border out
    np.testing.assert_allclose(metrics.ssim(a, b), [m.mean() for m in maps], atol=1e-3)
    torch.testing.assert_close(metrics.ssim(a, a), torch.ones(3))
    assert metrics.ssim(a[:0], b[:0]).shape == (0,)


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for repeat in range(200):
        _, low, high = metrics.bootstrap(random.normal(size=60), repeats=400, seed=repeat)
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_groups_widen_the_interval():
    values = np.repeat([0.0, 1.0, 0.0, 1.0, 1.0], 20)
    mean, low, high = metrics.bootstrap(values, np.repeat(range(5), 20))
    _, low_pairs, high_pairs = metrics.bootstrap(values)
    assert mean == pytest.approx(0.6)
    assert high - low > 2 * (high_pairs - low_pairs)
    assert metrics.bootstrap(values, seed=3) == metrics.bootstrap(values, seed=3)
    with pytest.raises(ValueError, match="no values"):
        metrics.bootstrap([])


def test_a_rate_of_all_or_nothing_is_not_certain():
    people = np.repeat(range(20), 3)
    share, low, high = metrics.rate(np.ones(60), people)
    assert (share, high) == (1, 1)
    assert low == pytest.approx(0.025 ** (1 / 20))
    assert metrics.rate(np.zeros(60), people) == pytest.approx((0, 0, 1 - low))
    mixed = np.arange(60) % 4 == 0
    assert metrics.rate(mixed, people) == metrics.bootstrap(mixed, people)


@pytest.mark.parametrize("hits", [np.arange(60) % 3 == 0, np.full(60, 1 / 3)])
def test_a_rate_on_which_all_people_agree_is_not_certain(hits):
    share, low, high = metrics.rate(hits, np.repeat(range(21), 3)[:60])
    assert share == pytest.approx(1 / 3)
    assert low < 0.2 < 0.5 < high  # of 20 people
    # seven of 21, where the binomial interval has whole numbers
    exact = binomtest(7, 21).proportion_ci(0.95, method="exact")
    assert metrics.rate(np.full(21, 1 / 3), range(21))[1:] == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("groups", [None, 5000, 700])
def test_draws_in_parts_are_bit_for_bit_those_drawn_at_once(groups):
    random = np.random.default_rng(0)
    values = random.normal(size=5000)
    labels = np.arange(5000) if groups is None else random.integers(groups, size=5000)
    sums, counts = (np.bincount(np.unique(labels, return_inverse=True)[1], w) for w in (values, None))
    draws = np.random.default_rng(7).integers(len(sums), size=(2000, len(sums)))
    low, high = np.quantile(sums[draws].sum(1) / counts[draws].sum(1), [(1 - 0.95) / 2, (1 + 0.95) / 2])
    assert metrics.bootstrap(values, None if groups is None else labels, seed=7) == (values.mean(), low, high)


def test_a_bootstrap_over_all_pairs_of_orl_needs_little_memory():
    values = np.random.default_rng(0).random(79800)
    tracemalloc.start()
    mean, low, high = metrics.bootstrap(values, repeats=400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert low < mean < high
    assert peak < 200e6


@pytest.mark.parametrize(("values", "groups"), [([0.5], None), ([0.25, 0.75], [3, 3])])
def test_one_value_or_group_has_a_mean_without_interval(values, groups):
    interval = metrics.bootstrap(values, groups)
    assert interval == (0.5, pytest.approx(np.nan, nan_ok=True), pytest.approx(np.nan, nan_ok=True))
    percent = [100 * v for v in interval]  # as notebooks do
    assert "{:.0f} [{:.0f}, {:.0f}]".format(*percent) == "50 [nan, nan]"
    found = records.number("x", *percent)
    assert (found["value"], found["low"], found["high"]) == (50, None, None)


def test_a_rate_over_one_group_is_not_certain_either():
    assert metrics.rate([True, False], [1, 1]) == (0.5, 0, 1)
    assert metrics.rate([True, True], [1, 1]) == pytest.approx((1, 0.025, 1))
    with pytest.raises(ValueError, match="no values"):
        metrics.rate([], [])


def test_lists_arrays_and_tensors_give_the_same():
    values, groups = np.random.default_rng(0).random(30), np.arange(30) % 7
    expected = metrics.bootstrap(values, groups)
    tensor = torch.from_numpy(values).requires_grad_()
    assert metrics.bootstrap(tensor, torch.from_numpy(groups)) == expected == metrics.bootstrap(list(values), groups)
    hits = values < 0.5
    assert metrics.rate(torch.from_numpy(hits), torch.from_numpy(groups)) == metrics.rate(hits, groups)
