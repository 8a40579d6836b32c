"""Precision: exact means float32 to the last layer, whoever asks for bfloat16 within."""

import pytest
import torch

from faceadv import attacks, classifiers, cloaks, precision, recognisers


@pytest.fixture
def with_bfloat16(monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)


def computed():
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_exact_reaches_what_is_nested_in_it(with_bfloat16):
    with precision.autocast("cpu"):
        assert computed() == torch.bfloat16
        with precision.autocast("cpu", fast=False):
            assert computed() == torch.float32
            with precision.autocast("cpu"):
                assert computed() == torch.float32
        assert computed() == torch.bfloat16
    assert computed() == torch.float32


def test_a_gpu_takes_more_images_at_once():
    assert precision.together(64, "cpu") == precision.together(64, torch.device("cpu")) == 64
    assert precision.together(64, "cuda") == precision.together(64, torch.device("cuda", 1)) == 512


def test_tensor_float_32_is_off_where_it_counts_and_back_afterwards():
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, convolution.fp32_precision
    matmul.fp32_precision = convolution.fp32_precision = "tf32"
    try:
        with precision.autocast("cpu", fast=False):
            assert (matmul.fp32_precision, convolution.fp32_precision) == ("ieee", "ieee")
        with pytest.raises(KeyError), precision.autocast("cpu", fast=False):
            raise KeyError
        assert (matmul.fp32_precision, convolution.fp32_precision) == ("tf32", "tf32")
    finally:
        matmul.fp32_precision, convolution.fp32_precision = before


def test_device_of_the_environment(monkeypatch):
    there = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.delenv("FACEADV_DEVICE", raising=False)
    assert precision.device().type == there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("FACEADV_DEVICE", "cpu")
    assert precision.device().type == "cpu"


def test_parts_are_halved_while_the_memory_is_full(caplog):
    asked = []

    def function(rows):
        asked.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows * 2

    done = precision.in_parts(function, torch.arange(7), 8)
    assert torch.cat(done).tolist() == list(range(0, 14, 2))
    assert asked == [7, 4, 2, 2, 2, 1]
    assert [record.message for record in caplog.records] == [
        f"The memory of the GPU is full: going on with {count} images at a time." for count in (4, 2)
    ]
    with pytest.raises(torch.OutOfMemoryError):
        precision.in_parts(lambda rows: function(rows.repeat(4)), torch.arange(7), 8)


def test_an_attack_gives_the_same_when_the_memory_is_full():
    x, full = torch.rand(5, 3, 8, 8), True

    def darkness(images, rows, exact=False):
        if full and len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images.square().sum((1, 2, 3)) * (rows + 1), torch.zeros(len(images), dtype=torch.bool)

    halved = attacks.pgd(x, darkness, eps=0.1, steps=3)
    full = False
    torch.testing.assert_close(halved, attacks.pgd(x, darkness, eps=0.1, steps=3))


@pytest.mark.parametrize("what", ["embeddings", "logits", "fawkes", "targeted fawkes", "lowkey"])
def test_nothing_else_changes_either_when_the_memory_is_full(what, orl):
    """Before, only attacks went on with fewer images at a time."""
    x, exact = orl.images[:5], recognisers.load("mobilefacenet", precision="float32")
    shifts = [torch.ones(5, 192)]
    made = {
        "embeddings": lambda: recognisers.embed_all(exact, x),
        "logits": lambda: classifiers.logits(exact.network, x),
        "fawkes": lambda: cloaks.fawkes(x, [exact], steps=2),
        "targeted fawkes": lambda: cloaks.fawkes_targeted(x, [exact], shifts, steps=2),
        "lowkey": lambda: cloaks.lowkey(x, [exact], steps=2),
    }[what]
    whole, refused = made(), []

    def full(_, images):
        if len(images[0]) > 2:
            refused.append(len(images[0]))
            raise torch.OutOfMemoryError("CUDA out of memory")

    exact.network.register_forward_pre_hook(full)
    halved = made()
    assert refused[-1] == 4  # the next part, of two images, is small enough
    assert (halved - whole).abs().max() < 1e-4 or ((halved - whole).abs() < 1e-4).float().mean() > 0.99
