"""What counts as an image, and saving."""

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from faceadv import images


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_images_of_any_float_type(dtype):
    images.check_images(torch.rand(2, 3, 4, 5).to(dtype))
    images.check_images(torch.zeros(0, 3, 4, 5, dtype=dtype))
    images.check_images(torch.rand(2, 3, 4, 5).to(dtype).requires_grad_())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1.01, -0.01])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_wrong_value_is_refused(value, dtype):
    wrong = torch.rand(2, 3, 4, 5).to(dtype)
    wrong[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]") as caught:
        images.check_images(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (torch.rand(3, 4, 5), r"not \(3, 4, 5\)"),
        (torch.rand(2, 1, 4, 5), r"not \(2, 1, 4, 5\)"),
        (np.zeros((1, 3, 4, 5)), r"not \(1, 3, 4, 5\)"),
        ([0.5], "not list"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.uint8), "divide 8-bit images by 255"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.complex64), "must be float"),
    ],
)
def test_other_things_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        images.check_images(wrong)


@pytest.mark.parametrize(("size", "sigma"), [(7, 3.0), (63, 10.0), (3, 0.4)])
def test_a_blur_is_torchvisions_and_has_a_slope(size, sigma, orl):
    x = orl.images[:3].clone().requires_grad_(True)
    blurred = images.gaussian_blur(x, size, sigma)
    # bit for bit, because a cloak follows the signs of a gradient, and notebook 04 compares its own with ours
    assert torch.equal(blurred, gaussian_blur(x, size, [sigma, sigma]))
    (slope,) = torch.autograd.grad(blurred.sum(), x)
    torch.testing.assert_close(slope[..., 56, 56], torch.ones(3, 3))
    plain = torch.full((1, 3, 70, 80), 0.25)
    torch.testing.assert_close(images.gaussian_blur(plain, size, sigma), plain)


def test_saving(orl):
    x = orl.images[:2]
    assert torch.allclose(images.quantise(x), x)  # chips are 8-bit already
    y = (x + 0.4 / 255).clamp(0, 1)
    assert torch.allclose(images.quantise(y), x)
    errors = [(images.jpeg(x, quality) - x).abs().mean().item() for quality in (95, 75, 30)]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.05
    torch.testing.assert_close(images.from_pil(images.to_pil(x[0])), x[0])


def test_jpeg_of_no_image(orl):
    assert images.jpeg(orl.images[:0], 75).shape == (0, 3, 112, 112)


@pytest.mark.parametrize("quality", [0, -1, 96, 101, 75.5, "75"])
def test_jpeg_of_a_quality_that_is_none(quality, orl):
    with pytest.raises(ValueError, match="whole number from 1 to 95"):
        images.jpeg(orl.images[:1], quality)
