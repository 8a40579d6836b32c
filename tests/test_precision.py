"""Precision: exact means float32 to the last layer, whoever asks for bfloat16 within."""

import pytest
import torch

from faceadv import precision


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
