"""Metrics against closed forms and a second implementation."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from faceadv import images, metrics


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


def test_saving(orl):
    x = orl.images[:2]
    assert torch.allclose(images.quantise(x), x)  # chips are 8-bit already
    y = (x + 0.4 / 255).clamp(0, 1)
    assert torch.allclose(images.quantise(y), x)
    errors = [(images.jpeg(x, quality) - x).abs().mean().item() for quality in (95, 75, 30)]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.05
    torch.testing.assert_close(images.from_pil(images.to_pil(x[0])), x[0])


def test_a_rate_of_all_or_nothing_is_not_certain():
    people = np.repeat(range(20), 3)
    share, low, high = metrics.rate(np.ones(60), people)
    assert (share, high) == (1, 1)
    assert low == pytest.approx(0.025 ** (1 / 20))
    assert metrics.rate(np.zeros(60), people) == pytest.approx((0, 0, 1 - low))
    mixed = np.arange(60) % 3 == 0
    assert metrics.rate(mixed, people) == metrics.bootstrap(mixed, people)
