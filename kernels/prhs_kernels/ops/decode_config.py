"""Launch shapes of the decode kernels: a small stored table, nothing is tuned at run time."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from prhs_kernels.ops.backend import num_sms
from prhs_kernels.ops.launch_table import tile

MAX_SPLITS = 64
# in iterations of programs that fill a multiprocessor: the start and end of these, merging splits, and an
# iteration of two programs or more that leave room on it; one alone waits for memory all the time
START, MERGE, SPARSE = 1.5, 1.5, 0.85


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """block_n: rows of K per iteration; num_splits: programs per KV head; least_tiles: iterations of a split,
    of a KV head that has as many."""

    block_n: int
    num_warps: int
    num_stages: int
    num_splits: int
    least_tiles: int = 1

    def constants(self, query: torch.Tensor, num_kv_heads: int) -> dict[str, Any]:
        """Compile-time arguments shared by the decode kernels."""
        group, head_dim = query.shape[1] // num_kv_heads, query.shape[-1]
        return {
            "HEAD_DIM": head_dim,
            "GROUP": group,
            "BLOCK_G": max(16, next_power_of_2(group)),  # the smallest tile of a matrix product
            "BLOCK_D": next_power_of_2(head_dim),
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


def gather_registers(dtype: torch.dtype) -> int | None:
    """Bound on the registers of a thread where kept positions are gathered: only in fp32, for that reason."""
    return 255 if dtype == torch.float32 else None


def precision(dtype: torch.dtype) -> str:
    """fp32 inputs are multiplied as fp32: TF32 would keep 10 bits of the mantissa."""
    return "ieee" if dtype == torch.float32 else "tf32"


def sparse_config(
    query: torch.Tensor, num_kv_heads: int, max_kept: int, num_splits: int | None = None,
    mean_kept: int | None = None,
) -> DecodeConfig:  # fmt: skip
    """Launch shape for sets of `mean_kept` positions, at most `max_kept`, depends on shapes only.

    A KV head of the mean size gets as many splits as take least time in waves of programs that run at once;
    few programs with as much to do in all take less than many, since each has a start and an end.
    Counts are known on the device only: where some may be far above the mean there are more programs, so that
    a head with many positions gets more splits of that size.
    """
    shape = tile("sparse_decode", query.shape[-1], query.dtype, query.device)
    rows, sms = max(1, query.shape[0] * num_kv_heads), num_sms(query.device)
    if shape.many is not None and 2 * rows > shape.per_sm * sms:
        shape = shape.many
    if num_splits is not None:
        return DecodeConfig(shape.block_n, shape.num_warps, shape.num_stages, min(num_splits, MAX_SPLITS))
    mean = max(1, min(mean_kept or max_kept, max_kept))
    tiles = -(-mean // shape.block_n)

    def cost(splits: int) -> float:
        running = -(-rows * splits // sms)
        iteration = SPARSE if 1 < running < shape.per_sm else 1.0
        wave = -(-tiles // splits) * iteration + START * min(running / shape.per_sm, 1.0)
        return -(-running // shape.per_sm) * wave + (MERGE if splits > 1 else 0)

    wanted = min(range(1, min(tiles, MAX_SPLITS) + 1), key=cost)
    room = min(4, max_kept // mean)
    splits = min(wanted * room, MAX_SPLITS)
    return DecodeConfig(shape.block_n, shape.num_warps, shape.num_stages, splits, -(-tiles // wanted))


def dense_config(
    query: torch.Tensor, num_kv_heads: int, n: int, num_splits: int | None = None
) -> DecodeConfig:
    """Launch shape for n slots: the fewest splits with which the last wave of programs is nearly full."""
    shape = tile("dense_decode", query.shape[-1], query.dtype, query.device)
    rows, at_once = max(1, query.shape[0] * num_kv_heads), shape.per_sm * num_sms(query.device)
    if num_splits is None:
        most = max(1, min(MAX_SPLITS, -(-n // shape.block_n) // 2))
        used = [rows * s / (-(-rows * s // at_once) * at_once) for s in range(1, most + 1)]
        num_splits = 1 + next(s for s, share in enumerate(used) if share >= 0.95 * max(used))
    return DecodeConfig(shape.block_n, shape.num_warps, shape.num_stages, max(1, min(num_splits, MAX_SPLITS)))
