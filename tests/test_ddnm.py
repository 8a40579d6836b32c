"""DDNM: operators obey their laws, the measurement is kept exactly, a batch is its images, and it purifies."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from faceadv import adaptive, attacks, ddnm, objectives, precision, purifiers

OPERATORS = {f"x{scale}": ddnm.super_resolution(scale) for scale in (2, 4, 8)} | {"colour": ddnm.colourisation()}


@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(0)
    unet = prior.build(16, (16, 32)).eval().requires_grad_(False)
    return unet, DDPMScheduler()


@pytest.fixture(scope="module")
def x():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", OPERATORS)
def test_pseudo_inverse(name, x):
    """Means, and Penrose's conditions: A A+ A = A, A+ A A+ = A+, A+ A and A A+ symmetric."""
    A, inverse = OPERATORS[name]
    torch.testing.assert_close(A(torch.ones_like(x)), torch.ones_like(A(x)))
    torch.testing.assert_close(A(inverse(A(x))), A(x))
    torch.testing.assert_close(inverse(A(inverse(A(x)))), inverse(A(x)))
    basis = torch.eye(3 * 16 * 16).reshape(-1, 3, 16, 16)
    projection = inverse(A(basis)).reshape(len(basis), -1)
    torch.testing.assert_close(projection, projection.T)
    small = torch.eye(A(x[:1]).numel()).reshape(-1, *A(x).shape[1:])
    torch.testing.assert_close(A(inverse(small)), small)  # the identity, as A has full rank


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("travel", [1, 2])
def test_the_output_has_the_measurement(name, travel, x, prior):
    measured = OPERATORS[name][0](x)
    out = ddnm.ddnm(measured, OPERATORS[name], *prior, steps=4, travel_repeat=travel)
    assert out.shape == x.shape
    torch.testing.assert_close(OPERATORS[name][0](out), measured, atol=1e-4, rtol=0)


def test_a_batch_is_its_images(x, prior):
    operator = OPERATORS["x2"]
    measured = operator[0](x)
    whole = ddnm.ddnm(measured, operator, *prior, steps=3, seeds=[5, 6, 7])
    for i in range(3):
        alone = ddnm.ddnm(measured[i : i + 1], operator, *prior, steps=3, seeds=[5 + i])
        torch.testing.assert_close(alone[0], whole[i], atol=2e-2, rtol=0)
    other = ddnm.ddnm(measured, operator, *prior, steps=3, seeds=[8, 9, 10])
    assert not torch.allclose(other, whole, atol=1e-2)


@pytest.mark.parametrize("eta", [0.0, 0.85, 1.0])
def test_it_is_the_published_loop(eta, x, monkeypatch):
    """Written out once more, with a network that depends on image and time."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    sums = DDPMScheduler().alphas_cumprod.double()
    asked = []

    def network(noisy, t):
        asked.append(int(t))
        return SimpleNamespace(sample=0.3 * noisy + 0.1 * t / 1000)

    A, inverse = OPERATORS["x4"]
    out = ddnm.ddnm(A(x[:1]), (A, inverse), network, DDPMScheduler(), steps=4, eta=eta, seeds=[3])
    assert asked == [750, 500, 250, 0]
    draw, y = torch.Generator().manual_seed(3), A(x[:1]).double()
    z = torch.randn(x.shape[1:], generator=draw)[None].double()
    for t, s in ((750, 500), (500, 250), (250, 0), (0, None)):
        e = 0.3 * z + 0.1 * t / 1000
        clean = ((z - (1 - sums[t]) ** 0.5 * e) / sums[t] ** 0.5).clamp(-1, 1)
        blocks = clean.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5))
        clean = clean + torch.kron(y - blocks, torch.ones(4, 4))
        if s is None:
            z = clean
        else:
            xi = torch.randn(x.shape[1:], generator=draw)[None].double()
            z = sums[s] ** 0.5 * clean + (1 - sums[s]) ** 0.5 * (eta * xi + (1 - eta**2) ** 0.5 * e)
    torch.testing.assert_close(out.double(), z, atol=1e-4, rtol=1e-4)


def test_time_travel_makes_the_prediction_noisy_again(x, monkeypatch):
    """Not the corrected one: its noise is new, its measurement is put back at the next step."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    sums, seen = DDPMScheduler().alphas_cumprod, []

    def network(noisy, t):
        seen.append((int(t), noisy))
        return SimpleNamespace(sample=torch.zeros_like(noisy))

    A, inverse = OPERATORS["x2"]
    ddnm.ddnm(A(x[:1]), (A, inverse), network, DDPMScheduler(), steps=2, eta=0.0, travel_repeat=2, seeds=[0])
    assert [t for t, _ in seen] == [500, 500, 0]
    draw = torch.Generator().manual_seed(0)
    for _ in range(2):  # the start, and the noise that eta = 0 does not use
        torch.randn(x.shape[1:], generator=draw)
    predicted = (seen[0][1] / sums[500].sqrt()).clamp(-1, 1)
    back = sums[500].sqrt() * predicted + (1 - sums[500]).sqrt() * torch.randn(x.shape[1:], generator=draw)
    torch.testing.assert_close(seen[1][1], back, atol=1e-5, rtol=1e-5)


def test_order_of_the_steps():
    assert ddnm.times(3) == [(2, 1), (1, 0), (0, -1)]
    assert ddnm.times(3, 1, 2) == [(2, 1), (1, 2), (2, 1), (1, 0), (0, 1), (1, 0), (0, -1)]
    assert ddnm.times(4, 2, 2) == [(3, 2), (2, 1), (1, 0), (0, 2), (2, 1), (1, 0), (0, -1)]
    with pytest.raises(ValueError, match="between 1 and 1000, not 1001"):
        ddnm.ddnm(torch.zeros(1, 3, 8, 8), OPERATORS["x2"], None, DDPMScheduler(), steps=1001)


def test_two_stage(orl, prior):
    images = orl.images[:2]
    out = {}
    for stages in ("both", "super-resolution", "colourisation"):
        stage = ddnm.TwoStage(*prior, steps=2, stages=stages, seed=5)
        out[stages] = stage(images)
        assert out[stages].shape == images.shape
        assert 0 <= out[stages].min() <= out[stages].max() <= 1
        alone = ddnm.TwoStage(*prior, steps=2, stages=stages, seed=6)(images[1:])
        torch.testing.assert_close(alone, out[stages][1:], atol=0.03, rtol=0)
        x = ddnm.resized(images, 16) * 2 - 1
        grey = [F.avg_pool2d(z.mean(1, keepdim=True), 2) for z in (x, stage.restore(x))]
        torch.testing.assert_close(*grey, atol=1e-4, rtol=0)  # what both stages keep
    assert not torch.allclose(out["both"], out["super-resolution"], atol=1e-2)
    assert not torch.allclose(out["both"], out["colourisation"], atol=1e-2)
    moved, stage = images.clone().requires_grad_(True), ddnm.TwoStage(*prior, steps=4, seed=5)
    short = ddnm.Shortened(stage, steps=2)
    one, two = short(moved), short(moved)
    one.sum().backward()
    assert moved.grad.abs().sum() > 0
    assert not torch.allclose(one, two, atol=1e-2)  # other noise
    assert (stage.steps, stage.seed) == (4, 5)
    for stages, colours in (("super-resolution", True), ("colourisation", False), ("both", False)):
        coloured = images * torch.tensor([1.0, 0.8, 0.5])[:, None, None]
        what = ddnm.measured(ddnm.TwoStage(*prior, stages=stages))(coloured)
        assert (what[:, 0] - what[:, 2]).abs().max().item() > 0.05 if colours else torch.equal(what[:, 0], what[:, 2])
    with pytest.raises(ValueError, match="stages are both"):
        ddnm.TwoStage(*prior, stages="one")


def test_diffpure_goes_back_along_a_network_that_knows_the_image(x, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    sums, asked = DDPMScheduler().alphas_cumprod, []
    image = (x + 1) / 2

    class Knows(torch.nn.Module):
        config = SimpleNamespace(sample_size=16)

        def forward(self, noisy, t):
            asked.append(int(t))
            return SimpleNamespace(sample=(noisy - sums[t].sqrt() * x * 0.5) / (1 - sums[t]).sqrt())

    out = ddnm.DiffPure(Knows(), DDPMScheduler(), time=100, steps=5)(image)
    assert asked == [100, 80, 60, 40, 20]
    torch.testing.assert_close(out, (x * 0.5 + 1) / 2, atol=1e-4, rtol=0)


def test_straight_through():
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    out = adaptive.straight_through(lambda z: (z > 0.5).float())(x)
    torch.testing.assert_close(out, (x > 0.5).float())
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    x.grad = None
    out = adaptive.straight_through(lambda z: (z > 0.5).float(), lambda z: z * 3)(x)
    torch.testing.assert_close(out, (x > 0.5).float())
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3.0))


@pytest.mark.parametrize("name", ["two-stage", "diffpure"])
def test_the_shipped_prior_beats_doing_nothing(name, orl, dlib):
    rows = torch.arange(0, 400, 40)
    x, reference = orl.images[rows], dlib.embed(orl.images[rows + 1])
    objective = objectives.dodging(dlib, reference, 0.6)
    z = attacks.pgd(x, objective, eps=4 / 255, alpha=1 / 255, steps=10)
    purifier = purifiers.load(name, steps=5)
    with torch.no_grad():
        clean, attacked, bare = (dlib.distance(dlib.embed(i), reference) < 0.6 for i in (purifier(x), purifier(z), z))
    assert clean.float().mean() >= 0.8
    assert attacked.float().mean() >= bare.float().mean() + 0.5
