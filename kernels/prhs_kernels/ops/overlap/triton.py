"""Programmatic dependent launch, from Hopper on: the next kernel's programs start while the last ones of the
previous kernel still run, and wait for its results on the device. It hides the time that a launch takes.

Every program of a kernel that is launched this way waits before it reads what others wrote, so a kernel is
complete only after the one before it. Most let the next kernel start only then: a program that starts behind
one of those knows that the kernel before that one is complete, and need not wait for what it reads of it.
`rope_append` makes use of that for all but its projection, and `sparse_decode` behind the choice of
`retrieve`, whose programs let it start when the scan has told them that all decisions are made; loads that
do without waiting must not find in L1 what an earlier kernel left there. Elsewhere, and in the interpreter,
all this is nothing.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait for the results of the kernel before; then the next one may start, and wait in its turn."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def load_acquire(ptr):
    """An int32 scalar; what was written before it was is seen by every load that follows."""
    address = ptr.to(tl.int64)
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def load_relaxed(ptr):
    """An int32 scalar as it is now, for a program that waits until it changes."""
    address = ptr.to(tl.int64)
    return tl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.b32 $0, [$1];", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def post(ptr, value):
    """Store an int32 scalar that other programs wait for, before anything that this thread does later."""
    address = ptr.to(tl.int64)
    tl.inline_asm_elementwise(
        "st.relaxed.gpu.global.b32 [$1], $2; fence.acq_rel.gpu; mov.b32 $0, 0;", "=r,l,r", [address, value],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@functools.cache
def pdl_options(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
