"""The largest of every part of a row, then the largest of those; two launches end a step."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prhs_kernels.ops.overlap.triton import pdl_options, wait_for_previous

BLOCK = 2048


@triton.jit
def largest_kernel(
    logits_ptr,  # [batch, size]
    best_ptr,  # [batch, parts], fp32
    place_ptr,  # [batch, parts], int32
    size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs = part * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * size + offs, mask=offs < size, other=float("-inf")).to(tl.float32)
    logits = tl.where(logits == logits, logits, float("inf"))  # NaN is largest in PyTorch
    best, place = tl.max(logits, axis=0, return_indices=True, return_indices_tie_break_left=True)
    at = row * tl.num_programs(1) + part
    tl.store(best_ptr + at, best)
    tl.store(place_ptr + at, part * BLOCK + place)


@triton.jit
def next_token_kernel(
    best_ptr,  # [batch, parts], fp32
    place_ptr,  # [batch, parts], int32
    token_ptr,  # [batch], int64
    alive_ptr,  # [batch]
    drawn_ptr,  # [1], int64
    slot_ptr,  # [1], int64
    stop_ptr,  # [stops], int64
    parts,
    stops,
    last_draw,
    COUNTS: tl.constexpr,  # slot_ptr too
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK_P)
    best = tl.load(best_ptr + row * parts + offs, mask=offs < parts, other=float("-inf"))
    _, part = tl.max(best, axis=0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(place_ptr + row * parts + part).to(tl.int64)
    tl.store(token_ptr + row, token)
    offs = tl.arange(0, BLOCK_S)
    stop = tl.load(stop_ptr + offs, mask=offs < stops, other=-1)
    if tl.max((stop == token).to(tl.int32), axis=0) > 0:
        tl.store(alive_ptr + row, False)
    if row == 0:
        tl.store(drawn_ptr, tl.minimum(tl.load(drawn_ptr) + 1, last_draw))
        if COUNTS:
            tl.store(slot_ptr, tl.load(slot_ptr) + 1)


def next_token(
    logits: torch.Tensor,
    token: torch.Tensor,
    alive: torch.Tensor,
    drawn: torch.Tensor,
    stop_ids: torch.Tensor,
    last_draw: int,
    slot: torch.Tensor | None,
) -> None:
    """Launch; arguments as in `api.next_token`, `logits` contiguous."""
    batch, size = logits.shape
    parts, stops = triton.cdiv(size, BLOCK), stop_ids.numel()
    best = torch.empty(batch, parts, dtype=torch.float32, device=logits.device)
    place = torch.empty(batch, parts, dtype=torch.int32, device=logits.device)
    options = pdl_options(logits.device)
    largest_kernel[(batch, parts)](logits, best, place, size, BLOCK=BLOCK, num_warps=4, **options)
    next_token_kernel[(batch,)](
        best,
        place,
        token,
        alive,
        drawn,
        drawn if slot is None else slot,
        stop_ids if stops else token,
        parts,
        stops,
        last_draw,
        COUNTS=slot is not None,
        BLOCK_P=triton.next_power_of_2(parts),
        BLOCK_S=triton.next_power_of_2(max(1, stops)),
        num_warps=1,
        **options,
    )
