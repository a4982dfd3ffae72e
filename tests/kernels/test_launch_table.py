"""The stored launch shapes: one for everything that the kernels take, and the nearest older architecture."""

from __future__ import annotations

import itertools

import pytest
import torch

from prhs_kernels.ops import launch_table
from prhs_kernels.ops.backend import HEAD_DIMS, KERNEL_DTYPES

CPU = torch.device("cpu")
KERNELS = ["sparse_decode", "dense_decode", "scan", "scan int8", "scan fp8", "scan int4"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_shape_has_an_entry(kernel: str) -> None:
    for arch, head_dim, dtype in itertools.product((80, 90, 100), HEAD_DIMS, KERNEL_DTYPES):
        shape = launch_table.tile(kernel, head_dim, dtype, CPU, arch)
        assert shape.block_n >= 16 and shape.num_warps in (4, 8) and shape.num_stages >= 2


def test_the_smallest_entry_that_fits_is_taken() -> None:
    narrow, wide = (launch_table.tile("scan", d, torch.bfloat16, CPU) for d in (128, 256))
    assert narrow.block_n > wide.block_n
    assert launch_table.tile("scan", 96, torch.float16, CPU) == narrow


@pytest.mark.parametrize(
    ("capability", "arch"), [((7, 5), 80), ((8, 6), 80), ((9, 0), 90), ((10, 3), 100), ((12, 0), 100)]
)
def test_a_device_takes_the_newest_table_that_is_not_newer(
    capability: tuple[int, int], arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    launch_table.architecture.cache_clear()
    assert launch_table.architecture(torch.device("cuda")) == arch
    launch_table.architecture.cache_clear()
