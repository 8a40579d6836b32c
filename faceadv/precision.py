"""Precision: bfloat16 where a device computes in it natively, float32 for everything that is scored."""

import torch


def has_bfloat16(device):
    """Whether the device computes in bfloat16 natively (elsewhere it would be slower than float32)."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # oneDNN also takes bfloat16 on AVX-512 without instructions for it, and torch for macOS has no oneDNN
    native = any(torch.cpu.get_capabilities().get(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))
    return kind == "cpu" and native and torch.backends.mkldnn.is_available()


def autocast(device, fast=True):
    """A context in which networks compute in bfloat16 if ``fast`` and the device has it, else in float32."""
    device = torch.device(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast and has_bfloat16(device))
