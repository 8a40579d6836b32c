"""Every attack succeeds on real faces, keeps its budget, does nothing at eps = 0 and leaves the network alone."""

import warnings

import pytest
import torch
from torch import nn

from faceadv import attacks, metrics, objectives, precision, recognisers

EPS = 8 / 255
ATTACKS = {
    "fgsm": lambda x, o, eps: attacks.fgsm(x, o, eps=eps),
    "ifgsm": lambda x, o, eps: attacks.ifgsm(x, o, eps=eps, steps=5),
    "ifgvm": lambda x, o, eps: attacks.ifgvm(x, o, eps=eps, alpha=1.0, steps=8),
    "pgd": lambda x, o, eps: attacks.pgd(x, o, eps=eps, steps=5),
    "mifgsm": lambda x, o, eps: attacks.mifgsm(x, o, eps=eps, steps=5),
}


@pytest.fixture(scope="module")
def goals(orl, dlib):
    """Eight dodging and eight impersonation problems: photos and objective."""
    embeddings = recognisers.embed_faces(dlib, orl)
    x = orl.images[0:80:10]
    return {
        "dodging": (x, objectives.dodging(dlib, embeddings[1:81:10])),
        "impersonation": (x, objectives.impersonation(dlib, embeddings[300:380:10])),
    }


@pytest.fixture(scope="module")
def classifier(orl, dlib):
    """Logits = -d² to the mean embedding of each of ten people."""
    embeddings = recognisers.embed_faces(dlib, orl)
    centres = torch.stack([embeddings[orl.labels == i].mean(0) for i in range(10)])

    class NearestCentre(nn.Module):
        def forward(self, images):
            return -10 * (dlib.embed(images)[:, None] - centres).square().sum(2)

    return NearestCentre().eval()


@pytest.mark.parametrize("goal", ["dodging", "impersonation"])
@pytest.mark.parametrize("name", ATTACKS)
def test_succeeds_within_budget(name, goal, goals, dlib):
    x, objective = goals[goal]
    before = {key: value.clone() for key, value in dlib.state_dict().items()}
    original = x.clone()
    assert not objectives.success(objective, x).any()
    y = ATTACKS[name](x, objective, EPS)
    assert objectives.success(objective, y).float().mean() >= 0.75
    assert metrics.linf(x, y).max() <= EPS + 1e-6
    assert y.min() >= 0
    assert y.max() <= 1
    assert torch.equal(x, original)
    assert not y.requires_grad
    assert not dlib.training
    assert all(torch.equal(before[key], value) for key, value in dlib.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in dlib.parameters())


@pytest.mark.parametrize("name", ATTACKS)
def test_no_budget_no_change(name, goals):
    x, objective = goals["dodging"]
    assert torch.equal(ATTACKS[name](x[:2], objective, 0.0), x[:2])


def test_l2_budget(goals):
    x, objective = goals["dodging"]
    y = attacks.pgd(x, objective, eps=3.0, steps=8, norm="l2")
    assert objectives.success(objective, y).float().mean() >= 0.75
    assert metrics.l2(x, y).max() <= 3.0 + 1e-4
    assert 0 <= y.min() <= y.max() <= 1


@pytest.mark.parametrize("kind", ["targeted", "untargeted"])
def test_classifier(kind, orl, classifier):
    x, labels = orl.images[0:100:10], torch.arange(10)
    wanted = (labels + 3) % 10
    objective = (
        objectives.targeted(classifier, wanted) if kind == "targeted" else objectives.untargeted(classifier, labels)
    )
    y = attacks.pgd(x, objective, eps=EPS, steps=10)
    said = classifier(y).argmax(1)
    assert (said == wanted).all() if kind == "targeted" else (said != labels).all()


def test_a_classifier_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        objectives.targeted(nn.Flatten().train(), torch.zeros(1))


def test_agrees_with_foolbox(orl, classifier):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # foolbox's own imports
        import foolbox

        model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device="cpu")
    x, labels = orl.images[0:40:10], torch.arange(4)
    objective = objectives.untargeted(classifier, labels, fast=False)
    fa = foolbox.attacks
    steps, alpha = 4, EPS / 3
    pairs = [
        (fa.LinfFastGradientAttack(random_start=False), EPS, attacks.fgsm(x, objective, eps=EPS)),
        (
            fa.LinfPGD(abs_stepsize=alpha, steps=steps, random_start=False),
            EPS,
            attacks.ifgsm(x, objective, eps=EPS, alpha=alpha, steps=steps),
        ),
        (
            fa.L2PGD(abs_stepsize=0.4, steps=steps, random_start=False),
            1.0,
            attacks.pgd(x, objective, eps=1.0, alpha=0.4, steps=steps, norm="l2", random_start=False),
        ),
    ]
    for attack, eps, ours in pairs:
        _, theirs, _ = attack(model, x, foolbox.criteria.Misclassification(labels), epsilons=eps)
        # rounding may turn the sign of a slope near zero, and grows from step to step
        assert ((ours - theirs).norm() / (theirs - x).norm()).item() < 0.05


def test_momentum_against_its_equations(goals):
    x, objective = goals["dodging"]
    x, rows = x[:2], torch.arange(2)
    y, m = x.clone(), torch.zeros_like(x)
    for _ in range(3):
        y.requires_grad_(True)
        (g,) = torch.autograd.grad(objective(y, rows)[0].sum(), y)
        m = 0.9 * m + g / g.abs().sum((1, 2, 3), keepdim=True)
        y = (x + (y.detach() - 0.01 * m.sign() - x).clamp(-0.02, 0.02)).clamp(0, 1)
    ours = attacks.mifgsm(x, objective, eps=0.02, alpha=0.01, steps=3, mu=0.9)
    assert ((ours - y).abs() > 1e-5).float().mean() < 1e-3


def test_raw_gradient_step(goals):
    x, objective = goals["dodging"]
    y = x[:2].clone().requires_grad_(True)
    (g,) = torch.autograd.grad(objective(y, torch.arange(2))[0].sum(), y)
    expected = (x[:2] - 0.1 * g).clamp(x[:2] - EPS, x[:2] + EPS).clamp(0, 1)
    torch.testing.assert_close(attacks.ifgvm(x[:2], objective, eps=EPS, alpha=0.1, steps=1), expected)


def test_early_stop_changes_less_and_succeeds(goals):
    x, objective = goals["impersonation"]
    full = attacks.pgd(x, objective, eps=EPS, steps=10)
    stopped = attacks.pgd(x, objective, eps=EPS, steps=10, stop_early=True)
    assert objectives.success(objective, stopped).float().mean() >= objectives.success(objective, full).float().mean()
    assert metrics.ssim(stopped, x).mean() > metrics.ssim(full, x).mean()


def test_best_iterate_is_kept():
    def objective(images, rows, exact=False):  # lowest at 0.5, and steps of 0.3 overshoot
        loss = (images - 0.5).square().sum((1, 2, 3))
        return loss, loss.detach() < 0

    x = torch.full((1, 3, 4, 4), 0.25)
    last = attacks.ifgsm(x, objective, eps=1.0, alpha=0.3, steps=2)
    best = attacks.ifgsm(x, objective, eps=1.0, alpha=0.3, steps=2, keep_best=True)
    assert torch.allclose(last, torch.tensor(0.25))
    assert torch.allclose(best, torch.tensor(0.55))


def test_batching_and_seed(goals):
    x, objective = goals["dodging"]
    a = attacks.pgd(x, objective, eps=EPS, steps=2, seed=1)
    assert torch.equal(a, attacks.pgd(x, objective, eps=EPS, steps=2, seed=1))
    assert not torch.equal(a, attacks.pgd(x, objective, eps=EPS, steps=2, seed=2))
    b = attacks.pgd(x, objective, eps=EPS, steps=2, seed=1, batch=3)
    assert metrics.linf(b, x).max() <= EPS + 1e-6
    assert (objectives.success(objective, a) == objectives.success(objective, b)).float().mean() >= 0.75
    assert attacks.pgd(x[:0], objective, eps=EPS).shape == x[:0].shape


def test_bfloat16_and_float32_succeed_alike(orl):
    rates = []
    for mode in ("auto", "float32"):
        recogniser = recognisers.load("dlib", precision=mode)
        embeddings = recognisers.embed_faces(recogniser, orl)
        objective = objectives.dodging(recogniser, embeddings[1::10][:16])
        y = attacks.pgd(orl.images[0::10][:16], objective, eps=3 / 255, steps=5)
        rates.append(objectives.success(objective, y).float().mean().item())
    assert abs(rates[0] - rates[1]) <= 1 / 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -0.1}, "eps must be"),
        ({"eps": float("nan")}, "eps must be"),
        ({"steps": 0}, "steps must be"),
        ({"steps": 2.5}, "steps must be"),
        ({"alpha": float("inf")}, "alpha must be"),
        ({"norm": "l1"}, "norm must be"),
    ],
)
def test_impossible_budgets_are_refused(change, message, goals):
    x, objective = goals["dodging"]
    with pytest.raises(ValueError, match=message):
        attacks.pgd(x, objective, **({"eps": EPS} | change))


@pytest.mark.parametrize("bad", [torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4).byte(), torch.full((1, 3, 4, 4), 2.0)])
def test_wrong_images_are_refused(bad, goals):
    with pytest.raises(ValueError, match="images must"):
        attacks.fgsm(bad, goals["dodging"][1], eps=EPS)


def test_a_gradient_that_is_not_finite_is_an_error():
    def objective(images, rows, exact=False):
        loss = (images - images).sum((1, 2, 3)).sqrt()
        return loss, loss > 0

    with pytest.raises(RuntimeError, match="not finite"):
        attacks.fgsm(torch.full((2, 3, 4, 4), 0.5), objective, eps=EPS)


def quadratic(targets, c):
    """c/2 |x - t|^2 per image, whose own target is found by its row."""

    def objective(images, rows, exact=False):
        loss = c / 2 * (images - targets[rows]).square().sum((1, 2, 3))
        return loss, loss.detach() < 1e-3

    return objective


@pytest.fixture
def plane():
    """Five small images, and a target for each."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(5, 3, 4, 4, generator=generator), torch.rand(5, 3, 4, 4, generator=generator)


@pytest.mark.parametrize("start", [None, "noise"])
@pytest.mark.parametrize(("c", "lam", "alpha"), [(1.0, 0.4, 0.5), (0.5, 1.5, 0.5), (2.0, 0.02, 0.4)])
def test_pfgvm_ends_where_slope_and_penalty_are_equal(c, lam, alpha, start, plane):
    x, t = plane
    start = start and torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    y = attacks.pfgvm(x, quadratic(t, c), alpha=alpha, lam=lam, steps=60, start=start, batch=2)
    torch.testing.assert_close(y, (c * t + lam * x) / (c + lam), atol=1e-5, rtol=0)


def test_pfgvm_step_by_step(plane):
    x, t = plane
    y = x
    for _ in range(3):
        y = (y - 0.7 * (3 * (y - (t + 0.5)) + 0.6 * (y - x))).clamp(0, 1)  # overshoots, and is clipped
    assert (y == 1).any()
    torch.testing.assert_close(attacks.pfgvm(x, quadratic(t + 0.5, 3), alpha=0.7, lam=0.6, steps=3), y)


def test_pfgvm_stays_in_the_range_of_pixels(plane):
    x, t = plane
    for far in (-3.0, 3.0):
        y = attacks.pfgvm(x, quadratic(t + far, 1.0), alpha=0.5, lam=0.1, steps=30)
        assert torch.equal(y, torch.full_like(x, float(far > 0)))


def test_pfgvm_without_a_step_or_a_slope(goals, plane):
    x, objective = goals["dodging"]
    assert torch.equal(attacks.pfgvm(x[:2], objective, alpha=0.0, lam=0.5, steps=2), x[:2])
    x, start = plane
    assert torch.equal(attacks.pfgvm(x, quadratic(x, 1.0), alpha=0.0, lam=0.5, steps=2, start=start), start)
    # the penalty alone leads back to the photo
    y = attacks.pfgvm(x, quadratic(x, 0.0), alpha=0.5, lam=1.0, steps=40, start=start)
    torch.testing.assert_close(y, x, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("alpha", "lam"), [(1.0, 1.0), (2.0, 0.5), (0.5, 4.0)])
def test_pfgvm_refuses_a_penalty_that_overshoots(alpha, lam, plane):
    with pytest.raises(ValueError, match="alpha \\* lam must be below 1") as caught:
        attacks.pfgvm(plane[0], quadratic(plane[1], 1.0), alpha=alpha, lam=lam)
    assert "\n" not in str(caught.value)
    for change in ({"alpha": -1.0}, {"lam": -0.1}, {"lam": float("nan")}, {"steps": 0}, {"start": plane[0] * 3}):
        with pytest.raises(ValueError, match="must"):
            attacks.pfgvm(plane[0], quadratic(plane[1], 1.0), **({"alpha": 0.1, "lam": 0.1} | change))


def test_pfgvm_keeps_the_best(plane):
    x, t = torch.full((1, 3, 4, 4), 0.25), torch.full((1, 3, 4, 4), 0.5)
    options = {"alpha": 1.8, "lam": 0.0, "steps": 1}  # a single step from 0.25 over 0.5 to 0.7, then back
    assert torch.allclose(attacks.pfgvm(x, quadratic(t, 1.0), **options), torch.tensor(0.7))
    worse = options | {"alpha": 3.0}  # to 1
    assert torch.allclose(attacks.pfgvm(x, quadratic(t, 1.0), **worse), torch.tensor(1.0))
    assert torch.equal(attacks.pfgvm(x, quadratic(t, 1.0), keep_best=True, **worse), x)
    assert torch.allclose(attacks.pfgvm(x, quadratic(t, 1.0), keep_best=True, **options), torch.tensor(0.7))


def test_pfgvm_stops_each_image_where_it_succeeds(plane):
    x, t = plane[0].clone(), plane[1]
    x[0] = t[0]  # there already
    y = attacks.pfgvm(x, quadratic(t, 1.0), alpha=0.5, lam=0.01, steps=30, stop_early=True)
    assert torch.equal(y[0], x[0])
    distance = (y - t).square().sum((1, 2, 3)) / 2
    assert (distance < 1e-3).all()
    assert (distance[1:] > 1e-4).all()  # a step halves it, or about: the first below 1e-3 is above 1e-4
    full = attacks.pfgvm(x, quadratic(t, 1.0), alpha=0.5, lam=0.01, steps=30)
    assert not torch.allclose(y[1:], full[1:], atol=1e-4)


@pytest.mark.parametrize("kind", ["targeted", "untargeted"])
def test_pfgvm_on_faces(kind, orl, classifier, dlib):
    x, labels = orl.images[0:60:10], torch.arange(6)
    wanted = (labels + 3) % 10
    before = {key: value.clone() for key, value in dlib.state_dict().items()}
    objective = (
        objectives.targeted(classifier, wanted) if kind == "targeted" else objectives.untargeted(classifier, labels)
    )
    assert not objectives.success(objective, x).any()
    y = attacks.pfgvm(x, objective, alpha=0.5, lam=0.02, steps=20, stop_early=True)
    said = classifier(y).argmax(1)
    assert (said == wanted).all() if kind == "targeted" else (said != labels).all()
    assert 0 <= y.min() <= y.max() <= 1
    assert metrics.ssim(y, x).mean() > 0.9
    assert not y.requires_grad
    assert all(torch.equal(before[key], value) for key, value in dlib.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in dlib.parameters())


def test_pfgvm_penalty_keeps_faces_similar_and_noise_becomes_one(orl, classifier):
    x, wanted = orl.images[0:40:10], torch.arange(4) + 3
    objective = objectives.targeted(classifier, wanted)
    loose, tight = (attacks.pfgvm(x, objective, alpha=1.0, lam=lam, steps=15) for lam in (0.0, 0.3))
    assert (metrics.l2(tight, x) < metrics.l2(loose, x)).all()
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    y = attacks.pfgvm(x, objective, alpha=1.0, lam=0.2, steps=20, start=noise)
    assert (classifier(y).argmax(1) == wanted).all()
    assert 0 <= y.min() <= y.max() <= 1
    assert (metrics.l2(y, x) < 0.2 * metrics.l2(noise, x)).all()


@pytest.mark.parametrize("kind", [objectives.targeted, objectives.untargeted])
def test_fast_is_bfloat16_and_never_when_exact(kind, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    seen = []

    class Sees(nn.Module):
        def forward(self, images):
            out = images.flatten(1) @ torch.ones(48, 2)
            seen.append(out.dtype)
            return out

    x, rows = torch.rand(2, 3, 4, 4, requires_grad=True), torch.arange(2)
    for fast, exact in ((True, False), (True, True), (False, False), (False, True)):
        loss, _ = kind(Sees().eval(), torch.zeros(2, dtype=torch.long), fast=fast)(x, rows, exact=exact)
        assert loss.dtype == torch.float32
    assert seen == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    kind(Sees().eval(), torch.zeros(2, dtype=torch.long))(x, rows)
    assert seen[-1] == torch.bfloat16
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    kind(Sees().eval(), torch.zeros(2, dtype=torch.long))(x, rows)
    assert seen[-1] == torch.float32


@pytest.mark.parametrize("fast", [True, False])
def test_fast_or_not_is_the_same_attack(fast, orl, classifier):
    x, wanted = orl.images[0:40:10], torch.arange(4) + 3
    objective = objectives.targeted(classifier, wanted, fast=fast)
    y = attacks.ifgsm(x, objective, eps=EPS, steps=5)
    assert (classifier(y).argmax(1) == wanted).all()
