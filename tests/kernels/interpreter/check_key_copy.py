"""The kernel that writes key copies against PyTorch's rounding: equal bit by bit."""

from __future__ import annotations

import pytest
import torch

from prhs_kernels.ops.retrieve.key_copy import KeyCopy, KeyCopyKind

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
KINDS = [KeyCopyKind.INT8, KeyCopyKind.FP8, KeyCopyKind.INT4]


def written(kind: KeyCopyKind, keys: torch.Tensor, slots: torch.Tensor | None, n: int) -> None:
    batch, num_kv_heads, _, head_dim = keys.shape
    found, wanted = (KeyCopy.allocate(kind, batch, num_kv_heads, n, head_dim, DEVICE) for _ in range(2))
    for copy in (found, wanted):
        copy.data.view(torch.uint8).fill_(99)
        copy.scale.fill_(torch.nan)
    found.write(keys, slots, backend="triton")
    wanted.write(keys, slots, backend="reference")
    different = found.data.view(torch.uint8) != wanted.data.view(torch.uint8)
    assert not different.any(), f"{int(different.sum())} of {different.numel()} bytes"
    assert torch.equal(found.scale.nan_to_num(-1.0), wanted.scale.nan_to_num(-1.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_rounding_is_the_same(kind: KeyCopyKind, dtype: torch.dtype, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    keys = torch.randn(2, 2, 37, head_dim, generator=generator)
    keys *= 10.0 ** (4 * torch.rand(2, 2, 37, 1, generator=generator) - 2)
    keys[:, :, 3] = 0.0
    keys[:, :, 4] = keys[:, :, 4].sign() * 0.25
    written(kind, keys.to(DEVICE, dtype), None, 40)
    slots = torch.tensor([0, 2], device=DEVICE)
    written(kind, keys.to(DEVICE, dtype)[:, :, :17], slots, 18)  # the last row of one sequence has no place
    written(kind, keys.to(DEVICE, dtype)[:, :, :1], slots.int() - 1, 18)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tie_and_its_neighbours(kind: KeyCopyKind) -> None:
    """Rows whose scale is a power of two, with every midpoint between two codes and the numbers beside it."""
    largest = kind.largest
    if kind == KeyCopyKind.FP8:
        codes = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    else:
        codes = torch.arange(largest + 1.0)
    middle = (codes[1:] + codes[:-1]) / 2
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    values = torch.cat([codes, middle, middle.nextafter(up), middle.nextafter(down)])
    values = torch.cat([values, -values])
    rows = torch.zeros(-(-len(values) // 63), 63)
    rows.view(-1)[: len(values)] = values
    keys = torch.cat([rows, torch.full((len(rows), 1), largest)], dim=1)[None, None].to(DEVICE)
    for scale in (1.0, 0.125):
        written(kind, keys * scale, None, keys.shape[2])


def test_a_cache_view_is_read_in_place() -> None:
    """A preallocated cache laid out `[batch, n, heads, head_dim]`, of which a part is in use."""
    keys = torch.randn(2, 50, 3, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    written(KeyCopyKind.INT8, keys[:, :33].transpose(1, 2), None, 33)
