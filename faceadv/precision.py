"""Devices and precision: bfloat16 where a device computes in it natively, float32 for everything that is scored."""

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch

from faceadv.errors import Invalid, Missing
from faceadv.store import progress

__all__ = ["autocast", "describe", "device", "has_bfloat16", "in_parts", "send"]

_exact = contextvars.ContextVar("exact", default=False)


def device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; "auto" is ``FACEADV_DEVICE``, else NVIDIA's GPU if there is one, else the CPU.

    Apple's GPU is taken only by its name, "mps", because nobody has run this package there. Raises ``Invalid`` for a
    name that torch does not know, ``Missing`` for a device that this machine does not have.
    """
    asked = (os.environ.get("FACEADV_DEVICE") or "auto") if name == "auto" else name
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(asked)
        there = (found.index or 0) < _count(found)
    except (RuntimeError, AttributeError) as e:
        raise Invalid(f'There is no device "{asked}": use "auto", "cpu", "cuda", or one GPU as in "cuda:1".') from e
    if not there:
        set_by = "" if asked == name else " (from FACEADV_DEVICE)"
        raise Missing(f'This machine has no device "{asked}"{set_by}: use "auto" or "cpu".')
    return found


def _count(device):
    """How many devices of this kind there are."""
    module = torch.get_device_module(device)
    return module.device_count() if device.type == "cpu" or module.is_available() else 0


def describe(device: torch.device) -> str:
    """A device in words, for a record: "cpu", or the name of a GPU, as in "cuda (NVIDIA H100)"."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


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


def together(batch: int, device: torch.device | str) -> int:
    """How many images a device takes at once: ``batch`` on a CPU, eight times as many on a GPU.

    With fewer a GPU would wait for kernels to be started. Where they do not fit, ``in_parts`` goes on with less.
    """
    return batch if torch.device(device).type == "cpu" else 8 * batch


def in_parts(
    function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, batch: int, desc: str = ""
) -> list[torch.Tensor]:
    """What ``function`` makes of ``rows``, part by part; smaller parts as long as a GPU's memory is full.

    Parameters
    ----------
    function : of a part of ``rows``
    rows : (N,) positions
    batch : the largest part
    desc : what a progress bar says; without it there is none
    """
    done, start = [], 0
    with progress.bar(total=len(rows), desc=desc, unit="image", **({} if desc else {"disable": True})) as bar:
        while start < len(rows):
            part = rows[start : start + batch]
            try:
                done.append(function(part))
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch //= 2
                progress.log.warning("The memory of the GPU is full: going on with %d images at a time.", batch)
                continue
            start += len(part)
            bar.update(len(part))
    return done


def send(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """An array on a device. A GPU copies it while the CPU goes on."""
    tensor = torch.from_numpy(values)
    return (
        tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor.to(device)
    )
