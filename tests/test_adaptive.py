"""Attacks through purifiers: votes are counted exactly, precision is honoured, nothing in the chain is in training."""

import functools

import pytest
import torch
from torch import nn

from faceadv import adaptive, attacks, cloaks, objectives, precision, purifiers, recognisers

EPS = 8 / 255
in_training = nn.Dropout(0.5)  # own functions find it by its global name


@pytest.fixture(scope="module")
def dodge(orl, dlib):
    """Two photos, and the objective to dodge other photos of the two."""
    return orl.images[0:20:10], objectives.dodging(dlib, recognisers.embed_all(dlib, orl.images[1:21:10]))


def darkness(images, rows, exact=False):
    loss = images.square().sum((1, 2, 3))
    return loss, loss.detach() < 1


@pytest.fixture
def plane():
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("samples", [1, 2, 3, 10, 19, 20, 21, 22, 28, 36])
def test_more_than_half_of_the_samples_is_counted_exactly(samples, plane):
    for hits in range(samples + 1):
        turns = iter([True] * hits + [False] * (samples - hits))

        def objective(images, rows, exact=False, turns=turns):
            return images.mean((1, 2, 3)), torch.full(rows.shape, next(turns))

        loss, reached = adaptive.through(lambda x: x, objective, samples)(plane, torch.arange(3))
        assert reached.tolist() == [hits > samples / 2] * 3
        torch.testing.assert_close(loss, plane.mean((1, 2, 3)))


@pytest.mark.parametrize("samples", [0, -1, 2.0, True])
def test_samples_are_whole_numbers(samples):
    with pytest.raises(ValueError, match="samples must be a whole number"):
        adaptive.through(lambda x: x, darkness, samples)


def asks_for_speed(seen):
    """A purifier as the diffusions are: what it is made of asks for bfloat16 again."""

    def purifier(images):
        seen.append((images[:, :, :1, :3] @ torch.ones(3, 3)).dtype)
        with precision.autocast(images.device):
            seen.append((images[:, :, :1, :3] @ torch.ones(3, 3)).dtype)
        return images

    return purifier


@pytest.mark.parametrize("mode", ["auto", "float32"])
def test_a_recogniser_in_float32_makes_the_whole_chain_float32(mode, orl, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    recogniser, x, rows, seen = recognisers.load("dlib", precision=mode), orl.images[:1], torch.arange(1), []
    recogniser.network.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    objective = objectives.dodging(recogniser, torch.zeros(1, 128))
    chain = adaptive.through(asks_for_speed(seen), objective)
    fast = torch.bfloat16 if mode == "auto" else torch.float32
    chain(x, rows)
    assert seen == [fast] * 3
    seen.clear()
    chain(x, rows, exact=True)
    assert seen == [torch.float32] * 3
    seen.clear()
    adaptive.through(lambda z: z, chain)(x, rows)
    adaptive.purified(recogniser, asks_for_speed(seen)).embed(x, fast=True)
    assert seen == [fast] * 6
    seen.clear()
    adaptive.purified(recogniser, asks_for_speed(seen)).embed(x)
    objectives.success(chain, x)
    assert seen == [torch.float32] * 6


def test_a_classifier_that_may_not_be_fast_makes_the_purifier_exact(monkeypatch, plane):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    seen = []
    for fast in (True, False):
        objective = objectives.untargeted(lambda x: x.flatten(1)[:, :5], torch.zeros(3, dtype=torch.uint8), fast=fast)
        adaptive.through(asks_for_speed(seen), objective)(plane, torch.arange(3))
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2


def chains(purifier, objective):
    """Every way in which a module can be part of an attack: package and own callables."""
    held = [purifier]

    def function(images, rows, exact=False):
        return objective(purifier(images), rows, exact)

    def hidden(images, rows, exact=False):
        return objective(held[0](images), rows, exact)

    class Own:
        def __init__(self):
            self.module = purifier

        def loss(self, images, rows, exact=False):
            return objective(self.module(images), rows, exact)

        __call__ = loss

    return {
        "through": adaptive.through(purifier, objective),
        "straight_through": adaptive.through(adaptive.straight_through(purifier), objective),
        "stand-in": adaptive.through(adaptive.straight_through(lambda x: x, purifier), objective),
        "twice": adaptive.through(lambda x: x, adaptive.through(purifier, objective)),
        "closure": function,
        "list": hidden,
        "method": Own().loss,
        "object": Own(),
        "partial": functools.partial(lambda p, x, rows, exact=False: objective(p(x), rows, exact), purifier),
        "lambda": adaptive.through(lambda x: purifier(x), objective),
    }


@pytest.mark.parametrize("name", chains(None, darkness))
def test_a_purifier_in_training_mode_is_refused_and_left_alone(name, plane):
    purifier = purifiers.load("resgn").train()
    before = {key: value.clone() for key, value in purifier.state_dict().items()}
    objective = chains(purifier, darkness)[name]
    for run in (
        lambda: attacks.fgsm(plane, objective, eps=EPS),
        lambda: attacks.pfgvm(plane, objective, alpha=0.1, lam=0.1, steps=1),
        lambda: objectives.success(objective, plane),
    ):
        with pytest.raises(ValueError, match=r"A ResGN is in training mode.*call \.eval\(\)"):
            run()
    assert all(torch.equal(before[key], value) for key, value in purifier.state_dict().items())
    purifier.eval()
    assert not torch.equal(attacks.fgsm(plane, objective, eps=EPS), plane)


def test_modules_that_own_functions_know_by_a_global_name_are_found(plane):
    def objective(images, rows, exact=False):
        return darkness(in_training(images), rows)

    with pytest.raises(ValueError, match="A Dropout is in training mode"):
        attacks.fgsm(plane, objective, eps=EPS)


def test_the_mode_is_looked_at_when_the_attack_runs(orl, plane):
    recogniser = recognisers.load("dlib")
    verification = objectives.dodging(recogniser, torch.zeros(1, 128))
    classifier = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192)).eval()
    classification = objectives.targeted(classifier, torch.zeros(3, dtype=torch.long))
    recogniser.network.train()
    classifier[1].train()
    for x, objective in ((orl.images[:1], verification), (plane, classification)):
        with pytest.raises(ValueError, match="in training mode"):
            objective(x, torch.arange(len(x)))
        with pytest.raises(ValueError, match="in training mode"):
            attacks.fgsm(x, objective, eps=EPS)
    assert classifier[1].num_batches_tracked == 0
    with pytest.raises(ValueError, match="in training mode"):
        cloaks.lowkey(orl.images[:1], [recogniser], steps=1)


def test_cloaks_refuse_a_purifier_in_training_mode(orl, dlib):
    purifier = purifiers.load("resgn").train()
    before = {key: value.clone() for key, value in purifier.state_dict().items()}
    behind = adaptive.purified(dlib, purifier)
    for make in (cloaks.fawkes, cloaks.lowkey):
        with pytest.raises(ValueError, match="in training mode"):
            make(orl.images[:1], [behind], steps=1)
    with pytest.raises(ValueError, match="in training mode"):
        behind.embed(orl.images[:1])
    assert all(torch.equal(before[key], value) for key, value in purifier.state_dict().items())


def test_an_attack_through_a_purifier_succeeds_in_its_budget_from_any_float_type(dodge):
    x, objective = dodge
    through = adaptive.through(purifiers.load("blur", sigma=1.0), objective, samples=1)
    assert not objectives.success(through, x).any()
    for dtype in (torch.float32, torch.float16, torch.float64):
        photos = x.to(dtype, copy=True).requires_grad_(True)
        y = attacks.pgd(photos, through, eps=EPS, steps=8)
        assert y.dtype == dtype
        assert not y.requires_grad
        assert photos.grad is None
        assert (y.double() - photos.detach().double()).abs().max() <= EPS + 1e-7
        assert objectives.success(through, y).all()


def test_a_purifier_without_a_gradient_is_refused_in_a_sentence(plane):
    with pytest.raises(ValueError, match=r"adaptive\.straight_through"):
        attacks.fgsm(plane, adaptive.through(purifiers.load("jpeg"), darkness), eps=EPS)
    through = adaptive.through(adaptive.straight_through(purifiers.load("jpeg")), darkness)
    y = attacks.fgsm(plane, through, eps=EPS)
    assert (darkness(y, None)[0] < darkness(plane, None)[0]).all()


def test_modules_in_training_mode_are_found_wherever_they_hide(plane):
    norm = nn.BatchNorm2d(3)
    hidden = purifiers.Filter(lambda images: norm(images).sigmoid()).eval()
    plain = nn.Identity().eval()
    plain.others = [norm]  # a list, of which torch knows nothing

    def by_default(images, module=norm):
        return module(images).sigmoid()

    for purifier in (hidden, plain, by_default):
        before = norm.running_mean.clone()
        with pytest.raises(ValueError, match="A BatchNorm2d is in training mode"):
            attacks.fgsm(plane, adaptive.through(purifier, darkness), eps=EPS)
        assert torch.equal(norm.running_mean, before)


def test_names_of_attributes_are_no_global_names(plane, monkeypatch):
    monkeypatch.setitem(globals(), "network", nn.BatchNorm2d(3))  # in training mode, and not used

    class Holder:
        network = staticmethod(lambda images: images)

    holder = Holder()
    attacks.fgsm(plane, adaptive.through(lambda images: holder.network(images), darkness), eps=EPS)


def test_a_slow_attack_is_made_once(monkeypatch, tmp_path):
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path))
    calls, images = [], torch.rand(2, 3, 4, 4)

    def make():
        calls.append(1)
        return images

    for _ in range(2):
        assert torch.equal(adaptive.kept("BPDA", make, [images, {"steps": 3}]), images)
    assert len(calls) == 1
    adaptive.kept("BPDA", make, [images, {"steps": 4}])
    adaptive.kept("surrogate", make, [images, {"steps": 4}])
    assert len(calls) == 3
