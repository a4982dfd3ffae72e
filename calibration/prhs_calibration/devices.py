"""Devices and dtypes as options name them."""

from __future__ import annotations

import torch

from prhs_kernels.errors import ResourceError, UsageError
from prhs_kernels.runtime import distributed

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device meant by an option; ResourceError when this machine lacks it."""
    if device is None or device == "auto":
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {str(device)!r}: give cpu, cuda or cuda:N") from error
    if target.type not in ("cpu", "cuda"):
        raise UsageError(f"device {str(device)!r} is not supported: give cpu, cuda or cuda:N")
    if target.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ResourceError("device cuda was asked for, but torch sees no CUDA device here; use --device cpu")
    index = torch.cuda.current_device() if target.index is None else target.index
    if index >= count:
        there = "only cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ResourceError(f"device cuda:{index} was asked for, but there is {there}; use that")
    return torch.device("cuda", index)


def rank_device(device: str | torch.device | None) -> torch.device:
    """The device of this rank under torchrun: its own GPU, or the CPU on a machine without one."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device or "auto") not in ("auto", kind):
        raise UsageError(
            f"--device {device} cannot be had under torchrun: each rank takes its own {kind} device"
        )
    if kind == "cpu":
        return torch.device("cpu")
    return resolve_device(f"cuda:{distributed.launched().local_rank}")


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The floating-point type meant by an option: bf16 on CUDA and fp32 on the CPU unless said otherwise."""
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise UsageError(f"unknown dtype {dtype!r}: give one of {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if dtype not in _DTYPES.values():
        raise UsageError(f"dtype {dtype} is not supported: give float32, bfloat16 or float16")
    return dtype
