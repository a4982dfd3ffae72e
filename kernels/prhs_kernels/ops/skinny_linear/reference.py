"""The projections in plain PyTorch."""

from __future__ import annotations

import torch


def linear_parts(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, splits: int, block: int,
    factors: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Arguments and result as in `api.linear_parts`, factors: of the rows; a part is a run of whole blocks of
    the width."""
    blocks = weight.shape[1] // block
    width = -(-blocks // splits) * block
    wide = torch.promote_types(rows.dtype, torch.float32)
    pairs = zip(rows.to(wide).split(width, dim=1), weight.to(wide).split(width, dim=1), strict=True)
    parts = torch.stack([row @ part.T for row, part in pairs])
    if factors is not None:
        parts *= factors[:, None]
    if bias is not None:
        parts[0] += bias
    return parts


def gated_linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, factors: torch.Tensor | None
) -> torch.Tensor:
    """Arguments and result as in `api.gated_linear`, factors: of the rows."""
    both = linear_parts(rows, weight, bias, 1, weight.shape[1], factors)[0].to(rows.dtype)
    gate, up = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
