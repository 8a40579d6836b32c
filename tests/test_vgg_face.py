"""VGG-Face from a tiny network in the format of the published file, against a plain nn.Sequential."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_datasets import PAGE, cut_short, left, serve
from torch import nn

from faceadv import classifiers, errors
from faceadv.networks import vgg_face
from faceadv.store import weights

FILE = "vgg_face_dag.pth"
PLAN = [("1_1", 4), ("1_2", 4), ("2_1", 6), ("2_2", 6), ("3_1", 8), ("3_2", 8), ("3_3", 8)]
PLAN += [("4_1", 10), ("4_2", 10), ("4_3", 10), ("5_1", 12), ("5_2", 12), ("5_3", 12)]
SIDE, HIDDEN, PEOPLE = 64, 16, 7
MEAN = [129.186279296875, 104.76238250732422, 93.59396362304688]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no downloads of torch's."""
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch" / "hub"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve() as running:
        yield running


def vgg():
    """VGG-16 with few channels: ``(layers up to fc7, the state dict as published)``."""
    torch.manual_seed(0)
    layers, state, inputs = [], {}, 3
    for i, (name, width) in enumerate(PLAN):
        conv = nn.Conv2d(inputs, width, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight)
        state |= {f"conv{name}.weight": conv.weight.detach(), f"conv{name}.bias": conv.bias.detach()}
        layers += [conv, nn.ReLU()]
        if i + 1 == len(PLAN) or PLAN[i + 1][0][0] != name[0]:
            layers.append(nn.MaxPool2d(2, 2))
        inputs = width
    layers.append(nn.Flatten())
    for name, size in (("fc6", (12 * 4, HIDDEN)), ("fc7", (HIDDEN, HIDDEN)), ("fc8", (HIDDEN, PEOPLE))):
        linear = nn.Linear(*size)
        state |= {f"{name}.weight": linear.weight.detach(), f"{name}.bias": linear.bias.detach()}
        if name != "fc8":
            layers += [linear, nn.ReLU(), nn.Dropout()]
    return nn.Sequential(*layers).eval().requires_grad_(False), state


@pytest.fixture(scope="module")
def network():
    return vgg()


@pytest.fixture
def path(network, tmp_path):
    torch.save(network[1], tmp_path / FILE)
    return tmp_path / FILE


def reference(layers, images):
    return layers(images * 255 - torch.tensor(MEAN).reshape(3, 1, 1))


def test_same_as_a_plain_vgg(network, path, orl):
    layers, _ = network
    model = vgg_face.VGGFace(path)
    assert (model.side, model.dimension) == (SIDE, HIDDEN)
    x = F.interpolate(orl.images[:6:2], (SIDE, SIDE), mode="area") * torch.tensor([1.0, 0.8, 0.5]).reshape(3, 1, 1)
    expected = reference(layers, x)
    assert expected.std() > 1  # not dead
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-3)
    chips = orl.images[:6:2]
    resized = F.interpolate(chips, (SIDE, SIDE), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(chips), reference(layers, resized), rtol=1e-4, atol=1e-3)


def test_frozen_and_differentiable_in_the_images(path, orl):
    model = vgg_face.VGGFace(path)
    before = copy.deepcopy(model.state_dict())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    x = orl.images[:2].clone().requires_grad_(True)
    model(x).square().sum().backward()
    assert (x.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_backbone_of_model_b(path, orl):
    model, losses = classifiers.model_b(orl.images[:20], orl.labels[:20], 2, vgg_face.VGGFace(path), epochs=3)
    assert classifiers.logits(model, orl.images[:4]).shape == (4, 2)
    assert len(losses) == 3


def test_half_precision_files_are_read(network, tmp_path, orl):
    torch.save({key: value.half() for key, value in network[1].items()}, tmp_path / FILE)
    assert vgg_face.VGGFace(tmp_path / FILE)(orl.images[:1]).dtype == torch.float32


def test_not_fetched_yet(cache):
    with pytest.raises(FileNotFoundError, match="`faceadv weights fetch vgg-face`") as caught:
        vgg_face.VGGFace()
    assert FILE in str(caught.value)
    assert str(cache) in str(caught.value)


CHANGES = {
    "nothing": lambda state: {},
    "another network": lambda state: {"w": torch.zeros(1)},
    "a layer less": lambda state: {key: value for key, value in state.items() if key != "conv4_2.bias"},
    "no head": lambda state: {key: value for key, value in state.items() if not key.startswith("fc8")},
    "a layer more": lambda state: state | {"fc9.bias": torch.zeros(1)},
    "another width": lambda state: state | {"conv3_2.weight": torch.zeros(8, 9, 3, 3)},
    "no square of cells": lambda state: state | {"fc6.weight": torch.zeros(HIDDEN, 12 * 5)},
    "fc6 as a convolution": lambda state: state | {"fc6.weight": torch.zeros(HIDDEN, 12, 2, 2)},
    "a number for a layer": lambda state: state | {"conv1_1.weight": torch.tensor(0.0)},
    "a number for the head": lambda state: state | {"fc8.weight": torch.tensor(0.0)},
    "no channels": lambda state: state | {"conv5_1.weight": torch.zeros(0, 10, 3, 3)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_of_another_network_are_refused(change, network, tmp_path):
    torch.save(CHANGES[change](network[1]), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold the weights of VGG-Face") as caught:
        vgg_face.VGGFace(tmp_path / "other.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: PAGE, lambda data: b""])
def test_a_broken_file_is_refused(damage, path):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((ValueError, RuntimeError), match="does not hold"):
        vgg_face.VGGFace(path)


def test_a_file_that_changed_since_its_first_use_is_refused(network, path):
    vgg_face.VGGFace(path)
    torch.save(network[1] | {"fc8.bias": torch.ones(PEOPLE)}, path)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        vgg_face.VGGFace(path)


def test_fetched_once_and_found(network, path, cache, server, monkeypatch, orl):
    monkeypatch.setitem(weights.DOWNLOADS["vgg-face"], "layout", weights.layout(network[1]))
    server.answers[FILE] = path.read_bytes()
    found = weights.fetch("vgg-face", release=server.url)
    assert found == cache / FILE == weights.find("vgg-face") == weights.fetch("vgg-face", release=server.url)
    assert server.asked == [FILE]
    assert left(cache) == [FILE, f"{FILE}.sha256"]
    assert weights.check_one("vgg-face")[0]
    torch.testing.assert_close(vgg_face.VGGFace()(orl.images[:2]), vgg_face.VGGFace(path)(orl.images[:2]))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (cut_short, "the connection broke off"),
        (lambda body: body[: len(body) // 2], "does not hold network weights"),
        (lambda body: PAGE, "sent a web page"),
        (lambda body: None, "the server answered 404"),
    ],
)
def test_a_bad_download_leaves_nothing(answer, said, network, path, cache, server, monkeypatch):
    monkeypatch.setitem(weights.DOWNLOADS["vgg-face"], "layout", weights.layout(network[1]))
    server.answers[FILE] = answer(path.read_bytes())
    with pytest.raises(RuntimeError, match=said):
        weights.fetch("vgg-face", release=server.url)
    assert left(cache) == []


def test_another_network_is_not_kept(path, cache, server):
    server.answers[FILE] = path.read_bytes()  # the tiny one, where the published shapes are asked for
    with pytest.raises(RuntimeError, match="does not hold the weights of VGG-Face and was not kept"):
        weights.fetch("vgg-face", release=server.url)
    assert left(cache) == []


@pytest.mark.parametrize("bad", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8).byte(), torch.full((1, 3, 8, 8), 2.0)])
def test_other_images_are_refused(path, bad):
    with pytest.raises(errors.Invalid, match="images must"):
        vgg_face.VGGFace(path)(bad)


def test_loading_draws_no_random_numbers_and_needs_no_second_copy_of_the_weights(path):
    before = torch.get_rng_state()
    model = vgg_face.VGGFace(path)
    assert torch.equal(before, torch.get_rng_state())
    assert model.state_dict().keys().isdisjoint({"fc8.weight", "fc8.bias"})
    assert not any(p.is_meta for p in model.parameters())
