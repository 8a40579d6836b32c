"""DDNM: operators obey their laws, the measurement is kept exactly, a batch is its images, and it purifies."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from faceadv import adaptive, attacks, ddnm, errors, objectives, precision, purifiers
from faceadv.networks import prior as prior_network

OPERATORS = {f"x{scale}": ddnm.super_resolution(scale) for scale in (2, 4, 8)} | {"colour": ddnm.colourisation()}


@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(0)
    unet = prior_network.build(16, (16, 32)).eval().requires_grad_(False)
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
    assert ddnm.times(3, 2) == [(2, 1), (1, 2), (2, 1), (1, 0), (0, 1), (1, 0), (0, -1)]
    assert ddnm.times(2, 3) == [(1, 0), (0, 1), (1, 0), (0, 1), (1, 0), (0, -1)]
    with pytest.raises(ValueError, match="from 1 to 1000, not 1001"):
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


class Knows(torch.nn.Module):
    """A perfect prior for one image x0 (1, 3, 16, 16) in [-1, 1], whatever it is asked to predict."""

    def __init__(self, x0, schedule, sample_size=16):
        super().__init__()
        self.x0, self.schedule, self.config = x0, schedule, SimpleNamespace(sample_size=sample_size)
        self.autocast = set()
        self.eval()

    def forward(self, noisy, t):
        a = self.schedule.alphas_cumprod[t]
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        e = (noisy - a.sqrt() * self.x0) / (1 - a).sqrt()
        v = a.sqrt() * e - (1 - a).sqrt() * self.x0
        answers = {"epsilon": e, "sample": self.x0.expand_as(noisy), "v_prediction": v}
        return SimpleNamespace(sample=answers[self.schedule.config.prediction_type])


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_prior_restores_whatever_it_predicts(kind, x, monkeypatch):
    """The noise follows from the image or from v (before: these were taken for the noise, and 0.5 off)."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    schedule = DDPMScheduler(prediction_type=kind)
    unet = Knows(x[:1], schedule)
    noisy, a = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), schedule.alphas_cumprod[300]
    expected = (noisy - a.sqrt() * x[:1]) / (1 - a).sqrt()
    torch.testing.assert_close(ddnm.guess(unet, noisy, 300, schedule), expected, atol=1e-4, rtol=1e-4)
    for name in ("x4", "colour"):
        out = ddnm.ddnm(OPERATORS[name][0](x[:1]), OPERATORS[name], unet, schedule, steps=5)
        torch.testing.assert_close(out, x[:1], atol=1e-3, rtol=0)
    image = (x[:1] + 1) / 2
    for purifier in (ddnm.TwoStage(unet, schedule, steps=4), ddnm.DiffPure(unet, schedule, time=500, steps=4)):
        torch.testing.assert_close(purifier(image), image, atol=1e-3, rtol=0)
    torch.testing.assert_close(ddnm.sample(unet, schedule, 1, steps=4), image, atol=1e-3, rtol=0)


def test_a_learned_variance_is_left_out(x):
    schedule = DDPMScheduler()
    unet, twice = Knows(x[:1], schedule), Knows(x[:1], schedule)
    twice.forward = lambda noisy, t: SimpleNamespace(sample=torch.cat([unet(noisy, t).sample, noisy + 7], 1))
    image = (x[:1] + 1) / 2
    for make in (ddnm.TwoStage, ddnm.DiffPure):
        assert torch.equal(make(twice, schedule, steps=2)(image), make(unet, schedule, steps=2)(image))


def test_an_unknown_prediction_is_refused(x):
    schedule = SimpleNamespace(alphas_cumprod=DDPMScheduler().alphas_cumprod)
    unet = Knows(x[:1], schedule)
    schedule.config = SimpleNamespace(prediction_type="flow_prediction")
    for use in (
        lambda: ddnm.TwoStage(unet, schedule),
        lambda: ddnm.DiffPure(unet, schedule),
        lambda: ddnm.ddnm(x[:, :, ::2, ::2], OPERATORS["x2"], unet, schedule),
    ):
        with pytest.raises(errors.Invalid, match=r'must predict one of .*it predicts "flow_prediction"\.$'):
            use()


def test_exact_is_float32_all_the_way_through_a_diffusion(x, monkeypatch):
    """Before: bfloat16 was switched on again inside (has_bfloat16 stands for hardware that has it)."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    schedule, image = DDPMScheduler(), (x[:1] + 1) / 2

    def objective(images, rows, exact):
        return images.sum((1, 2, 3)), torch.zeros(len(images), dtype=torch.bool)

    for make in (ddnm.TwoStage, ddnm.DiffPure):
        for exact in (True, False):
            unet = Knows(x[:1], schedule)
            with torch.no_grad():
                adaptive.through(make(unet, schedule, steps=2), objective)(image, torch.arange(1), exact)
            assert unet.autocast == {not exact}
        unet = Knows(x[:1], schedule)
        with precision.autocast("cpu", fast=False):
            make(unet, schedule, steps=2)(image)
        assert unet.autocast == {False}


def test_it_is_in_evaluation_mode_as_it_is_made_but_its_network_stays_as_it_was(x):
    schedule = DDPMScheduler()
    for training in (False, True):
        stage = ddnm.TwoStage(Knows(x[:1], schedule).train(training), schedule)
        modes = [stage, ddnm.Shortened(stage), ddnm.DiffPure(stage.unet, schedule)]
        assert not any(module.training for module in modes)
        assert stage.unet.training is training


PURIFIERS = {"two-stage": ddnm.TwoStage, "diffpure": ddnm.DiffPure}


@pytest.mark.parametrize("name", PURIFIERS)
def test_other_images_are_refused(name, orl, prior):
    """Before: x * 255 became a white picture, without a word."""
    purifier, x = PURIFIERS[name](*prior, steps=1), orl.images[:1]
    for bad in (x * 255, x[0], (x * 255).byte(), x - 0.5, x * float("nan")):
        with pytest.raises(errors.Invalid, match="images must"):
            purifier(bad)
    with pytest.raises(errors.Invalid, match="images must"):
        ddnm.measured(ddnm.TwoStage(*prior))(x * 255)


@pytest.mark.parametrize("name", PURIFIERS)
def test_height_and_width_are_kept(name, orl, x, monkeypatch):
    """Before: 112 x 96 became 96 x 96."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    tall = orl.images[:2, :, :, 8:104]
    schedule = DDPMScheduler()
    unet = Knows(ddnm.resized(tall[:1], 16) * 2 - 1, schedule)
    out = PURIFIERS[name](unet, schedule, steps=2)(tall)
    assert out.shape == tall.shape
    near = ddnm.resized(ddnm.resized(tall[:1], 16), (112, 96)).clamp(0, 1)
    torch.testing.assert_close(out[:1], near, atol=0.02, rtol=0)
    assert ddnm.measured(ddnm.TwoStage(unet, schedule))(tall).shape == tall.shape
    assert ddnm.resized(torch.rand(1, 3, 12, 16), 16).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", PURIFIERS)
def test_no_images_stay_none_and_global_random_numbers_are_left_alone(name, orl, prior):
    purifier = PURIFIERS[name](*prior, steps=1)
    assert purifier(orl.images[:0]).shape == (0, 3, 112, 112)
    before = torch.get_rng_state()
    first = purifier(orl.images[:1])
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, purifier(orl.images[:1]))


WRONG = {
    "two-stage": [
        *({"steps": value} for value in (0, 1001, 2.5, True)),
        *({"eta": value} for value in (1.2, -0.1, float("nan"), "1")),
        *({"scale": value} for value in (3, 0, 32, 2.0)),
        *({"stages": "one"}, {"seed": -1}, {"seed": 0.5}),
    ],
    "diffpure": [
        *({"steps": value} for value in (0, 1001, 2.5, True)),
        *({"time": value} for value in (0, 1000, 0.1)),
        *({"seed": -1}, {"seed": None}),
    ],
}


@pytest.mark.parametrize(("name", "options"), [(name, options) for name in WRONG for options in WRONG[name]])
def test_options_that_make_no_sense(name, options, prior):
    with pytest.raises(errors.Invalid, match=rf"^(The )?{next(iter(options))} .*not.*\.$"):
        PURIFIERS[name](*prior, **options)


def test_measurements_and_options_of_ddnm_that_make_no_sense(x, prior):
    A, inverse = OPERATORS["x2"]
    good = A(x)
    for bad in (good * 255, good * float("nan"), good[:, :1], good.byte()):
        with pytest.raises(errors.Invalid, match="measured must be"):
            ddnm.ddnm(bad, (A, inverse), *prior, steps=1)
    for options in ({"eta": 1.2}, {"steps": 0}, {"travel_repeat": 0}, {"travel_repeat": 1.5}):
        with pytest.raises(errors.Invalid, match=next(iter(options))):
            ddnm.ddnm(good, (A, inverse), *prior, **options)
    with pytest.raises(errors.Invalid, match="one seed per image"):
        ddnm.ddnm(good, (A, inverse), *prior, steps=1, seeds=[0])
    for scale in (0, 2.0, True):
        with pytest.raises(errors.Invalid, match="scale must be a whole number"):
            ddnm.super_resolution(scale)
    with pytest.raises(errors.Invalid, match="multiples of the scale 3, not 16 x 16"):
        ddnm.super_resolution(3)[0](x)
    with pytest.raises(errors.Invalid, match="steps must be"):
        ddnm.Shortened(ddnm.TwoStage(*prior), steps=0)
    with pytest.raises(errors.Invalid, match="count must be"):
        ddnm.sample(*prior, 0)


def test_what_a_diffusion_restored_is_kept_part_by_part(x, prior, monkeypatch, tmp_path):
    """A run that dies in its second part keeps the first; another seed, prior or image is another entry."""
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path))
    images, purifier = (x + 1) / 2, ddnm.TwoStage(*prior, steps=2, seed=3)
    with torch.no_grad():
        wanted = torch.cat([purifier(part) for part in images.split(2)])
    calls, whole = [], ddnm.TwoStage.forward

    def dying(self, part):
        calls.append(len(part))
        if calls == [2, 1]:
            raise KeyboardInterrupt
        return whole(self, part)

    monkeypatch.setattr(ddnm.TwoStage, "forward", dying)
    with pytest.raises(KeyboardInterrupt):
        ddnm.restored(purifier, images, batch=2)
    made = ddnm.restored(purifier, images, batch=2)
    assert calls == [2, 1, 1]
    torch.testing.assert_close(made, wanted, atol=2**-11, rtol=0)
    assert torch.equal(ddnm.restored(purifier, images, batch=2), made)
    assert calls == [2, 1, 1]
    ddnm.restored(ddnm.TwoStage(*prior, steps=2, seed=4), images, batch=2)
    other = copy.deepcopy(prior[0])
    next(other.parameters()).data.add_(1)
    ddnm.restored(ddnm.TwoStage(other, prior[1], steps=2, seed=3), images, batch=2)
    ddnm.restored(purifier, 1 - images, batch=2)
    assert calls[3:] == [2, 1] * 3
    assert torch.equal(ddnm.restored(purifiers.blur(), images), purifiers.blur()(images))
    assert ddnm.restored(purifier, images[:0]).shape == images[:0].shape
