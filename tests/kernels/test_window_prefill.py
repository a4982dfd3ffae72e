"""Chunked prefill attention against one masked softmax over everything."""

from __future__ import annotations

import pytest
import torch

from prhs_kernels.ops.window_prefill import reference
from prhs_kernels.ops.window_prefill.reference import window_prefill


def naive(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    output = torch.zeros_like(query)
    group = query.shape[1] // keys.shape[1]
    for batch, head, row in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        seen = mask[batch, row].nonzero().flatten()
        if len(seen):
            logits = keys[batch, head // group, seen] @ query[batch, head, row] * scale
            output[batch, head, row] = logits.softmax(-1) @ values[batch, head // group, seen]
    return output


@pytest.mark.parametrize(("steps", "length"), [(1, 1), (15, 15), (16, 17), (33, 33), (5, 63), (64, 111)])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_against_brute_force(monkeypatch: pytest.MonkeyPatch, steps: int, length: int, group: int) -> None:
    monkeypatch.setattr(reference, "QUERY_CHUNK", 16)  # several chunks, the last one ragged
    generator = torch.Generator().manual_seed(length)
    draw = [
        torch.randn(2, heads, rows, 8, generator=generator, dtype=torch.float64)
        for heads, rows in ((4, steps), (4 // group, length), (4 // group, length))
    ]
    mask = torch.rand(2, steps, length, generator=generator) < 0.5
    mask[0, 0] = False  # a padding row
    asked: list[slice] = []

    def visible(rows: slice) -> torch.Tensor:
        asked.append(rows)
        return mask[:, rows]

    output = window_prefill(*draw, visible, 0.3)
    torch.testing.assert_close(output, naive(*draw, mask, 0.3), rtol=1e-12, atol=1e-12)
    assert not output[0, :, 0].any(), "a row that sees nothing is zero"
    assert max(rows.stop - rows.start for rows in asked) <= 16
    assert [row for rows in asked for row in range(rows.start, rows.stop)] == list(range(steps))
