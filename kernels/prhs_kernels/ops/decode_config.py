"""Launch shapes of the decode kernels: a small stored table, nothing is tuned at run time."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from prhs_kernels.ops.backend import num_sms

CTAS_PER_SM = 3  # what shared memory lets run together at head_dim 128, 16 bit
MAX_SPLITS = 64


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """block_n: rows of K per iteration; num_splits: programs per KV head."""

    block_n: int
    num_warps: int
    num_stages: int
    num_splits: int

    def constants(self, query: torch.Tensor, num_kv_heads: int) -> dict[str, Any]:
        """Compile-time arguments shared by the decode kernels."""
        group = query.shape[1] // num_kv_heads
        return {
            "HEAD_DIM": query.shape[-1],
            "GROUP": group,
            "BLOCK_G": max(16, next_power_of_2(group)),  # the smallest tile of a matrix product
            "BLOCK_D": next_power_of_2(query.shape[-1]),
            "BLOCK_N": self.block_n,
            "PRECISION": precision(query.dtype),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def max_registers(num_warps: int) -> int:
    """Bound on the registers of a thread: three programs of four warps fit on an SM.

    Without one the assembler may aim at an occupancy that shared memory rules out anyway, and put a few bytes
    on the stack for it. The gather and the scan do not need it, and with it would use all of it.
    """
    return min(168, 65536 // (32 * num_warps))


def precision(dtype: torch.dtype) -> str:
    """fp32 inputs are multiplied as fp32: TF32 would keep 10 bits of the mantissa."""
    return "ieee" if dtype == torch.float32 else "tf32"


def tile(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """block_n, num_warps, num_stages: no spills, and three programs fit on an SM (compile.json)."""
    if dtype == torch.float32:
        return 16, 8, 2
    return (32, 4, 3) if head_dim > 128 else (64, 4, 3)


def decode_config(
    query: torch.Tensor, num_kv_heads: int, max_rows: int, num_splits: int | None = None
) -> DecodeConfig:
    """Launch shape for at most `max_rows` rows of K per KV head; depends on shapes only, never on data."""
    block_n, num_warps, num_stages = tile(query.shape[-1], query.dtype)
    tiles = max(1, -(-max_rows // block_n))
    if num_splits is None:
        wanted = -(-CTAS_PER_SM * num_sms(query.device) // max(1, query.shape[0] * num_kv_heads))
        num_splits = max(1, min(wanted, tiles, MAX_SPLITS))
        num_splits = -(-tiles // -(-tiles // num_splits))  # no split that is left without a tile
    return DecodeConfig(block_n, num_warps, num_stages, min(num_splits, MAX_SPLITS))
