"""Programmatic dependent launch: a kernel is started while the one before it still runs.

Such a kernel waits (`gdc_wait`) before it reads or writes anything that an earlier kernel may touch, and
first does what depends on nothing, such as asking for its weights. Every one of them waits, so that what came
before the kernel before is finished too.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def use_pdl(device: torch.device) -> bool:
    """Whether kernels on this device are launched that way: compute capability 9.0 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, Any]:
    """Arguments for the launch of a kernel with a constant `PDL`."""
    pdl = use_pdl(device)
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
