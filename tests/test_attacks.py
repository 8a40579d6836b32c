"""Every attack succeeds on real faces, keeps its budget, does nothing at eps = 0 and leaves the network alone."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from faceadv import adaptive, attacks, cloaks, errors, metrics, objectives, precision, recognisers
from faceadv.images import check_images

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
    x, labels = orl.images[0:50:10], torch.arange(5)
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
            attacks.pgd(x, objective, eps=1.0, alpha=0.4, steps=steps, norm="l2", seed=None),
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
    x = x[:4]
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


def test_bfloat16_and_float32_succeed_alike(orl, monkeypatch):
    """Also where the processor has no bfloat16: then torch computes it more slowly, with the same rounding."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    x, made = orl.images[0:80:10], []
    for mode, dtype in (("auto", torch.bfloat16), ("float32", torch.float32)):
        recogniser, seen = recognisers.load("dlib", precision=mode), set()
        objective = objectives.dodging(recogniser, recognisers.embed_all(recogniser, orl.images[1:81:10]))
        recogniser.network.register_forward_hook(lambda module, inputs, out, seen=seen: seen.add(out.dtype))
        made.append(attacks.pgd(x, objective, eps=3 / 255, steps=5))
        assert seen == {dtype}
    assert not torch.equal(*made)
    rates = [objectives.success(objective, y).float().mean().item() for y in made]  # both in float32
    assert min(rates) >= 0.75
    assert abs(rates[0] - rates[1]) <= 1 / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -0.1}, "eps must be"),
        ({"eps": float("nan")}, "eps must be"),
        ({"steps": 0}, "steps must be"),
        ({"steps": 2.5}, "steps must be"),
        ({"alpha": float("inf")}, "alpha must be"),
        ({"norm": "l1"}, "norm must be"),
        ({"steps": True}, "steps must be"),
        ({"steps": np.float64(3)}, "steps must be"),
        ({"eps": True}, "eps must be"),
        ({"eps": None}, "eps must be"),
        ({"eps": 8}, "did you mean 8/255"),
        ({"eps": 4.0}, "did you mean 4/255"),
        ({"batch": 0}, "batch must be"),
        ({"batch": True}, "batch must be"),
        *(({"seed": seed}, "seed must be a whole number from 0") for seed in ("a", -1, 0.5, True, 2**64)),
        (
            {"keep_bst": True},
            r"keep_bst\" \(did you mean keep_best\?\); there are keep_best, stop_early, batch",
        ),
    ],
)
def test_impossible_budgets_are_refused(change, message, goals):
    x, objective = goals["dodging"]
    with pytest.raises(ValueError, match=message):
        attacks.pgd(x, objective, **({"eps": EPS} | change))


@pytest.mark.parametrize("attack", [attacks.fgsm, attacks.ifgsm, attacks.mifgsm, attacks.pgd])
def test_eps_is_in_pixels_of_0_to_1(attack, plane):
    x, t = plane
    with pytest.raises(ValueError, match="did you mean 16/255"):
        attack(x, quadratic(t, 1.0), eps=16)
    assert not torch.equal(attack(x, quadratic(t, 1.0), eps=255 / 255), x)  # 1 is the whole range
    assert not torch.equal(attacks.pgd(x, quadratic(t, 1.0), eps=2.0, norm="l2"), x)


@pytest.mark.parametrize("bad", [torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4).byte(), torch.full((1, 3, 4, 4), 2.0),
                                 torch.full((1, 3, 4, 4), torch.nan), torch.full((1, 3, 4, 4), torch.inf)])  # fmt: skip
def test_wrong_images_are_refused(bad, goals):
    for run in (
        lambda: attacks.fgsm(bad, goals["dodging"][1], eps=EPS),
        lambda: attacks.pgd(bad, goals["dodging"][1], eps=EPS),
        lambda: attacks.pfgvm(bad, goals["dodging"][1], alpha=0.1, lam=0.1),
        lambda: objectives.success(goals["dodging"][1], bad),
    ):
        with pytest.raises(ValueError, match="images must"):
            run()


EVERY = ATTACKS | {
    "pgd, l2": lambda x, o, eps: attacks.pgd(x, o, eps=eps, steps=4, norm="l2"),
    "pgd, best": lambda x, o, eps: attacks.pgd(x, o, eps=eps, steps=4, keep_best=True),
    "pgd, early": lambda x, o, eps: attacks.pgd(x, o, eps=eps, steps=4, stop_early=True, batch=2),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_the_budget_holds_after_rounding_to_the_type_that_came_in(name, dtype):
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    t = torch.rand(x.shape, generator=torch.Generator().manual_seed(3))
    for eps in (4 / 255, EPS):
        y = EVERY[name](x, quadratic(t, 1.0), eps)
        assert y.dtype == dtype
        assert y.shape == x.shape
        assert 0 <= y.min() <= y.max() <= 1
        change = (y.double() - x.double()).flatten(1)
        assert (change.norm(dim=1) if "l2" in name else change.abs().amax(1)).max() <= eps + 1e-12
        assert change.abs().max() > 0.1 * eps / (1 if "l2" not in name else 16)  # and it is not idle
    assert torch.equal(EVERY[name](x, quadratic(t, 1.0), 0.0), x)


def test_half_precision_is_computed_in_float32(plane):
    x, t = plane
    half = x.half()
    full = attacks.pfgvm(half.float(), quadratic(t, 1.0), alpha=0.5, lam=0.1, steps=20)
    y = attacks.pfgvm(half, quadratic(t, 1.0), alpha=0.5, lam=0.1, steps=20)
    assert y.dtype == torch.float16
    assert (y.float() - full).abs().max() <= 2**-11


@pytest.mark.parametrize("name", EVERY)
def test_inputs_with_a_graph_are_detached(name, plane):
    x, t = plane
    start = x.clone().requires_grad_(True)
    wanted = t.clone().requires_grad_(True)
    y = EVERY[name](start * 1.0, quadratic(wanted, 1.0), EPS)
    assert not y.requires_grad
    assert y.grad_fn is None
    assert start.grad is None
    assert wanted.grad is None
    assert torch.equal(y, EVERY[name](x, quadratic(t, 1.0), EPS))


@pytest.mark.parametrize("name", EVERY)
def test_no_images_give_no_images(name, dlib):
    def refuses(images, rows, exact=False):
        raise AssertionError("there is nothing to look at")

    for objective in (refuses, objectives.dodging(dlib, torch.zeros(0, 128))):
        for dtype in (torch.float32, torch.float16):
            y = EVERY[name](torch.zeros(0, 3, 112, 112, dtype=dtype), objective, EPS)
            assert (y.shape, y.dtype) == ((0, 3, 112, 112), dtype)
        assert objectives.success(objective, torch.zeros(0, 3, 112, 112)).shape == (0,)
    assert attacks.pfgvm(torch.zeros(0, 3, 4, 4), refuses, alpha=0.1, lam=0.1).shape == (0, 3, 4, 4)


def test_numbers_of_numpy_are_numbers(plane):
    x, t = plane
    for name in (np.int64, np.uint8, np.int32):
        y = attacks.pgd(x, quadratic(t, 1.0), eps=np.float64(EPS), steps=name(3), seed=name(1), batch=name(2))
        assert torch.equal(y, attacks.pgd(x, quadratic(t, 1.0), eps=EPS, steps=3, seed=1, batch=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("option", [{}, {"keep_best": True}, {"stop_early": True}])
def test_a_loss_may_be_of_any_float_type(dtype, option, plane):
    x, t = plane

    def objective(images, rows, exact=False):
        loss, reached = quadratic(t, 1.0)(images, rows)
        return loss.to(dtype), reached

    y = attacks.ifgsm(x, objective, eps=EPS, steps=3, **option)
    assert y.dtype == torch.float32
    assert ((y - t).norm() < (x - t).norm()).all()
    loss, _ = adaptive.through(lambda z: z, objective, 2)(x, torch.arange(5))
    assert loss.dtype == torch.float32


def test_an_objective_that_does_not_give_a_loss_for_each_image_is_refused(plane):
    x = plane[0]
    for given in (
        lambda x, rows: (x.mean(), rows < 0),
        lambda x, rows: (x.mean((2, 3)), rows < 0),
        lambda x, rows: (0.5, rows < 0),
        lambda x, rows: (np.zeros(len(x)), rows < 0),
        lambda x, rows: (x.mean((1, 2, 3)), False),
        lambda x, rows: (x.mean((1, 2, 3)), (rows < 0)[:1]),
        lambda x, rows: x.mean((1, 2, 3)),
        lambda x, rows: None,
    ):

        def objective(x, rows, exact=False, given=given):
            return given(x, rows)

        for run in (
            lambda: attacks.fgsm(x, objective, eps=EPS),
            lambda: attacks.fgsm(x, adaptive.through(lambda z: z, objective), eps=EPS),
            lambda: objectives.success(objective, x),
        ):
            with pytest.raises(errors.Invalid, match=r"^An objective must return \(loss, reached\), two tensors .*\.$"):
                run()
    with pytest.raises(errors.Invalid, match="loss of an objective must have a gradient"):
        attacks.fgsm(x, lambda x, rows: (x.detach().mean((1, 2, 3)), rows < 0), eps=EPS)


def test_an_image_without_a_reference_or_a_label_is_refused(plane, dlib):
    x = plane[0]
    labels = objectives.targeted(lambda z: z.mean((2, 3)), torch.zeros(4, dtype=torch.uint8))
    for objective, what in ((objectives.dodging(dlib, torch.zeros(4, 128)), "references"), (labels, "labels")):
        said = rf"^Each image needs one of the {what}, and there are only 4 {what}\.$"
        for run in (attacks.fgsm, lambda x, objective, eps: objectives.success(objective, x)):
            with pytest.raises(errors.Invalid, match=said):
                run(x, objective, eps=EPS)
        assert attacks.fgsm(x[:4], objective, eps=EPS).shape == (4, 3, 4, 4)


class Spy(torch.autograd.Function):
    """Nothing, but it notes the precision of convolutions in the backward pass."""

    seen = ()

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        Spy.seen += (torch.backends.cudnn.conv.fp32_precision,)
        return g


@pytest.fixture
def tf32():
    """TensorFloat-32 for convolutions, as torch has it by default on a GPU."""
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "tf32"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("exact", [True, False])
def test_gradients_are_as_exact_as_their_loss(exact, plane, tf32, monkeypatch):
    """Before: the backward pass ran outside the context that switches TensorFloat-32 off."""
    monkeypatch.setattr(Spy, "seen", ())
    expected = {"ieee"} if exact else {"tf32"}
    objective = objectives.untargeted(lambda x: Spy.apply(x).mean((2, 3)), torch.zeros(5, dtype=int), fast=not exact)
    attacks.ifgsm(plane[0], objective, eps=EPS, steps=2)
    attacks.fgsm(plane[0], adaptive.through(lambda x: x, objective), eps=EPS)
    assert (set(Spy.seen), len(Spy.seen)) == (expected, 3)

    class Extractor:
        precision = "float32" if exact else "auto"

        def embed(self, images, fast=False):
            return Spy.apply(images).mean((2, 3))

    x = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    for make, targets in ((cloaks.fawkes, ()), (cloaks.lowkey, ()), (cloaks.fawkes_targeted, [[torch.ones(2, 3)]])):
        Spy.seen = ()
        make(x, [Extractor()], *targets, steps=1)
        assert set(Spy.seen) == expected
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_labels_may_be_of_any_integer_type(dtype):
    scores = torch.eye(3).flatten()[None, :, None, None].expand(3, 9, 4, 4)
    x, labels = scores[:, :3].clone(), torch.tensor([0, 0, 2])
    for kind in (objectives.targeted, objectives.untargeted):
        expected = kind(lambda z: z.mean((2, 3)), labels)(x, torch.arange(3))
        found = kind(lambda z: z.mean((2, 3)), labels.to(dtype))(x, torch.arange(3))
        assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("labels", [torch.tensor([0.0]), torch.tensor([True]), torch.tensor([-100]), torch.zeros(1, 1)])
def test_labels_that_are_none_are_refused(labels):
    with pytest.raises(ValueError, match="labels must be whole numbers"):
        objectives.targeted(lambda z: z, labels)


def test_a_start_of_another_shape_is_refused(plane):
    with pytest.raises(ValueError, match="start must have the shape"):
        attacks.pfgvm(plane[0], quadratic(plane[1], 1.0), alpha=0.1, lam=0.1, start=plane[0][:1])


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
    x, wanted = orl.images[0:20:10], torch.arange(2) + 3
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


def test_every_step_on_a_cpu_is_checked():
    """A purifier of one's own that leaves the range late, when an attack that believed its first step would not see."""
    calls = []

    def leaving(images):
        calls.append(1)
        return images * (2 if len(calls) > 2 else 1)

    def brightness(images, rows, exact=False):
        check_images(images)
        return -images.sum((1, 2, 3)), torch.zeros(len(images), dtype=torch.bool)

    with pytest.raises(errors.Invalid, match=r"must lie in \[0, 1\]"):
        attacks.pgd(torch.rand(2, 3, 8, 8), adaptive.through(leaving, brightness), eps=0.1, steps=4)
    assert len(calls) == 3


def test_square_needs_no_gradient_and_keeps_its_budget(orl, dlib):
    """It lowers the loss, stays in budget and range, draws the same in any batch, and does nothing at eps = 0."""
    x, y = orl.images[0:40:10], orl.images[1:40:10]
    objective = objectives.dodging(dlib, recognisers.embed_all(dlib, y), dlib.threshold)

    def blind(images, rows, exact=False):
        with torch.no_grad():
            return objective(images, rows, exact)

    before, kept = x.clone(), [p.clone() for p in dlib.network.parameters()]
    z = attacks.square(x, blind, eps=16 / 255, queries=30)
    assert (z - x).abs().max() <= 16 / 255 + 1e-6
    assert z.min() >= 0
    assert z.max() <= 1
    rows = torch.arange(len(x))
    assert (objective(z, rows)[0] < objective(x, rows)[0]).all()
    more = attacks.square(x, blind, eps=16 / 255, queries=90)
    assert objective(more, rows)[0].mean() < objective(z, rows)[0].mean()
    torch.testing.assert_close(attacks.square(x, blind, eps=16 / 255, queries=5, batch=3),
                               attacks.square(x, blind, eps=16 / 255, queries=5), atol=2e-2, rtol=0)  # fmt: skip
    assert torch.equal(attacks.square(x, blind, eps=0, queries=3), x)
    assert torch.equal(x, before)
    assert all(torch.equal(p, q) for p, q in zip(dlib.network.parameters(), kept))
