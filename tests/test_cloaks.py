"""Cloaks: within their budget, far in the features, the same twice, and a look-alike of the photo."""

import pytest
import torch

from faceadv import cloaks, metrics, recognisers


@pytest.fixture(scope="module")
def chips(orl):
    return orl.images[0:40:10]


def moved(extractor, a, b):
    with torch.no_grad():
        return (cloaks.features(extractor, a, fast=False) - cloaks.features(extractor, b, fast=False)).norm(dim=1)


def strangers(extractor, chips):
    """The distance of the nearest two of the four people."""
    with torch.no_grad():
        f = cloaks.features(extractor, chips, fast=False)
    return torch.cdist(f, f)[~torch.eye(len(f), dtype=torch.bool)].min()


def test_dssim_is_the_metric(chips):
    noisy = (chips + 0.05 * torch.randn(chips.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    torch.testing.assert_close(cloaks.dssim(noisy, chips), (1 - metrics.ssim(noisy, chips)) / 2, atol=1e-5, rtol=1e-4)
    assert cloaks.dssim(chips, chips).abs().max() < 1e-6


def test_fawkes(chips, dlib):
    before = chips.clone()
    cloaked = cloaks.fawkes(chips, [dlib], mode="mid")
    assert torch.equal(chips, before)
    assert cloaked.min() >= 0
    assert cloaked.max() <= 1
    assert (cloaked - chips).abs().max() <= cloaks.CLIP + 1e-6
    assert (cloaks.dssim(cloaked, chips) <= cloaks.FAWKES_10["mid"][0]).all()
    assert (moved(dlib, cloaked, chips) > 0.8 * strangers(dlib, chips)).all()
    assert torch.equal(cloaked, cloaks.fawkes(chips, [dlib], mode="mid"))


def test_a_larger_budget_goes_further(chips, dlib):
    low, high = (moved(dlib, cloaks.fawkes(chips, [dlib], mode=m), chips) for m in ("low", "high"))
    assert (high > low).all()


def test_fawkes_targeted_goes_where_it_should(orl, chips, dlib):
    mine = orl.images[:4]
    embeddings = torch.nn.functional.normalize(recognisers.embed_faces(dlib, orl))
    shifts = cloaks.target_shifts([embeddings[:4]], [embeddings[10:200]], orl.labels[10:200], seed=1)
    people = torch.stack([embeddings[i : i + 10].mean(0) for i in range(10, 200, 10)])
    reached = embeddings[:4].mean(0) + shifts[0][0] / 2
    assert (people - reached).norm(dim=1).min() < 1e-5  # half of the shift is the way to somebody
    cloaked = cloaks.fawkes_targeted(mine, [dlib], shifts, mode="high", steps=30)
    assert (cloaks.dssim(cloaked, mine) <= cloaks.FAWKES_03["high"][0]).all()
    with torch.no_grad():
        clean, now = cloaks.features(dlib, mine), cloaks.features(dlib, cloaked)
    wanted = clean + shifts[0]
    assert ((now - wanted).norm(dim=1) < (clean - wanted).norm(dim=1)).all()
    assert torch.nn.functional.cosine_similarity(now - clean, shifts[0]).min() > 0.3


def test_lowkey(chips, dlib):
    mobile = recognisers.load("mobile")
    cloaked = cloaks.lowkey(chips, [dlib, mobile], steps=12)
    assert cloaked.min() >= 0
    assert cloaked.max() <= 1
    assert (cloaked - chips).abs().max() <= 0.005 + 12 * 0.0025 + 1e-6
    assert metrics.ssim(cloaked, chips).min() > 0.75
    for extractor in (dlib, mobile):
        assert (moved(extractor, cloaked, chips) > 0.4).all()
    assert torch.equal(cloaked, cloaks.lowkey(chips, [dlib, mobile], steps=12))
    assert not torch.equal(cloaked, cloaks.lowkey(chips, [dlib, mobile], steps=12, seed=1))


def test_smoothing_survives_a_blur(chips, dlib):
    from torchvision.transforms.functional import gaussian_blur

    blurred = gaussian_blur(chips, 7, [3.0, 3.0])
    plain, smooth = (cloaks.lowkey(chips, [dlib], steps=12, smooth=s) for s in (False, True))
    far = [moved(dlib, gaussian_blur(c, 7, [3.0, 3.0]), blurred).mean() for c in (plain, smooth)]
    assert far[1] > far[0]


def test_nothing_to_do(dlib):
    assert cloaks.fawkes(torch.zeros(0, 3, 112, 112), [dlib]).shape == (0, 3, 112, 112)
    assert cloaks.lowkey(torch.zeros(0, 3, 112, 112), [dlib]).shape == (0, 3, 112, 112)


def test_unknown_modes_and_wrong_images(chips, dlib):
    with pytest.raises(ValueError, match="mode must be one of low, mid, high"):
        cloaks.fawkes(chips, [dlib], mode="ultra")
    with pytest.raises(ValueError, match="images must"):
        cloaks.lowkey(chips * 255, [dlib])


def test_networks_are_left_alone(chips, dlib):
    before = {key: value.clone() for key, value in dlib.state_dict().items()}
    cloaks.fawkes(chips[:1], [dlib], steps=2)
    assert all(torch.equal(before[key], value) for key, value in dlib.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in dlib.parameters())
