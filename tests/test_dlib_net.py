"""dlib's network: every file that is not dlib's is refused, the folded network computes the same."""

import importlib.util
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F

from faceadv.networks import dlib as dlib_net
from faceadv.store import weights


@pytest.fixture(scope="module")
def data():
    return weights.find("dlib").read_bytes()


@pytest.fixture(scope="module")
def spans(data):
    """(start of the header, start of the weights, their end) of the 59 tensors, found without the parser."""

    def number(n):
        size = (n.bit_length() + 7) // 8
        return bytes([size]) + n.to_bytes(size, "little")

    counts, width = [], 3
    for i, out in enumerate([32] * 7 + [64] * 8 + [128] * 6 + [256] * 8):
        counts += [(out * width * (49 if i == 0 else 9) + out, 1), (2 * out, 1)]
        width = out
    found, position = [], 0
    for samples, k in [*counts, (256, 128)]:
        header = b"".join(map(number, (2, samples, k, 1, 1)))
        start = data.index(header, position)
        position = start + len(header) + 4 * samples * k
        found.append((start, start + len(header), position))
    return found


@pytest.fixture(scope="module")
def tensors():
    return dlib_net.read_dat(weights.find("dlib"))


def refused(path, content):
    """The parser's one sentence about a file with this content; any other exception fails the test."""
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^\S*other\.dat [^\n]*\.$") as caught:
        dlib_net.read_dat(path)
    return str(caught.value)


def changed(data, position, value):
    return data[:position] + bytes([value]) + data[position + 1 :]


def test_reads_every_tensor(tensors, data, spans):
    # in the file's own order, from the first weight to the last
    for values, (_, start, end) in zip(tensors, spans, strict=True):
        assert values.numpy().astype("<f4").tobytes() == data[start:end]


@pytest.mark.parametrize("seed", range(3))
def test_truncated(tmp_path, data, spans, seed):
    rng = random.Random(seed)
    edges = [position for span in rng.sample(spans, 3) for position in span]
    cuts = [0, 1, 100, len(data) - 1, spans[-1][2], *edges, *rng.choices(range(len(data)), k=6)]
    for cut in cuts:
        refused(tmp_path / "other.dat", data[:cut])


def test_any_changed_byte(tmp_path, data, spans):
    rng = random.Random(0)
    gaps = [range(0, spans[0][1]), *(range(a[2], b[1]) for a, b in itertools.pairwise(spans))]
    gaps.append(range(spans[-1][2], len(data)))
    outside = [position for gap in gaps for position in gap]
    assert len(data) - len(outside) == 4 * 5_614_592
    inside = [rng.randrange(start, end) for _, start, end in rng.sample(spans, 10)]
    for position in [0, outside[-1], *rng.sample(outside, 20), *rng.sample(range(spans[0][1]), 5), *inside]:
        refused(tmp_path / "other.dat", changed(data, position, data[position] ^ (1 << rng.randrange(8))))


def test_inserted_and_removed_bytes(tmp_path, data, spans):
    for span in random.Random(1).sample(spans, 4):
        for position in span:
            refused(tmp_path / "other.dat", data[:position] + b"\0" + data[position:])
            refused(tmp_path / "other.dat", data[:position] + data[position + 1 :])
            refused(tmp_path / "other.dat", data[:position] + bytes(5000) + data[position:])


@pytest.mark.parametrize("more", [b"\0", b"\n", bytes(4096), b"01"])
def test_appended_bytes(tmp_path, data, more):
    refused(tmp_path / "other.dat", data + more)


def test_foreign_files(tmp_path, data):
    rng = random.Random(2)
    other = weights.find("dlib").with_name("mmod_human_face_detector.dat").read_bytes()  # another network
    page = b"<!DOCTYPE html><html><body>Not found</body></html>"
    for content in (b"", page, other, rng.randbytes(50_000), bytes(1_000_000), data[::-1], data + data):
        refused(tmp_path / "other.dat", content)


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.dat", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"does not exist; it comes with .*\.$"):
            dlib_net.read_dat(path)


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"face.recognition.models.*install"):
        dlib_net.load()


def unfolded(tensors, images):
    """The network layer by layer as dlib's example defines it, in float64, nothing folded."""

    def affine(x, c):
        return x * c["gamma"][:, None, None] + c["beta"][:, None, None]

    def con(x, c, stride, padding):
        return affine(F.conv2d(x, c["weight"], c["bias"], stride, padding), c)

    layers, width = [], 3
    for i, (filters, (gamma, beta)) in enumerate(zip(tensors[:-1:2], (t.double().chunk(2) for t in tensors[1::2]))):
        out, size = len(gamma), 7 if i == 0 else 3
        weight, bias = filters.double().split([out * width * size**2, out])
        weight = weight.reshape(out, width, size, size)
        layers.append({"weight": weight, "bias": bias, "gamma": gamma, "beta": beta})
        width = out
    layers = iter(layers)
    x = F.interpolate(images.double(), size=(150, 150), mode="bilinear", align_corners=False, antialias=False)
    mean = torch.tensor([122.782, 117.001, 104.298], dtype=torch.float64)[:, None, None]
    x = (255 * x - mean) / 256
    x = F.max_pool2d(con(x, next(layers), 2, 0).clamp(min=0), 3, 2)
    sizes = [x.shape[1:]]
    for stage, (channels, blocks) in enumerate([(32, 3), (64, 4), (128, 3), (256, 3), (256, 1)]):
        for block in range(blocks):
            down = stage > 0 and block == 0
            y = con(x, next(layers), 2 if down else 1, 0 if down else 1).clamp(min=0)
            y = con(y, next(layers), 1, 1)
            skip = F.avg_pool2d(x, 2) if down else x
            height, width = (max(skip.shape[axis], y.shape[axis]) for axis in (2, 3))
            total = x.new_zeros(len(x), channels, height, width)
            total[:, :, : y.shape[2], : y.shape[3]] += y
            total[:, : skip.shape[1], : skip.shape[2], : skip.shape[3]] += skip
            x = total.clamp(min=0)
            assert x.shape[1] == channels
        sizes.append(x.shape[1:])
    assert [size[1] for size in sizes] == [35, 35, 17, 8, 4, 2]  # dlib's own sizes for 150 pixels
    return x.mean((2, 3)) @ tensors[-1].reshape(256, 128).double()


@pytest.mark.parametrize("height_width", [(112, 112), (150, 150), (97, 180)])
def test_folded_network_is_the_unfolded_one(tensors, height_width):
    images = torch.rand(2, 3, *height_width, generator=torch.Generator().manual_seed(3))
    expected = unfolded(tensors, images)
    found = dlib_net.DlibResNet(tensors)(images)
    assert found.shape == (2, 128)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-4)


def test_gradient_is_the_unfolded_networks(tensors):
    images = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(4))
    direction = torch.randn(128, generator=torch.Generator().manual_seed(5))
    gradients = []
    for network in (dlib_net.DlibResNet(tensors), lambda x: unfolded(tensors, x)):
        x = images.clone().requires_grad_()
        (network(x) * direction).sum().backward()
        gradients.append(x.grad.flatten())
    assert F.cosine_similarity(*gradients, dim=0) > 0.9999
    assert math.isclose(gradients[0].norm(), gradients[1].norm(), rel_tol=1e-3)


def test_frozen_and_channels_last(tensors):
    network = dlib_net.DlibResNet(tensors)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert all(c.weight.is_contiguous(memory_format=torch.channels_last) for c in network.convs)


def test_reading_leaves_the_tensors_alone(tensors):
    again = dlib_net.read_dat(weights.find("dlib"))
    dlib_net.DlibResNet(tensors)(torch.rand(1, 3, 112, 112))
    assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True))
