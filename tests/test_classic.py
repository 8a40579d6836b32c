"""Blur, pixels, mask and noise: nothing at strength 0, what they should do above it, and a strength by SSIM."""

import numpy as np
import pytest
import torch

from faceadv import align, classic, errors, metrics


@pytest.fixture(scope="module")
def chips(orl):
    return orl.images[0:80:10]


@pytest.mark.parametrize("name", classic.METHODS)
def test_strength_0_changes_nothing(name, chips):
    y = classic.METHODS[name][0](chips, 0)
    assert torch.equal(y, chips)


@pytest.mark.parametrize("name", classic.METHODS)
def test_range_and_strength(name, chips):
    method, strongest = classic.METHODS[name]
    before, similar = chips.clone(), [1.0]
    for share in (0.1, 0.3, 1.0):
        y = method(chips, share * strongest)
        assert y.shape == chips.shape
        assert y.min() >= 0
        assert y.max() <= 1
        similar.append(metrics.ssim(y, chips).mean().item())
    assert similar[0] > similar[1] > similar[2] > similar[3]
    assert torch.equal(chips, before)


@pytest.mark.parametrize("name", classic.METHODS)
def test_other_shapes_stay(name, chips):
    x = chips[:1, :, :80]
    y = classic.METHODS[name][0](x, 20 if name in ("pixelate", "mask") else 0.3)
    assert y.shape == x.shape
    assert not torch.equal(y, x)


@pytest.mark.parametrize(("name", "strength"), [("blur", 6.0), ("pixelate", 16.0), ("mask", 40.0), ("noise", 0.5)])
def test_enough_of_it_hides_a_face(name, strength, chips, dlib):
    with torch.no_grad():
        d = dlib.distance(dlib.embed(classic.METHODS[name][0](chips, strength)), dlib.embed(chips))
    assert (d >= dlib.threshold).float().mean() >= 0.5


def test_blur_spreads_a_point_by_sigma():
    x = torch.zeros(1, 3, 61, 61)
    x[..., 30, 30] = 1.0
    y = classic.blur(x, 3.0)[0, 0]
    places = torch.arange(61.0) - 30
    assert y.sum().item() == pytest.approx(1, abs=1e-4)
    assert (y.sum(0) * places**2).sum().item() ** 0.5 == pytest.approx(3, rel=0.03)
    assert (y.sum(1) * places**2).sum().item() ** 0.5 == pytest.approx(3, rel=0.03)


def test_pixels_are_the_means_of_their_squares(chips):
    y = classic.pixelate(chips, 16)
    squares = chips.reshape(8, 3, 7, 16, 7, 16).mean((3, 5))
    torch.testing.assert_close(y, squares.repeat_interleave(16, 2).repeat_interleave(16, 3))
    torch.testing.assert_close(classic.pixelate(chips, 112), chips.mean((2, 3), keepdim=True).expand_as(chips))
    assert torch.equal(classic.pixelate(chips, 1), chips)


def test_the_mask_covers_the_eyes(orl):
    """Of aligned chips: where a landmark detector finds them in the photo, carried into the chip."""
    photos = [align.read_photo(file) for file in orl.files[0:80:10]]
    masked = classic.mask(torch.ones(1, 3, 112, 112), 20)[0, 0]
    for (points, _), matrix in zip(align.find_landmarks(photos), orl.matrices[0:80:10]):
        x, y = (matrix[:, :2] @ points.T + matrix[:, 2:]).round().astype(int)
        assert masked[y[:2], x[:2]].tolist() == [0, 0]
        assert masked[y[2:], x[2:]].tolist() == [1, 1, 1]  # nose and mouth are not
    assert set(masked.unique().tolist()) == {0, 1}
    rows, columns = np.nonzero(masked.numpy() == 0)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (20, 60)


def test_the_mask_leaves_the_rest(chips):
    y = classic.mask(chips, 20)
    changed = (y != chips).any(1)
    assert torch.equal(y[:, :, 60:], chips[:, :, 60:])
    assert not y.permute(0, 2, 3, 1)[changed].any()


def test_noise_has_its_spread_and_its_seed():
    x = torch.full((4, 3, 64, 64), 0.5)
    y = classic.noise(x, 0.1, seed=1)
    assert (y - x).std().item() == pytest.approx(0.1, rel=0.03)
    assert abs((y - x).mean().item()) < 0.005
    assert torch.equal(y, classic.noise(x, 0.1, seed=1))
    assert not torch.equal(y, classic.noise(x, 0.1, seed=2))


@pytest.mark.parametrize("target", [0.9, 0.75])
@pytest.mark.parametrize(("name", "near"), [("blur", 0.005), ("noise", 0.005), ("pixelate", 0.05), ("mask", 0.02)])
def test_at_ssim_hits_its_target(name, near, target, chips):
    y, strength = classic.at_ssim(name, chips, target)
    assert metrics.ssim(y, chips).mean().item() == pytest.approx(target, abs=near)
    assert torch.equal(y, classic.METHODS[name][0](chips, strength))
    assert 0 < strength < classic.METHODS[name][1]


def test_less_similar_is_stronger(chips):
    strengths = [classic.at_ssim("noise", chips, target)[1] for target in (0.9, 0.7, 0.5)]
    assert strengths[0] < strengths[1] < strengths[2]


@pytest.mark.parametrize("target", [0, 1, -0.5, 1.5, float("nan")])
def test_impossible_targets_are_refused(target, chips):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        classic.at_ssim("blur", chips, target)


def test_wrong_images_are_refused(chips):
    with pytest.raises(ValueError, match="images must"):
        classic.at_ssim("blur", chips * 255, 0.9)


@pytest.mark.parametrize("name", classic.METHODS)
def test_impossible_strengths_and_wrong_images_are_refused(name, chips):
    method = classic.METHODS[name][0]
    for strength in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="The strength must be"):
            method(chips, strength)
    with pytest.raises(ValueError, match="images must"):
        method(chips * 255, 1.0)
    with pytest.raises(errors.Invalid, match="seed must be a whole number"):
        classic.noise(chips, 0.1, seed="a")


def test_unknown_methods_and_no_images_are_refused(chips):
    with pytest.raises(ValueError, match=r"no method \"blurr\" \(did you mean blur\?\)"):
        classic.at_ssim("blurr", chips, 0.9)
    with pytest.raises(ValueError, match="on one image or more"):
        classic.at_ssim("noise", chips[:0], 0.9)
