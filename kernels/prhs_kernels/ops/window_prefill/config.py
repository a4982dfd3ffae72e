"""Launch shapes of the prefill kernel: a small stored table, nothing is tuned at run time."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from prhs_kernels.ops.decode_config import next_power_of_2, precision

HOPPER = 90
FP32_CHAIN = 32


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """block_m: query rows of a program; block_n: rows of K per iteration."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def constants(self, query: torch.Tensor) -> dict[str, Any]:
        """Compile-time arguments and launch options."""
        padded = next_power_of_2(query.shape[-1])
        return {
            "HEAD_DIM": query.shape[-1],
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_D": padded,
            # columns that are summed in one chain: PyTorch's fp32 product breaks them up as well
            "BLOCK_C": min(padded, FP32_CHAIN) if query.dtype == torch.float32 else padded,
            "PRECISION": precision(query.dtype),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def prefill_config(head_dim: int, dtype: torch.dtype, capability: int) -> PrefillConfig:
    """Largest tiles that need no stack (docs/benchmarks/compile.json); capability as in sm_80: 80.

    Before Hopper the operands of the tensor cores live in registers: less room for tiles.
    """
    if dtype == torch.float32:  # multiplied without tensor cores
        return PrefillConfig(32, 16, 4 if capability < HOPPER else 8, 2)
    if head_dim <= 64:
        return PrefillConfig(128, 64, 8 if capability < HOPPER else 4, 3)
    if head_dim <= 128:
        return PrefillConfig(64, 64, 4, 3) if capability < HOPPER else PrefillConfig(128, 64, 8, 3)
    return PrefillConfig(64, 32, 8, 2) if capability < HOPPER else PrefillConfig(128, 32, 8, 2)


@functools.cache
def capability_of(device: torch.device) -> int:
    """Compute capability of a CUDA device; Hopper's for the interpreter."""
    if device.type != "cuda":
        return HOPPER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
