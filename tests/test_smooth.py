"""Smooth stand-ins are near what they stand for, have a slope, and make an attack through it succeed."""

import pytest
import torch

from faceadv import adaptive, attacks, objectives, purifiers, recognisers, smooth


def test_rounding_is_near_and_has_a_slope():
    x = torch.linspace(-2, 2, 401, dtype=torch.float64, requires_grad=True)
    y = smooth.rounded(x)
    assert (y - x.round()).abs().max() <= 0.125 + 1e-9
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, 3 * (x - x.round()).detach() ** 2)


NEAR = [("jpeg", {"quality": 75}, 0.012), ("jpeg", {"quality": 30}, 0.02), ("bit-depth", {"bits": 3}, 0.02)]


@pytest.mark.parametrize(("name", "options", "most"), NEAR)
def test_a_stand_in_is_near_the_defence(name, options, most, orl):
    x = orl.images[:6]
    near, real = smooth.STAND_INS[name](**options)(x), purifiers.load(name, **options)(x)
    assert (near - real).abs().mean() < most
    assert (near - real).abs().mean() < 0.6 * (x - real).abs().mean()  # nearer than the photo itself


def test_any_size_is_taken_and_constant_images_stay():
    x = torch.full((1, 3, 37, 50), 0.5)
    assert (smooth.jpeg(95)(x) - x).abs().max() < 0.01


@pytest.mark.parametrize("name", ["jpeg", "bit-depth"])
def test_an_attack_through_it_is_at_least_as_good_as_through_the_identity(name, orl, dlib):
    x, y = orl.images[0:60:10], orl.images[1:60:10]
    enrolled, defence = recognisers.embed_all(dlib, y), purifiers.load(name)
    objective = objectives.dodging(dlib, enrolled, dlib.threshold)
    gone = {}
    for what, behind in (("stand-in", smooth.STAND_INS[name]()), ("identity", None)):
        goal = adaptive.through(adaptive.straight_through(defence, behind), objective)
        z = attacks.pgd(x, goal, eps=2 / 255, steps=5)
        gone[what] = dlib.distance(recognisers.embed_all(dlib, defence(z)), enrolled).mean().item()
    clean = dlib.distance(recognisers.embed_all(dlib, defence(x)), enrolled).mean().item()
    assert gone["stand-in"] > clean + 0.1
    assert gone["identity"] > clean
