"""What an image is here, and what saving it does to it."""

import contextlib
import contextvars
import io
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from faceadv.errors import Invalid, whole

__all__ = ["believed", "check_images", "eight_bits", "from_pil", "gaussian_blur", "jpeg", "quantise", "to_pil"]

_believed = contextvars.ContextVar("believed", default=False)


@contextlib.contextmanager
def believed(values: bool = True) -> Iterator[None]:
    """A context in which checks do not look at the values of tensors, which a GPU would be waited for.

    Attacks on a GPU use it from their second step on: the first step has checked everything, and each iterate lies in
    [0, 1]. On the CPU, where nothing is gained, every step is checked.
    """
    mark = _believed.set(values)
    try:
        yield
    finally:
        _believed.reset(mark)


def believing() -> bool:
    """Whether such a context is on."""
    return _believed.get()


def check_images(images: torch.Tensor) -> None:
    """Raise ``Invalid`` in one sentence unless images is a float tensor (N, 3, H, W) with finite values in [0, 1]."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 3:
        shape = tuple(images.shape) if hasattr(images, "shape") else type(images).__name__
        raise Invalid(f"images must be a tensor of shape (N, 3, H, W), not {shape}.")
    if not images.is_floating_point():
        raise Invalid(f"images must be float in [0, 1], not {images.dtype}: divide 8-bit images by 255.")
    if images.numel() and not believing():
        low, high = torch.stack(images.detach().aminmax()).tolist()
        if not (low >= -1e-6 and high <= 1 + 1e-6):  # one NaN makes both bounds NaN, and every comparison false
            raise Invalid(f"images must lie in [0, 1], and these reach from {low:.3g} to {high:.3g}.")


def quantise(images: torch.Tensor) -> torch.Tensor:
    """The images (N, 3, H, W) in [0, 1] after 8-bit rounding, as a PNG would keep them."""
    return (images * 255).round() / 255


def gaussian_blur(images: torch.Tensor, size: int, sigma: float) -> torch.Tensor:
    """Images (N, C, H, W) after a Gaussian blur; the border is mirrored. Differentiable.

    Bit for bit what torchvision computes, whose import takes longer than all else here.

    Parameters
    ----------
    images : of any range
    size : width of the window in pixels, odd
    sigma : of the Gaussian, in pixels
    """
    half = size // 2
    steps = torch.linspace(-half, half, size, device=images.device, dtype=images.dtype)
    window = torch.exp(-0.5 * (steps / sigma).pow(2))
    window = window / window.sum()
    square = torch.mm(window[:, None], window[None, :]).expand(images.shape[1], 1, size, size)
    return F.conv2d(F.pad(images, [half] * 4, mode="reflect"), square, groups=images.shape[1])


def jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    """The images (N, 3, H, W) as float32 after JPEG with chroma at half resolution.

    quality: 1 to 95; ``Invalid`` for another one.
    """
    quality = whole("quality", quality, 1, 95)
    saved = torch.empty(images.shape)
    for i, image in enumerate(images):
        file = io.BytesIO()
        to_pil(image).save(file, "JPEG", quality=quality)
        saved[i] = from_pil(Image.open(file))
    return saved.to(images.device)


def to_pil(image: torch.Tensor) -> Image.Image:
    """A (3, H, W) float image in [0, 1] as a Pillow image, rounded to 8 bits."""
    return Image.fromarray((image.detach().cpu() * 255).round().byte().permute(1, 2, 0).numpy())


def eight_bits(photo: Image.Image) -> Image.Image:
    """A grey photo of 16 bits in 8 bits, which convert() would clip at 255; any other photo as it is.

    Raises ``Invalid`` for pixels that are not finite, as in some TIFFs, of which convert() would make any grey.
    """
    if photo.mode == "F" and not np.isfinite(photo).all():
        raise Invalid("some of its pixels are not finite: save it with 8 bits")
    if not photo.mode.startswith("I"):
        return photo
    grey = np.asarray(photo).clip(0, 65535)
    has_8 = photo.mode == "I" and grey.max() < 256  # else it is "I;16", or "I" as some versions of Pillow say for it
    return Image.fromarray((grey if has_8 else grey >> 8).astype(np.uint8))


def from_pil(picture: Image.Image) -> torch.Tensor:
    """A Pillow image as a (3, H, W) float32 tensor in [0, 1]. Raises ``Invalid`` as ``eight_bits`` does."""
    return torch.from_numpy(np.array(eight_bits(picture).convert("RGB"))).permute(2, 0, 1).float() / 255
