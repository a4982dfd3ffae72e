"""Launch shapes of the retrieval kernels; they depend on shapes only, never on data."""

from __future__ import annotations

import dataclasses
import math

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
class ChooseConfig:
    """block_n: positions weighed per iteration; sample: positions for a bound; list_len: candidates that stay
    in registers; programs: parts that run at once; listed: parts of a row from which on candidates are listed
    while they are weighed."""

    block_n: int
    sample: int
    list_len: int
    num_warps: int
    programs: int
    listed: int = 8  # with few parts of many tiles, waiting for places on the list costs more than a sample


def scan_config(
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    copy: str = "exact",
    group: int = 1,
    arch: int = 0,
) -> ScanConfig:
    """From the stored table; arch: of another architecture. Half the positions in a tile that a large group
    makes twice as wide."""
    shape = tile("scan" if copy == "exact" else f"scan {copy}", head_dim, dtype, device, arch)
    block_n = max(16, shape.block_n // (2 if group > 8 else 1))
    return ScanConfig(block_n, shape.num_warps, shape.num_stages, shape.per_sm * num_sms(device))


def scan_registers(copy: str, dtype: torch.dtype) -> int | None:
    """Bound on the registers of a thread: in fp32 all there are, or the assembler may aim at an occupancy for
    which it uses the stack; in a scan of a copy as many as let four programs fit on an SM."""
    if dtype == torch.float32:
        return 255
    return None if copy == "exact" else 128


def choose_config(n: int, group: int, capacity: int, device: torch.device) -> ChooseConfig:
    """For caches of up to n slots and sets of up to `capacity`: one program of 16 warps on an SM, four of 4
    where rows are short."""
    heads = next_power_of_2(group)  # about sixteen scores per thread
    if n <= 4096:
        sample = 512 if n <= 2048 else 1024
        listed = list_length(n, capacity, sample, 2048)
        return ChooseConfig(max(256, 2048 // heads), sample, listed, 4, 4 * num_sms(device))
    sample = 2048 if n <= 131072 else 4096
    listed = list_length(n, capacity, sample, 8192)
    return ChooseConfig(max(512, min(2048, 8192 // heads)), sample, listed, 16, num_sms(device))


def list_length(n: int, capacity: int, least: int, most: int) -> int:
    """Candidates that stay in registers: as many as are listed where two thirds of the capacity are chosen.

    Most of the rest are neighbours. With less, every step of the search goes through memory; with more than
    is needed it takes longer. `least` positions are the sample.
    """
    if capacity >= n:  # for a head that keeps everything: it says nothing about those that choose
        return least
    k, stride = capacity * 2 / 3, n / least
    listed = 1.125 * (k + 3.5 * math.sqrt(k * stride) + 2 * stride)
    return min(max(next_power_of_2(math.ceil(listed)), least), most)
