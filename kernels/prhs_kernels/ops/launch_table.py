"""Launch shapes per architecture: the only numbers that were found by measuring, all in one place.

Each entry compiles without stack or local memory (docs/benchmarks/compile.json). Those of sm_90 were timed on
an H200 (docs/benchmarks/h200-operators.json); sm_80 and sm_100 have not been timed and take nearly the same.
"""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Tile:
    """block_n: keys per iteration; per_sm: programs that are meant to run at once on a multiprocessor; many:
    what to take where there are more rows than half of these."""

    block_n: int
    num_warps: int
    num_stages: int
    per_sm: int = 1
    many: Tile | None = None


# (kernel, bits of the dtype, largest head_dim of the entry)
_SM90 = {
    ("sparse_decode", 16, 128): Tile(64, 4, 3, per_sm=3, many=Tile(64, 2, 2, per_sm=4)),
    ("sparse_decode", 16, 256): Tile(32, 4, 3, per_sm=3),
    ("sparse_decode", 32, 256): Tile(16, 8, 2, per_sm=3),
    ("dense_decode", 16, 128): Tile(64, 4, 3, per_sm=3),
    ("dense_decode", 16, 256): Tile(32, 4, 3, per_sm=3),
    ("dense_decode", 32, 256): Tile(16, 8, 2, per_sm=3),
    ("scan", 16, 128): Tile(64, 4, 4, per_sm=4),
    ("scan", 16, 256): Tile(32, 4, 4, per_sm=4),
    ("scan", 32, 256): Tile(16, 8, 2, per_sm=4),
    ("scan int8", 16, 128): Tile(128, 4, 4, per_sm=4),
    ("scan int8", 16, 256): Tile(64, 4, 4, per_sm=4),
    ("scan int8", 32, 256): Tile(16, 8, 2, per_sm=4),
    ("scan fp8", 16, 128): Tile(128, 4, 4, per_sm=4),
    ("scan fp8", 16, 256): Tile(64, 4, 4, per_sm=4),
    ("scan fp8", 32, 256): Tile(16, 8, 2, per_sm=4),
    ("scan int4", 16, 128): Tile(256, 4, 3, per_sm=4),
    ("scan int4", 16, 256): Tile(128, 4, 3, per_sm=4),
    ("scan int4", 32, 256): Tile(16, 8, 2, per_sm=4),
}
# where the entries above would take a few bytes of the stack
_SM100 = {
    **_SM90,
    ("scan int4", 16, 80): Tile(128, 4, 4, per_sm=4),
    ("sparse_decode", 32, 64): Tile(16, 8, 2, per_sm=3),
    ("sparse_decode", 32, 128): Tile(16, 4, 2, per_sm=3),
    ("scan", 32, 128): Tile(16, 8, 2, per_sm=4),
    ("scan", 32, 256): Tile(16, 4, 2, per_sm=4),
}
_TABLES = {80: _SM90, 90: _SM90, 100: _SM100}


@functools.cache
def architecture(device: torch.device) -> int:
    """The table's architecture for a device: the newest that is not newer; 90 where there is none."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in _TABLES if known <= 10 * major + minor), default=min(_TABLES))


def tile(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device, arch: int = 0) -> Tile:
    """Launch shape of a kernel; arch: of another architecture than the device's."""
    table = _TABLES[arch or architecture(device)]
    bits = 32 if dtype == torch.float32 else 16
    most = min(most for name, size, most in table if (name, size) == (kernel, bits) and head_dim <= most)
    return table[kernel, bits, most]
