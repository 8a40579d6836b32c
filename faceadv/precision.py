"""Devices and precision: bfloat16 where a device computes in it natively, float32 for everything that is scored."""

import contextlib
import contextvars
import os
from collections.abc import Iterator

import torch

__all__ = ["autocast", "device", "has_bfloat16"]

_exact = contextvars.ContextVar("exact", default=False)


def device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is ``FACEADV_DEVICE``, else the GPU if there is one, else the CPU."""
    name = (os.environ.get("FACEADV_DEVICE") or "auto") if name == "auto" else name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether the device computes in bfloat16 natively (elsewhere it would be slower than float32)."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # oneDNN also takes bfloat16 on AVX-512 without instructions for it, and torch for macOS has no oneDNN
    native = any(torch.cpu.get_capabilities().get(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))
    return bool(kind == "cpu" and native and torch.backends.mkldnn.is_available())


@contextlib.contextmanager
def autocast(device: torch.device | str, fast: bool = True) -> Iterator[None]:
    """A context in which networks compute in bfloat16 if ``fast`` and the device has it, otherwise in float32.

    Without ``fast`` everything in it is float32: no TensorFloat-32, and a context within this one that asks for
    bfloat16 does not get it.
    """
    device, exact = torch.device(device), _exact.get() or not fast
    mark, flags = _exact.set(exact), (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [flag.fp32_precision for flag in flags]
    try:
        if exact:
            for flag in flags:
                flag.fp32_precision = "ieee"
        with torch.autocast(device.type, torch.bfloat16, enabled=not exact and has_bfloat16(device)):
            yield
    finally:
        for flag, precision in zip(flags, before):
            flag.fp32_precision = precision
        _exact.reset(mark)
