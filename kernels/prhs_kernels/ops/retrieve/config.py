"""Launch shapes of the retrieval kernels; they depend on shapes only, never on data."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.ops.backend import num_sms
from prhs_kernels.ops.decode_config import next_power_of_2
from prhs_kernels.ops.launch_table import tile


@dataclasses.dataclass(frozen=True)
class ScanConfig:
    """block_n: keys per iteration; slots: pieces of work that a launch is divided into."""

    block_n: int
    num_warps: int
    num_stages: int
    slots: int


@dataclasses.dataclass(frozen=True)
class WeighConfig:
    """block_n: positions per iteration; programs: the grid."""

    block_n: int
    num_warps: int
    programs: int


@dataclasses.dataclass(frozen=True)
class ChooseConfig:
    """pack: positions marked per iteration; list_len: open positions that stay in registers; words: of the
    bit mask, per iteration; programs: the grid."""

    pack: int
    list_len: int
    words: int
    num_warps: int
    programs: int


def scan_config(head_dim: int, dtype: torch.dtype, device: torch.device, copy: str = "exact") -> ScanConfig:
    """From the stored table."""
    shape = tile("scan" if copy == "exact" else f"scan {copy}", head_dim, dtype, device)
    return ScanConfig(shape.block_n, shape.num_warps, shape.num_stages, shape.per_sm * num_sms(device))


def scan_registers(copy: str, dtype: torch.dtype) -> int | None:
    """Bound on the registers of a thread in a scan of a copy, where four programs fit on an SM."""
    return None if copy == "exact" else 255 if dtype == torch.float32 else 128


def weigh_config(group: int, device: torch.device) -> WeighConfig:
    """Sixteen scores per thread, and programs enough to hide the way to memory."""
    return WeighConfig(max(64, min(1024, 2048 // next_power_of_2(group))), 4, 4 * num_sms(device))


def choose_config(n: int, device: torch.device) -> ChooseConfig:
    """For caches of up to n slots: one program of 16 warps on an SM, four of four where rows are short."""
    if n <= 4096:
        return ChooseConfig(1024, 512, 128, 4, 4 * num_sms(device))
    return ChooseConfig(4096, 1024, 1024, 16, num_sms(device))
