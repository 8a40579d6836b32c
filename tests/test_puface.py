"""PuFace: starts as the identity, learns to take cloaks off, and ships what it says."""

import numpy as np
import pytest
import torch

from faceadv import adaptive, cloaks, metrics, purifiers
from faceadv.networks import puface
from faceadv.training import puface as train_puface


def cloaked(images):
    """A stand-in for a cloak, quick to make: a pattern of at most 15 grey levels."""
    return (images + 15 / 255 * torch.sign(torch.sin(torch.arange(112) * 2.0))).clamp(0, 1)


def test_starts_as_the_identity_and_keeps_the_range(orl):
    network = puface.PuFace((8, 16, 24)).eval()
    x = orl.images[:2]
    torch.testing.assert_close(network(x), x)
    torch.nn.init.normal_(network.tail.weight)
    moved = network(x)
    assert moved.shape == x.shape
    assert 0 <= moved.min() <= moved.max() <= 1


def test_amplify(orl):
    x = orl.images[:3]
    c = cloaked(x)
    assert torch.equal(train_puface.amplify(x, c, 0), x)
    torch.testing.assert_close(train_puface.amplify(x, c, 1.0), c)
    each = train_puface.amplify(x, c, torch.tensor([0.0, 1.0, 3.0]))
    torch.testing.assert_close(each[2], (x[2] + 3 * (c[2] - x[2])).clamp(0, 1))
    assert torch.equal(each[0], x[0])


def test_losses(orl, dlib):
    x, other = orl.images[:2], orl.images[10:12]
    value = train_puface.terms(other, x, [dlib])
    assert value["image"] == pytest.approx((other - x).abs().mean().item())
    cosine = torch.nn.functional.cosine_similarity(dlib.embed(other), dlib.embed(x)).mean()
    assert value["feature"] == pytest.approx(1 - cosine.item(), abs=0.02)  # in bfloat16
    assert all(v == pytest.approx(0, abs=1e-3) for v in train_puface.terms(x, x, [dlib]).values())


def test_training_learns(orl, dlib):
    natural = np.array(orl.chips[:24])
    worn = (cloaked(orl.images[:24]) * 255).round().byte().numpy()
    network, log = train_puface.train(natural, worn, [dlib], {"steps": 40, "batch": 4, "lr": 2e-3})
    assert set(log[0]) == {"step", "image", "feature"}
    x, c = orl.images[:24], cloaked(orl.images[:24])
    assert (network(c) - x).abs().mean() < 0.5 * (c - x).abs().mean()


def test_each_part_of_the_loss_can_be_left_out(orl, dlib):
    natural = np.array(orl.chips[:8])
    worn = (cloaked(orl.images[:8]) * 255).round().byte().numpy()
    tails = []
    for options in ({}, {"beta": 0.0}, {"beta": None}, {"kappa": (1.0, 1.0)}):
        network, _ = train_puface.train(natural, worn, [dlib], {"steps": 3, "batch": 4} | options)
        tails.append(network.tail.weight)
    assert all(not torch.equal(tails[0], other) for other in tails[1:])


def test_the_shipped_network_takes_a_cloak_off_and_leaves_photos_alone(orl, dlib):
    purifier = purifiers.load("puface")
    x = orl.images[0:120:10]
    worn = cloaks.fawkes(x, [dlib], mode="mid", steps=30)
    before = (cloaks.features(dlib, worn) - cloaks.features(dlib, x)).norm(dim=1).mean()
    after = (cloaks.features(dlib, purifier(worn)) - cloaks.features(dlib, x)).norm(dim=1).mean()
    assert after < 0.6 * before
    assert (cloaks.features(dlib, purifier(x)) - cloaks.features(dlib, x)).norm(dim=1).mean() < 0.5 * before
    assert metrics.ssim(purifier(x), x).mean() > 0.9
    through = cloaks.fawkes(x, [adaptive.purified(dlib, purifier)], mode="mid", steps=30)
    adapted = (cloaks.features(dlib, purifier(through)) - cloaks.features(dlib, x)).norm(dim=1).mean()
    assert adapted > 1.5 * after
    assert (cloaks.dssim(through, x) <= cloaks.FAWKES_10["mid"][0]).all()
    assert all(p.grad is None and not p.requires_grad for p in purifier.parameters())


def test_cloaks_are_made_once(orl, dlib, tmp_path, monkeypatch):
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path))
    made = []

    def make(images):
        made.append(len(images))
        return cloaked(images)

    x = orl.images[:2]
    first = cloaks.cached("a", make, x, [dlib])
    assert torch.equal(first, cloaks.cached("a", make, x, [dlib]))
    assert made == [2]
    torch.testing.assert_close(first, cloaked(x), atol=0.5 / 255 + 1e-6, rtol=0)
    cloaks.cached("b", make, x, [dlib])
    cloaks.cached("a", make, orl.images[1:3], [dlib])
    cloaks.cached("a", make, x, [])
    assert len(made) == 4


def test_the_profiles_photos_are_of_training_people_and_cloaked(orl, monkeypatch):
    monkeypatch.setattr("faceadv.faces.load", lambda name, root=None: orl)  # LFW takes minutes to align
    monkeypatch.setattr("faceadv.pairs.lfw_people", lambda faces, which: faces.names[:10])
    natural, worn, extractors = train_puface.photos("smoke", seed=1)
    assert natural.shape == worn.shape == (train_puface.SETTINGS["smoke"]["photos"], 3, 112, 112)
    assert worn.dtype == np.uint8
    known = {chip.tobytes() for chip in orl.chips[:100]}
    assert all(chip.tobytes() in known for chip in natural)
    assert (natural != worn).any()
    assert np.abs(natural.astype(int) - worn).max() < 100  # the same photos, in the same order
    assert [extractor.name for extractor in extractors] == ["dlib", "mobilefacenet"]
    assert not np.array_equal(natural, train_puface.photos("smoke", seed=2)[0])
