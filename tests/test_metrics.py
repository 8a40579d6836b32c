"""Metrics against closed forms and a second implementation."""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from faceadv import metrics, records
from faceadv.errors import Invalid


def test_norms():
    a = torch.zeros(2, 3, 4, 4)
    b = a.clone()
    b[1, :, 0, 0] = 0.5
    torch.testing.assert_close(metrics.l2(a, b), torch.tensor([0.0, 0.75**0.5]))
    torch.testing.assert_close(metrics.linf(a, b), torch.tensor([0.0, 0.5]))


def test_ssim_is_torchmetrics(orl):
    a = orl.images[:70]
    b = (a + 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    wanted = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    torch.testing.assert_close(metrics.ssim(a, b), wanted, atol=1e-5, rtol=0)
    with pytest.raises(Invalid, match="of one shape"):
        metrics.ssim(a, b[:1])


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


def drawn(random, share, people, photos, alike):
    """Hits of people with so many photos each, and their labels; alike: the correlation within a person."""
    spread = (1 - alike) / alike
    each = random.beta(share * spread, (1 - share) * spread, people)
    return (random.random((people, photos)) < each[:, None]).ravel(), np.repeat(range(people), photos)


@pytest.mark.parametrize("people", [12, 40])
@pytest.mark.parametrize("photos", [1, 3, 20])
@pytest.mark.parametrize("alike", [0.01, 0.5])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_the_interval_of_a_rate_covers_it_as_often_as_it_says(people, photos, alike, share):
    random = np.random.default_rng(0)
    found = [metrics.rate(*drawn(random, share, people, photos, alike)) for _ in range(200)]
    assert np.mean([low <= share <= high for _, low, high in found]) >= 0.9
    again = [metrics.gain(*hits) for hits in both(random, share, people, photos, alike)]
    assert np.mean([low <= 0 <= high for _, low, high in again]) >= 0.9


def both(random, share, people, photos, alike):
    """200 times the hits of two ways that are equally good, and the labels."""
    for _ in range(200):
        hits, groups = drawn(random, share, people, photos, alike)
        yield (
            hits,
            np.where(random.random(len(hits)) < 0.5, hits, drawn(random, share, people, photos, alike)[0]),
            groups,
        )


def test_independent_hits_have_wilson_s_interval():
    hits = np.arange(4000) % 4 == 0
    exact = binomtest(1000, 4000).proportion_ci(0.95, method="wilson")
    assert metrics.rate(hits, range(4000))[1:] == pytest.approx((exact.low, exact.high), abs=2e-4)


def test_interval_of_shares_that_are_means_covers_and_is_as_sharp_as_the_bootstraps():
    random = np.random.default_rng(0)  # each of 40 people is one row: the share of six networks that are fooled
    covered, widths = [], []
    for _ in range(200):
        rows = random.binomial(6, random.beta(4, 16, 40)) / 6
        _, low, high = metrics.rate(rows, range(40))
        covered.append(low <= 0.2 <= high)
        drawn = metrics.bootstrap(rows, range(40))
        widths.append((high - low) / (drawn[2] - drawn[1]))
    assert np.mean(covered) > 0.92
    assert 1 < np.mean(widths) < 1.15  # as hits and misses they would be 1.9 times as wide


def test_a_rate_does_not_jump_where_all_agree():
    """Before: 97.5 % had [92, 100] and 100 % [80, 100]."""
    people, widths = np.repeat(range(20), 10), []
    for misses in range(6):
        hits = np.arange(200) % 10 >= (np.arange(200) // 10 < misses)  # one miss each of so many people
        share, low, high = metrics.rate(hits, people)
        assert share == 1 - misses / 200
        assert low < share <= high <= 1
        assert metrics.rate(~hits, people) == pytest.approx((1 - share, 1 - high, 1 - low))
        widths.append(high - low)
    assert widths[:4] == sorted(widths[:4], reverse=True)
    assert widths[0] < 0.12
    assert widths[0] < 1.5 * widths[1]


def test_a_gain_does_not_vanish_where_both_agree():
    """Before: a bootstrap of differences that are all 0 claimed certainty, [0, 0]."""
    people, same = np.repeat(range(20), 10), np.arange(200) % 3 == 0
    change, low, high = metrics.gain(same, same, people)
    assert change == 0
    assert -0.2 < low < -0.05
    assert high == -low
    won = same | (np.arange(200) % 7 == 0)
    change, low, high = metrics.gain(won, same, people)
    assert 0 < low < change < high
    assert metrics.gain(same, won, people) == pytest.approx((-change, -high, -low))
    assert metrics.gain(np.ones(200), np.zeros(200), people)[1] < 0.95


@pytest.mark.parametrize("hits", [np.arange(60) % 3 == 0, np.full(60, 1 / 3)])
def test_a_rate_on_which_all_people_agree_is_not_certain(hits):
    share, low, high = metrics.rate(hits, np.repeat(range(21), 3)[:60])
    assert share == pytest.approx(1 / 3)
    assert low < 0.27 < 0.4 < high  # of 20 people


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


@pytest.mark.parametrize("hit", [0, 1])
def test_a_share_lies_in_its_interval_where_all_agree(hit):
    """Before, rounding set the lower end of no hits at 3e-17, and a figure refused a dot outside of its interval."""
    for count in range(2, 60):
        share, low, high = metrics.rate([hit] * count, range(count))
        assert low <= share <= high
        assert (low, high)[hit] == hit


def test_a_rate_over_one_group_is_not_certain_either():
    assert metrics.rate([True, False], [1, 1]) == (0.5, 0, 1)
    assert metrics.rate([True, True], [1, 1]) == (1, 0, 1)
    assert metrics.gain([True, True], [False, True], [1, 1]) == (0.5, -1, 1)
    for ask in (metrics.rate, lambda hits, groups: metrics.gain(hits, hits, groups)):
        with pytest.raises(ValueError, match="no values"):
            ask([], [])


def test_lists_arrays_and_tensors_give_the_same():
    values, groups = np.random.default_rng(0).random(30), np.arange(30) % 7
    expected = metrics.bootstrap(values, groups)
    tensor = torch.from_numpy(values).requires_grad_()
    assert metrics.bootstrap(tensor, torch.from_numpy(groups)) == expected == metrics.bootstrap(list(values), groups)
    hits = values < 0.5
    assert metrics.rate(torch.from_numpy(hits), torch.from_numpy(groups)) == metrics.rate(hits, groups)
