"""Programmatic dependent launch, from Hopper on: the next kernel's programs start while the last ones of the
previous kernel still run, and wait for its results on the device. It hides the time that a launch takes.

Every program of every kernel that is launched this way waits first, so that what it reads is complete, then
lets the next kernel start. Elsewhere, and in the interpreter, both are nothing.
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


@functools.cache
def pdl_options(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
