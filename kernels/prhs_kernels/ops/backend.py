"""Which implementation of an operator runs, and the checks that all operators share."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal

import torch

from prhs_kernels.errors import ResourceError, UsageError

Backend = Literal["auto", "reference", "triton"]

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
MAX_GROUP = 16
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported; it is not imported to find out."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter, on the CPU (`TRITON_INTERPRET=1` before the import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(backend: Backend, tensor: torch.Tensor) -> bool:
    """Resolve `auto`: triton on a CUDA device if it is installed, the reference everywhere else.

    Raises:
        UsageError: a backend of another name.
        ResourceError: triton was asked for by name and cannot run here.
    """
    if backend == "auto":
        return tensor.is_cuda and has_triton()
    if backend == "reference":
        return False
    if backend != "triton":
        raise UsageError(f"backend = {backend!r} must be 'auto', 'reference' or 'triton'")
    if not has_triton():
        raise ResourceError("backend 'triton' needs the package triton; use backend 'reference'")
    if not tensor.is_cuda and not interpreted():
        raise ResourceError(
            f"backend 'triton' needs a CUDA device, the tensors are on {tensor.device}; "
            "use backend 'reference' or set TRITON_INTERPRET=1"
        )
    return True


def explain_backend(device: torch.device) -> str:
    """What `auto` takes on this device and why, in a line for people."""
    if device.type != "cuda":
        return "reference (PyTorch): the kernels need a CUDA device"
    if not has_triton():
        return "reference (PyTorch): triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    tested = "" if major >= 8 else "; tested from sm_80 on"
    return f"triton kernels for sm_{major}{minor}, decode steps under a CUDA graph{tested}"


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise `UsageError` unless the shape is the expected one; None stands for any size."""
    fits = tensor.dim() == len(expected) and all(
        want is None or want == have for want, have in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise UsageError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")


def check_like(
    name: str, tensor: torch.Tensor, other: torch.Tensor, dtypes: tuple[torch.dtype, ...] = ()
) -> None:
    """Raise `UsageError` unless on the device of `other` and of one of the dtypes (by default its own)."""
    if tensor.device != other.device:
        raise UsageError(f"{name}: expected device {other.device}, got {tensor.device}")
    wanted = dtypes or (other.dtype,)
    if tensor.dtype not in wanted:
        raise UsageError(f"{name}: expected dtype {' or '.join(map(str, wanted))}, got {tensor.dtype}")


def check_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, steps: int | None = 1
) -> None:
    """Checks of attention: query `[batch, num_qo_heads, steps, head_dim]` (any number for None), keys and
    values `[batch, num_kv_heads, n, head_dim]`, one dtype, one device, heads that form groups, scale > 0."""
    check_shape("query", query, (None, None, steps, None))
    batch, num_qo_heads, _, head_dim = query.shape
    check_shape("keys", keys, (batch, None, None, head_dim))
    check_shape("values", values, (batch, keys.shape[1], keys.shape[2], head_dim))
    check_like("keys", keys, query)
    check_like("values", values, query)
    if not scale > 0:
        raise UsageError(f"scale = {scale} must be positive")
    num_kv_heads = keys.shape[1]
    if num_kv_heads < 1 or num_qo_heads % num_kv_heads:
        raise UsageError(f"num_qo_heads = {num_qo_heads} is not a multiple of num_kv_heads = {num_kv_heads}")


def check_kernel_limits(query: torch.Tensor, *caches: torch.Tensor) -> None:
    """What the kernels can do beyond the reference: raise `UsageError` outside of it."""
    group, head_dim = query.shape[1] // caches[0].shape[1], query.shape[-1]
    if query.dtype not in KERNEL_DTYPES:
        raise UsageError(f"query: expected dtype float32, float16 or bfloat16, got {query.dtype}")
    if head_dim not in HEAD_DIMS:
        raise UsageError(f"head_dim = {head_dim}: the kernels know {', '.join(map(str, HEAD_DIMS))}")
    if group > MAX_GROUP:
        raise UsageError(f"{group} query heads per KV head: the kernels take at most {MAX_GROUP}")
    for cache in caches:
        if cache.stride(-1) != 1:
            raise UsageError(f"keys and values: expected stride 1 along head_dim, got {cache.stride(-1)}")


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 2 for the interpreter."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
