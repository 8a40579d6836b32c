"""What an image is here, and what saving it does to it."""

import io

import numpy as np
import torch
from PIL import Image

from faceadv.errors import Invalid


def check_images(images):
    """Raise ``ValueError`` in one sentence unless images is a float tensor (N, 3, H, W) in [0, 1]."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 3:
        shape = tuple(images.shape) if hasattr(images, "shape") else type(images).__name__
        raise Invalid(f"images must be a tensor of shape (N, 3, H, W), not {shape}.")
    if not images.is_floating_point():
        raise Invalid(f"images must be float in [0, 1], not {images.dtype}: divide 8-bit images by 255.")
    if images.numel():
        low, high = (bound.item() for bound in images.detach().aminmax())
        if not (low >= -1e-6 and high <= 1 + 1e-6):  # not NaN either
            raise Invalid(f"images must lie in [0, 1], and these reach from {low:.3g} to {high:.3g}.")


def quantise(images):
    """The images after 8-bit rounding, as a PNG would keep them: (N, 3, H, W) in [0, 1]."""
    return (images * 255).round() / 255


def jpeg(images, quality):
    """The images after JPEG at ``quality`` (1 to 95, chroma at half resolution, Pillow's default)."""
    return torch.stack([_through_jpeg(image, quality) for image in images]).to(images.device)


def _through_jpeg(image, quality):
    file = io.BytesIO()
    to_pil(image).save(file, "JPEG", quality=quality)
    return from_pil(Image.open(file))


def to_pil(image):
    """A (3, H, W) float image in [0, 1] as a Pillow image, rounded to 8 bits."""
    return Image.fromarray((image.detach().cpu() * 255).round().byte().permute(1, 2, 0).numpy())


def from_pil(picture):
    """A Pillow image as a (3, H, W) float32 tensor in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
