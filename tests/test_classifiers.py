"""Classifiers: Model A and Model B as published, trained on real faces, and the labels attacks aim at."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from faceadv import attacks, classifiers, errors, objectives

PEOPLE = 10


@pytest.fixture(scope="module")
def split(orl):
    """Ten people: six photos of each to learn from, four to be tested on, as ``(faces, labels)`` twice."""
    photo = torch.arange(10 * PEOPLE) % 10
    x, labels = orl.images[: 10 * PEOPLE], orl.labels[: 10 * PEOPLE]
    return (x[photo < 6], labels[photo < 6]), (x[photo >= 6], labels[photo >= 6])


@pytest.fixture(scope="module")
def b(split, dlib):
    return classifiers.model_b(*split[0], PEOPLE, dlib, epochs=15)


def small(images):
    """Model A takes other sizes too: a quarter of the side for a fraction of the time."""
    return F.interpolate(images, (28, 28), mode="area")


def accuracy(model, images, labels):
    return (classifiers.logits(model, images).argmax(1) == labels).float().mean().item()


def weights_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_layers_as_published(dlib):
    a, b = classifiers.ModelA(7), classifiers.ModelB(7, dlib, 128)
    shapes = [tuple(p.shape) for p in a.parameters() if p.ndim > 1]
    assert shapes == [(32, 3, 5, 5), (64, 32, 5, 5), (512, 64 * 28 * 28), (7, 512)]
    assert [m.p for m in a.modules() if isinstance(m, nn.Dropout)] == [0.9]
    assert [tuple(p.shape) for p in b.parameters() if p.requires_grad and p.ndim > 1] == [(256, 128), (7, 256)]
    for model in (a, b):
        assert model.eval()(torch.rand(2, 3, 112, 112)).shape == (2, 7)


def test_model_a_learns_faces(split):
    (x, labels), (others, truth) = split
    model, losses = classifiers.model_a(small(x), labels, PEOPLE, epochs=40)
    assert len(losses) == 40
    assert losses[-1] < losses[0] / 2
    assert accuracy(model, small(others), truth) >= 0.6
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_model_b_learns_faces_and_leaves_its_backbone_alone(split, dlib):
    before = weights_of(dlib)
    model, losses = classifiers.model_b(*split[0], PEOPLE, dlib, epochs=15)
    assert losses[-1] < losses[0] / 2
    assert accuracy(model, *split[1]) >= 0.95
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.backbone is dlib
    assert same(before, weights_of(dlib))


def test_a_seed_is_a_model(split):
    x, labels = small(split[0][0][:20]), split[0][1][:20]
    trained = [classifiers.model_a(x, labels, PEOPLE, epochs=1, seed=seed)[0] for seed in (1, 1, 2)]
    assert same(weights_of(trained[0]), weights_of(trained[1]))
    assert not same(weights_of(trained[0]), weights_of(trained[2]))


def test_the_loss_is_cross_entropy_and_keras_l2(split):
    x, labels = split[0][0][:16].mean(3).flatten(1), split[0][1][:16]
    torch.manual_seed(0)
    model = classifiers.ModelB(PEOPLE, nn.Identity(), x.shape[1]).train()
    with torch.no_grad():
        scores = model.classify(x)
        expected = -scores.log_softmax(1)[torch.arange(16), labels].mean() + 1e-3 * (model.hidden.weight**2).sum()
    (loss,) = classifiers.fit(model, x, labels, 1, forward=model.classify)  # one batch
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_frozen_backbone_with_batch_norm_stays_as_it_is(split):
    """Trained on chips and not on features, the whole of Model B runs in training mode."""
    backbone = nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(28), nn.Flatten()).eval()
    before = weights_of(backbone)
    model = classifiers.ModelB(PEOPLE, backbone, 48)
    classifiers.fit(model, split[0][0][:20], split[0][1][:20], 1)
    assert same(before, weights_of(backbone))


def test_a_last_batch_of_one_is_no_obstacle(split):
    x, labels = split[0][0][: classifiers.SMALL + 1].mean(3).flatten(1), split[0][1][: classifiers.SMALL + 1]
    model = classifiers.ModelB(PEOPLE, nn.Identity(), x.shape[1])
    assert classifiers.fit(model, x, labels, 2, forward=model.classify)[1] > 0


def test_logits(split, b, monkeypatch):
    x, model = split[1][0][:7], b[0]
    monkeypatch.setattr(classifiers, "BATCH", 3)
    scores = classifiers.logits(model, x)
    assert scores.shape == (7, PEOPLE)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    torch.testing.assert_close(scores, model(x), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(scores, model.classify(model.backbone(x)), atol=1e-3, rtol=1e-3)


def test_model_b_can_be_attacked(split, b):
    (x, truth), model = split[1], b[0]
    x, truth = x[::5], truth[::5]
    wanted = classifiers.targets(classifiers.logits(model, x), truth, "farthest")
    objective = objectives.targeted(model, wanted)
    assert not objectives.success(objective, x).any()
    y = attacks.ifgsm(x, objective, eps=8 / 255, steps=10)
    assert (classifiers.logits(model, y).argmax(1) == wanted).all()


def test_targets_are_who_they_should_be():
    scores = torch.tensor([[5.0, 1.0, 3.0, 2.0], [5.0, 1.0, 3.0, 2.0], [5.0, 1.0, 3.0, 2.0]])
    labels = torch.tensor([0, 1, 3])  # said rightly, farthest, and neither
    assert classifiers.targets(scores, labels, "second").tolist() == [2, 0, 0]
    assert classifiers.targets(scores, labels, "farthest").tolist() == [1, 3, 1]
    assert scores[0].tolist() == [5, 1, 3, 2]


def test_random_targets_are_anyone_else():
    labels = torch.arange(5).repeat(200)
    drawn = classifiers.targets(torch.zeros(1000, 5), labels, "random", seed=3)
    counts = torch.zeros(5, 5).index_put((labels, drawn), torch.ones(1000), accumulate=True)
    assert (counts.diagonal() == 0).all()
    assert (counts + 200 * torch.eye(5)).min() >= 25  # 50 each are to be expected
    assert torch.equal(drawn, classifiers.targets(torch.zeros(1000, 5), labels, "random", seed=3))
    assert not torch.equal(drawn, classifiers.targets(torch.zeros(1000, 5), labels, "random", seed=4))


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="not 'nearest'"):
        classifiers.targets(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), "nearest")


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("people", [2, 5])
def test_a_linear_head_is_scikit_learns_pipeline(people, scaled):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % people
    features = 3 + torch.randn(60, 8, generator=draw) * 0.1 + torch.randn(people, 8, generator=draw)[labels] * 0.05
    head = classifiers.linear_head(features, labels, scaled)
    steps = [StandardScaler()] if scaled else []
    pipeline = make_pipeline(*steps, LogisticRegression(solver="newton-cg")).fit(features.numpy(), labels.numpy())
    assert (head(features).argmax(1).numpy() == pipeline.predict(features.numpy())).all()
    np.testing.assert_allclose(
        head(features).log_softmax(1).numpy(), pipeline.predict_log_proba(features.numpy()), atol=1e-3
    )
    assert not head.weight.requires_grad


def test_labels_may_be_of_any_integer_type(split):
    x, labels = small(split[0][0][:20]), split[0][1][:20]
    trained = [classifiers.model_a(x, kind, PEOPLE, epochs=1)[0] for kind in (labels, labels.int(), labels.byte())]
    assert same(weights_of(trained[0]), weights_of(trained[1]))
    assert same(weights_of(trained[0]), weights_of(trained[2]))
    scores = torch.rand(20, PEOPLE, generator=torch.Generator().manual_seed(0))
    for rule in ("random", "second", "farthest"):
        expected = classifiers.targets(scores, labels, rule)
        assert not (expected == labels).any()
        assert torch.equal(expected, classifiers.targets(scores, labels.byte(), rule))


def test_nobody_else_to_be_is_an_error():
    for rule in ("random", "second", "farthest"):
        with pytest.raises(ValueError, match="A target is another person"):
            classifiers.targets(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), rule)


def test_a_training_that_would_train_nothing_is_refused(split):
    x, labels = split[0][0][:4].mean(3).flatten(1), split[0][1][:4]
    model = classifiers.ModelB(PEOPLE, nn.Identity(), x.shape[1])
    for inputs, names, message in (
        (x[:1], labels[:1], "two inputs or more"),
        (x[:0], labels[:0], "two inputs or more"),
        (x, labels[:3], "two inputs or more"),
        (x, labels.float(), "labels must be whole numbers"),
        (x, labels - 100, "labels must be whole numbers"),  # -100 is what torch's cross-entropy leaves out
    ):
        with pytest.raises(ValueError, match=message):
            classifiers.fit(model, inputs, names, 1, forward=model.classify)


def test_chips_are_checked_by_the_models_themselves(split, dlib):
    """Before: x * 255 and 8-bit chips were classified, or failed inside torch."""
    (x, labels), _ = split
    for model in (classifiers.ModelA(7).eval(), classifiers.ModelB(7, dlib.network, 128).eval()):
        expected = model(x[:2])
        torch.testing.assert_close(model(x[:2].double()), expected)
        for bad in (x[:2] * 255, x[0], (x[:2] * 255).byte(), x[:2, :1], x[:2] * float("nan")):
            with pytest.raises(errors.Invalid, match="images must"):
                model(bad)
    with pytest.raises(errors.Invalid, match=r"for chips of 112 x 112, not \(28, 28\)"):
        classifiers.ModelA(7).eval()(small(x[:2]))
    for make in (classifiers.model_a, lambda *given, **seed: classifiers.model_b(*given, dlib.network, **seed)):
        with pytest.raises(errors.Invalid, match="images must"):
            make(x[:4] * 255, labels[:4], PEOPLE)
        with pytest.raises(errors.Invalid, match="seed must be a whole number"):
            make(x[:4], labels[:4], PEOPLE, seed="a")
    for run in (
        lambda: classifiers.targets(torch.zeros(1, 3), torch.zeros(1, dtype=int), "random", seed="a"),
        lambda: classifiers.fit(model, x[:2], labels[:2], 1, seed="a"),
    ):
        with pytest.raises(errors.Invalid, match="seed must be a whole number"):
            run()


def test_logits_of_no_chips_and_of_any_float_type(split, b):
    x, model = split[1][0][:3], b[0]
    assert classifiers.logits(model, x[:0]).shape == (0, PEOPLE)
    for dtype in (torch.float16, torch.float64):
        scores = classifiers.logits(model, x.to(dtype, copy=True).requires_grad_(True))
        assert scores.dtype == torch.float32
        assert not scores.requires_grad
        torch.testing.assert_close(scores, classifiers.logits(model, x), atol=0.05, rtol=0.05)
    with pytest.raises(ValueError, match="images must"):
        classifiers.logits(model, x * 255)


def test_logits_are_not_taken_in_training_mode(split):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    for chain in (model, lambda x: model(x)):
        with pytest.raises(ValueError, match="in training mode"):
            classifiers.logits(chain, split[1][0][:4])
    assert model[0].num_batches_tracked == 0


def test_a_backbone_in_training_mode_learns_nothing(split):
    backbone = nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(28), nn.Flatten()).train()
    before = weights_of(backbone)
    classifiers.model_b(split[0][0][:20], split[0][1][:20], PEOPLE, backbone, epochs=1)
    assert same(before, weights_of(backbone))


class Elsewhere(torch.Tensor):
    """A tensor as on a GPU: NumPy cannot see it until it is brought to the CPU."""

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_a_linear_head_takes_features_of_any_device():
    features, labels = torch.rand(6, 2, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    expected = classifiers.linear_head(features, labels)
    head = classifiers.linear_head(features.as_subclass(Elsewhere), labels.as_subclass(Elsewhere))
    assert torch.equal(head.weight, expected.weight)
    assert torch.equal(classifiers.linear_head(features.requires_grad_(True), labels).bias, expected.bias)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_linear_head_is_on_the_device_of_its_features():
    features, labels = torch.rand(6, 2).cuda(), torch.arange(6) % 3
    assert classifiers.linear_head(features, labels)(features).is_cuda


def test_a_linear_head_needs_a_photo_of_everybody():
    with pytest.raises(ValueError, match="labels must be 0 to K - 1"):
        classifiers.linear_head(torch.rand(6, 2), torch.tensor([0, 0, 2, 2, 3, 3]))
