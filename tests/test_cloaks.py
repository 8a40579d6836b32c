"""Cloaks: within their budget, far in the features, the same twice, and a look-alike of the photo."""

import numpy as np
import pytest
import torch

from faceadv import cloaks, errors, metrics, recognisers
from faceadv.store import progress


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
    again, other = (cloaks.fawkes(chips[:2], [dlib], steps=2, seed=seed) for seed in (0, 1))
    assert torch.equal(again, cloaks.fawkes(chips[:2], [dlib], steps=2))
    assert not torch.equal(again, other)
    assert cloaked.min() >= 0
    assert cloaked.max() <= 1
    assert (cloaked - chips).abs().max() <= cloaks.CLIP + 1e-6
    assert (cloaks.dssim(cloaked, chips) <= cloaks.FAWKES_10["mid"][0]).all()
    assert (moved(dlib, cloaked, chips) > 0.8 * strangers(dlib, chips)).all()


def test_a_larger_budget_goes_further(chips, dlib):
    x = chips[:2]
    low, high = (moved(dlib, cloaks.fawkes(x, [dlib], mode=m, steps=40), x) for m in ("low", "high"))
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
    mobile = recognisers.load("mobilefacenet")
    cloaked = cloaks.lowkey(chips, [dlib, mobile], steps=12)
    assert cloaked.min() >= 0
    assert cloaked.max() <= 1
    assert (cloaked - chips).abs().max() <= 0.005 + 12 * 0.0025 + 1e-6
    assert metrics.ssim(cloaked, chips).min() > 0.75
    for extractor in (dlib, mobile):
        assert (moved(extractor, cloaked, chips) > 0.4).all()
    again, other = (cloaks.lowkey(chips[:2], [dlib, mobile], steps=2, seed=seed) for seed in (0, 1))
    assert torch.equal(again, cloaks.lowkey(chips[:2], [dlib, mobile], steps=2))
    assert not torch.equal(again, other)


def test_smoothing_survives_a_blur(chips, dlib):
    from torchvision.transforms.functional import gaussian_blur

    blurred = gaussian_blur(chips, 7, [3.0, 3.0])
    plain, smooth = (cloaks.lowkey(chips, [dlib], steps=12, smooth=s) for s in (False, True))
    far = [moved(dlib, gaussian_blur(c, 7, [3.0, 3.0]), blurred).mean() for c in (plain, smooth)]
    assert far[1] > far[0]


def kinds(dlib, steps=3):
    """Every cloak with few steps, and the largest change of a pixel that it may make."""
    shift = cloaks.features(dlib, torch.zeros(1, 3, 112, 112))

    def towards(x):
        return cloaks.fawkes_targeted(x, [dlib], [-shift.expand(len(x), -1)], mode="high", steps=steps + 4)

    return {
        "fawkes": (lambda x: cloaks.fawkes(x, [dlib], mode="low", steps=steps), cloaks.CLIP),
        "fawkes, targeted": (towards, 1.0),
        "lowkey": (lambda x: cloaks.lowkey(x, [dlib], steps=steps), 0.005 + steps * 0.0025),
    }


KINDS = ("fawkes", "fawkes, targeted", "lowkey")


@pytest.mark.parametrize("name", KINDS)
def test_no_photos_no_cloaks(name, dlib):
    for dtype in (torch.float32, torch.float16):
        nothing = torch.zeros(0, 3, 112, 112, dtype=dtype)
        cloaked = kinds(dlib)[name][0](nothing)
        assert (cloaked.shape, cloaked.dtype) == (nothing.shape, dtype)
        assert cloaks.cached("nothing", kinds(dlib)[name][0], nothing, [dlib]).shape == nothing.shape


@pytest.mark.parametrize("name", KINDS)
def test_any_float_type_comes_back_within_the_budget(name, chips, dlib):
    make, most = kinds(dlib)[name]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = chips[:2].to(dtype)
        y = make(x)
        assert y.dtype == dtype
        assert 0 <= y.min() <= y.max() <= 1
        assert 0 < (y.double() - x.double()).abs().max() <= most
        if name == "fawkes":
            assert (cloaks.dssim(y, x) <= cloaks.FAWKES_10["low"][0]).all()
        if name == "fawkes, targeted":
            assert (cloaks.dssim(y, x) <= cloaks.FAWKES_03["high"][0]).all()


@pytest.mark.parametrize("name", KINDS)
def test_photos_and_targets_with_a_graph_are_detached(name, chips, dlib):
    make = kinds(dlib)[name][0]
    leaf = chips[:1].clone().requires_grad_(True)
    y = make(leaf * 1.0)
    assert not y.requires_grad
    assert leaf.grad is None
    assert torch.equal(y, make(chips[:1]))
    shift = torch.ones(1, 128).requires_grad_(True)
    cloaks.fawkes_targeted(chips[:1], [dlib], [shift], steps=1)
    assert shift.grad is None


def test_an_own_extractor_may_be_of_another_float_type_and_keeps_its_gradients(chips):
    network = torch.nn.Linear(3 * 112 * 112, 4).double().eval()  # not frozen

    class Extractor:
        def embed(self, images, fast=False):
            return network(images.double().flatten(1))

    for make in (cloaks.fawkes, cloaks.lowkey):
        y = make(chips[:2], [Extractor()], steps=2)
        assert y.dtype == torch.float32
        assert not torch.equal(y, chips[:2])
    assert all(p.grad is None for p in network.parameters())


def test_impossible_settings_are_refused(chips, dlib):
    for make in (cloaks.fawkes, cloaks.lowkey):
        for steps in (0, -1, 2.0, True):
            with pytest.raises(ValueError, match="steps must be a whole number"):
                make(chips[:1], [dlib], steps=steps)
        assert torch.equal(make(chips[:1], [dlib], steps=np.int64(1)), make(chips[:1], [dlib], steps=1))
    for targets in ([], [torch.zeros(2, 128)], [torch.zeros(1, 128)] * 2):
        with pytest.raises(ValueError, match="targets must be"):
            cloaks.fawkes_targeted(chips[:1], [dlib], targets)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 255.0])
@pytest.mark.parametrize("name", [*KINDS, "cached"])
def test_wrong_images_are_refused(name, bad, chips, dlib):
    make = kinds(dlib)[name][0] if name in KINDS else lambda x: cloaks.cached("a", lambda z: z, x, [dlib])
    x = chips[:1].clone()
    x[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="images must"):
        make(x)


def test_unknown_modes_are_refused(chips, dlib):
    with pytest.raises(ValueError, match="mode must be one of low, mid, high"):
        cloaks.fawkes(chips, [dlib], mode="ultra")


def test_cached_cloaks_are_made_once_and_again_if_they_are_damaged(chips, dlib, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path))
    made, x = [], chips[:2]

    def make(images):
        made.append(len(images))
        return 1 - images

    first = cloaks.cached("a", make, x, [dlib])
    torch.testing.assert_close(first, 1 - x, atol=0.5 / 255 + 1e-6, rtol=0)
    assert torch.equal(first * 255, (first * 255).round())
    assert torch.equal(first, cloaks.cached("a", make, x.double(), [dlib]).float())
    assert len(made) == 1
    (file,) = (tmp_path / "cloaks").glob("*/array.npy")
    content = bytearray(file.read_bytes())
    for damage in (content[:-5] + bytes([content[-5] ^ 1]) + content[-4:], content[:100], b""):
        file.write_bytes(damage)
        made.clear()
        with caplog.at_level("WARNING", progress.log.name):
            caplog.clear()
            assert torch.equal(first, cloaks.cached("a", make, x, [dlib]))
        assert made == [2]
        assert len(caplog.records) == 1
    made.clear()
    other = recognisers.load("dlib")
    next(other.network.parameters()).data[0] += 1
    for arguments in (("b", make, x, [dlib]), ("a", make, x[:1], [dlib]), ("a", make, x, []), ("a", make, x, [other]),
                      ("a", make, x, [recognisers.load("dlib", precision="float32")])):  # fmt: skip
        cloaks.cached(*arguments)
    assert len(made) == 5


def test_networks_are_left_alone(chips, dlib):
    before = {key: value.clone() for key, value in dlib.state_dict().items()}
    cloaks.fawkes(chips[:1], [dlib], steps=2)
    assert all(torch.equal(before[key], value) for key, value in dlib.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in dlib.parameters())


def test_options_of_cloaks_that_make_no_sense(chips, dlib):
    for options in ({"alpha": float("nan")}, {"alpha": 8}, {"price": -1}, {"seed": "a"}, {"steps": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            cloaks.lowkey(chips[:1], [dlib], **{"steps": 1} | options)
    for make in (cloaks.lowkey, cloaks.fawkes):
        with pytest.raises(ValueError, match="at least one extractor"):
            make(chips[:1], [], steps=1)
        for seed in ("a", -1, 1.5, None):
            with pytest.raises(errors.Invalid, match=r"^seed must be a whole number"):
                make(chips[:1], [dlib], steps=1, seed=seed)
    with pytest.raises(errors.Invalid, match=r"^seed must be a whole number"):
        cloaks.target_shifts([torch.ones(1, 2)], [torch.ones(1, 2)], torch.zeros(1), seed="a")
