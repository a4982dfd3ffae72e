"""One program per head: rotate a query or a key, or copy a value; keys and values go into the cache."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prhs_kernels.ops.overlap.triton import pdl_options, wait_for_previous


@triton.jit
def rope_append_kernel(
    qkv_ptr,  # [SPLITS, batch, num_qo_heads + 2 * num_kv_heads, HEAD_DIM]
    k_ptr,  # [batch, num_kv_heads, n, HEAD_DIM]
    v_ptr,
    cos_ptr,  # [max_positions, HEAD_DIM / 2]
    sin_ptr,
    positions_ptr,  # [batch]
    slots_ptr,  # [batch]
    q_norm_ptr,  # [HEAD_DIM]
    k_norm_ptr,
    out_ptr,  # [batch, num_qo_heads + num_kv_heads, HEAD_DIM]
    before_ptr,
    eps,
    num_qo_heads,
    num_kv_heads,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,  # power of 2 from HEAD_DIM / 2
    SPLITS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    STORE_BEFORE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    dtype = out_ptr.dtype.element_ty
    offs = tl.arange(0, BLOCK)
    mask = offs < HALF
    slot = tl.load(slots_ptr + batch).to(tl.int64)
    width = (num_qo_heads + 2 * num_kv_heads) * HEAD_DIM
    row_ptr = qkv_ptr + batch * width + head * HEAD_DIM + offs
    first = tl.load(row_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(row_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, SPLITS):
        row_ptr += tl.num_programs(0) * width
        first += tl.load(row_ptr, mask=mask, other=0.0)
        second += tl.load(row_ptr + HALF, mask=mask, other=0.0)
    # what a projection rounds to
    first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    if head >= num_qo_heads + num_kv_heads:
        to_ptr = v_ptr + batch * stride_vb + (head - num_qo_heads - num_kv_heads) * stride_vh
        to_ptr += slot * stride_vn + offs
    else:
        is_query = head < num_qo_heads
        if HAS_NORM:
            norm_ptr = (q_norm_ptr if is_query else k_norm_ptr) + offs
            squares = tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)
            scale = tl.rsqrt(squares / HEAD_DIM + eps)
            low = tl.load(norm_ptr, mask=mask, other=0.0).to(tl.float32)
            high = tl.load(norm_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
            # rounded twice, as the norm of transformers does
            first = ((first * scale).to(dtype).to(tl.float32) * low).to(dtype).to(tl.float32)
            second = ((second * scale).to(dtype).to(tl.float32) * high).to(dtype).to(tl.float32)
        if STORE_BEFORE:
            if is_query:
                before = before_ptr + (batch * num_qo_heads + head) * HEAD_DIM + offs
                tl.store(before, first, mask=mask)
                tl.store(before + HALF, second, mask=mask)
        position = tl.load(positions_ptr + batch).to(tl.int64)
        cos = tl.load(cos_ptr + position * HALF + offs, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + position * HALF + offs, mask=mask, other=0.0).to(tl.float32)
        turned = second * cos + first * sin
        first = first * cos - second * sin
        second = turned
        to_ptr = out_ptr + (batch * (num_qo_heads + num_kv_heads) + head) * HEAD_DIM + offs
        if not is_query:
            tl.store(to_ptr, first, mask=mask)
            tl.store(to_ptr + HALF, second, mask=mask)
            to_ptr = k_ptr + batch * stride_kb + (head - num_qo_heads) * stride_kh + slot * stride_kn + offs
    tl.store(to_ptr, first, mask=mask)
    tl.store(to_ptr + HALF, second, mask=mask)


def rope_append(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch; arguments and results as in `api.rope_append`."""
    batch, num_kv_heads, _, head_dim = keys.shape
    num_qo_heads = qkv.shape[-1] // head_dim - 2 * num_kv_heads
    shape = (batch, num_qo_heads + num_kv_heads, 1, head_dim)
    out = torch.empty(shape, dtype=keys.dtype, device=qkv.device)
    query, key = out[:, :num_qo_heads], out[:, num_qo_heads:]
    as_it_is = qkv.dim() == 2 and q_norm is None
    if as_it_is:
        before = qkv.view(batch, -1, head_dim)[:, :num_qo_heads].unsqueeze(2)
    else:
        before = torch.empty_like(query, memory_format=torch.contiguous_format)
    rope_append_kernel[(batch, num_qo_heads + 2 * num_kv_heads)](
        qkv,
        keys,
        values,
        cos.contiguous(),
        sin.contiguous(),
        positions.contiguous(),
        slots.contiguous(),
        q_norm if q_norm is not None else qkv,
        k_norm if k_norm is not None else qkv,
        out,
        before,
        eps,
        num_qo_heads,
        num_kv_heads,
        *keys.stride()[:3],
        *values.stride()[:3],
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        SPLITS=1 if qkv.dim() == 2 else qkv.shape[0],
        HAS_NORM=q_norm is not None,
        STORE_BEFORE=not as_it_is,
        num_warps=1,
        **pdl_options(qkv.device),
    )
    return query, before, key
