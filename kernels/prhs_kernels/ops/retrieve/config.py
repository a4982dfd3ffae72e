"""Launch shapes of the retrieval kernels; they depend on shapes only, never on data."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.ops.backend import num_sms
from prhs_kernels.ops.decode_config import next_power_of_2
from prhs_kernels.ops.retrieve.state import chunk_size

SCAN_PROGRAMS_PER_SM = 4
RESIDENT_LIMIT = 32768  # positions of a row that fit the registers of one program


@dataclasses.dataclass(frozen=True)
class ScanConfig:
    """block_n: keys per iteration; chunk: keys per unit of work; programs: persistent programs."""

    block_n: int
    num_warps: int
    num_stages: int
    chunk: int
    programs: int


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """block: positions per count; small: per step of the passes that are rare or short; pack: per step of
    building the bit mask; resident: one block holds the row, in registers."""

    block: int
    small: int
    pack: int
    resident: bool
    num_warps: int


def scan_tile(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """block_n, num_warps, num_stages without spills (compile.json)."""
    if dtype == torch.float32:
        return 16, 8, 2
    return (32, 4, 4) if head_dim > 128 else (64, 4, 4)


def scan_config(head_dim: int, dtype: torch.dtype, rows: int, n: int, device: torch.device) -> ScanConfig:
    """For caches of up to n slots."""
    chunk = chunk_size(n)
    programs = min(rows * -(-n // chunk), SCAN_PROGRAMS_PER_SM * num_sms(device))
    return ScanConfig(*scan_tile(head_dim, dtype), chunk, max(1, programs))


def weigh_blocks(group: int, n: int) -> dict[str, int]:
    """Compile-time blocks of the weighing: about 1024 scores per iteration, never more than a chunk."""
    padded = next_power_of_2(group)
    return {"BLOCK_G": padded, "BLOCK_C": 64, "BLOCK_N": min(chunk_size(n), 1024 // padded)}


def select_config(n: int) -> SelectConfig:
    """For caches of up to n slots."""
    block = min(max(next_power_of_2(n), 1024), RESIDENT_LIMIT)
    resident = n <= RESIDENT_LIMIT
    if not resident:
        block = RESIDENT_LIMIT // 4
    num_warps = max(4, min(16, block // 512))
    return SelectConfig(block, 128 * num_warps, min(block, 8192), resident, num_warps)
