"""Which arithmetic a device gets."""

from __future__ import annotations

import torch


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16: CUDA from compute capability 8.0, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def resolve(precision: str, device: torch.device) -> str:
    """``fp32`` or ``bf16`` for a `TrainConfig.precision` on a device."""
    if precision == "auto":
        return "bf16" if bf16_is_fast(device) else "fp32"
    return precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a `TrainConfig.precision` on a device."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve(precision, device) == "bf16")
