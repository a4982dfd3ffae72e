"""One program per KV head: rotate its group's queries and its key, fill the cache, and decide who retrieves.

The tile of a program has a line for every query of the group and one for the key, in the two halves that
turn into each other.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prhs_kernels.ops.decode_config import max_registers
from prhs_kernels.ops.overlap.triton import pdl_options
from prhs_kernels.ops.retrieve.gate.triton import decide, let_next_start, load_rule
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.ops.retrieve.launch import gate_constants, gate_numbers, gate_tensors
from prhs_kernels.ops.retrieve.quantise.triton import store_codes
from prhs_kernels.ops.retrieve.state import GateInputs


@triton.jit
def projected(ptrs, part, mask, dtype: tl.constexpr, SPLITS: tl.constexpr):
    """Partial sums added up, and rounded as a projection is."""
    total = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(ptrs + split * part, mask=mask, other=0.0)
    return total.to(dtype).to(tl.float32)


@triton.jit
def normed(low, high, norm_ptrs, mask, eps, dtype: tl.constexpr, HALF: tl.constexpr):
    """Each line over its root mean square, times the weight; rounded twice, as the norm of transformers."""
    scale = tl.rsqrt(tl.sum(low * low + high * high, axis=1) / (2 * HALF) + eps)[:, None]
    low_weight = tl.load(norm_ptrs, mask=mask, other=0.0).to(tl.float32)
    high_weight = tl.load(norm_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    low = ((low * scale).to(dtype).to(tl.float32) * low_weight).to(dtype)
    high = ((high * scale).to(dtype).to(tl.float32) * high_weight).to(dtype)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def store_halves(ptrs, low, high, mask, HALF: tl.constexpr):
    tl.store(ptrs, low, mask=mask)
    tl.store(ptrs + HALF, high, mask=mask)


@triton.jit
def rope_append_kernel(
    qkv_ptr,  # [SPLITS, batch, num_qo_heads + 2 * num_kv_heads, HEAD_DIM]
    k_ptr,  # [batch, num_kv_heads, n, HEAD_DIM]
    v_ptr,
    cos_ptr,  # [batch, HEAD_DIM / 2]
    sin_ptr,
    slots_ptr,  # [batch]
    q_norm_ptr,  # [HEAD_DIM]
    k_norm_ptr,
    out_ptr,  # [batch, num_qo_heads + num_kv_heads, HEAD_DIM]
    before_ptr,  # [batch, num_qo_heads, HEAD_DIM]
    spans_ptr,  # from here on as in `gate_kernel`
    budget_ptr,
    gate_ptr,
    tau_ptr,
    block_ptr,
    anchor_query_ptr,
    anchor_slot_ptr,
    idx_ptr,
    count_ptr,
    decision_ptr,
    work_ptr,
    coin_ptr,
    data_ptr,  # [batch, num_kv_heads, copy_len, bytes of a key], uint8
    row_scale_ptr,  # [batch, num_kv_heads, copy_len], fp32
    eps,
    num_kv_heads,
    capacity,
    num_local,
    copy_len,
    stride_cos,
    stride_sin,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,  # power of 2 from GROUP + 1
    BLOCK_H: tl.constexpr,  # power of 2 from HEAD_DIM / 2
    SPLITS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    STORE_BEFORE: tl.constexpr,
    GATE: tl.constexpr,
    AUDIT: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,  # of the key copy
    LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = batch * num_kv_heads + head
    HALF: tl.constexpr = HEAD_DIM // 2
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    line, offs = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H)
    inside = offs < HALF
    is_query, is_key = (line < GROUP)[:, None] & inside[None, :], (line == GROUP)[:, None] & inside[None, :]
    slot = tl.load(slots_ptr + batch).to(tl.int64)
    num_qo_heads = num_kv_heads * GROUP
    width = (num_qo_heads + 2 * num_kv_heads) * HEAD_DIM
    part = tl.num_programs(0) * width
    column = tl.where(line == GROUP, num_qo_heads + head, head * GROUP + line)
    # only the projection is of the kernel before; all else is asked for while that one ends
    cos = tl.load(cos_ptr + batch * stride_cos + offs, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + batch * stride_sin + offs, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATE:
        known = load_rule(
            row, num_kv_heads, spans_ptr, budget_ptr, gate_ptr, tau_ptr, block_ptr, anchor_query_ptr,
            anchor_slot_ptr, count_ptr, capacity, num_local, HEAD_DIM, GROUP, BLOCK_G, BLOCK_H,
        )  # fmt: skip
        coin = 0
        if AUDIT:
            coin = tl.load(coin_ptr + row)
    if PDL:
        gdc_wait()
    ptrs = qkv_ptr + batch * width + column[:, None] * HEAD_DIM + offs[None, :]
    low = projected(ptrs, part, is_query | is_key, dtype, SPLITS)
    high = projected(ptrs + HALF, part, is_query | is_key, dtype, SPLITS)
    value_ptrs = qkv_ptr + batch * width + (num_qo_heads + num_kv_heads + head) * HEAD_DIM + offs
    value_low = projected(value_ptrs, part, inside, dtype, SPLITS)
    value_high = projected(value_ptrs + HALF, part, inside, dtype, SPLITS)
    if PDL:
        if GATE:
            let_next_start(work_ptr, row)
        else:
            gdc_launch_dependents()
    if HAS_NORM:
        norm_ptrs = tl.where(is_key, k_norm_ptr + offs[None, :], q_norm_ptr + offs[None, :])
        low, high = normed(low, high, norm_ptrs, is_query | is_key, eps, dtype, HALF)
    turned_low, turned_high = (low * cos - high * sin).to(dtype), (high * cos + low * sin).to(dtype)
    if STORE_BEFORE:
        query = (batch * num_qo_heads + head * GROUP + line[:, None]) * HEAD_DIM + offs[None, :]
        store_halves(before_ptr + query, low, high, is_query, HALF)
    out = (batch * (num_qo_heads + num_kv_heads) + column[:, None]) * HEAD_DIM + offs[None, :]
    store_halves(out_ptr + out, turned_low, turned_high, is_query | is_key, HALF)
    key_ptrs = k_ptr + batch * stride_kb + head * stride_kh + slot * stride_kn + offs[None, :]
    store_halves(key_ptrs + line[:, None] * 0, turned_low, turned_high, is_key, HALF)
    value_ptrs = v_ptr + batch * stride_vb + head * stride_vh + slot * stride_vn + offs
    store_halves(value_ptrs, value_low, value_high, inside, HALF)
    if KIND != "exact":
        valid = (line == GROUP) & (slot < copy_len)
        store_codes(
            data_ptr, row_scale_ptr, row * copy_len + slot + line * 0, turned_low.to(tl.float32),
            turned_high.to(tl.float32), is_key & valid[:, None], valid, HALF, KIND, LARGEST,
        )  # fmt: skip
    if GATE:
        if known[6] == 2:  # before RoPE
            turned_low, turned_high = low.to(dtype), high.to(dtype)
        decide(
            turned_low, turned_high, known, coin, row, anchor_query_ptr, anchor_slot_ptr, idx_ptr, count_ptr,
            decision_ptr, work_ptr, capacity, AUDIT, COPY, HEAD_DIM, GROUP, BLOCK_G, BLOCK_H, BLOCK,
        )  # fmt: skip


def tile_shape(group: int, head_dim: int) -> dict[str, int]:
    """Lines and columns of a program's tile, and warps that hold it in few registers."""
    lines, columns = triton.next_power_of_2(group + 1), triton.next_power_of_2(head_dim // 2)
    return {"BLOCK_G": lines, "BLOCK_H": columns, "num_warps": max(1, min(16, lines * columns // 256))}


def rope_append(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    gate: GateInputs | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch; arguments and results as in `api.rope_append`."""
    batch, num_kv_heads, _, head_dim = keys.shape
    num_qo_heads = qkv.shape[-1] // head_dim - 2 * num_kv_heads
    out_shape = (batch, num_qo_heads + num_kv_heads, 1, head_dim)
    out = torch.empty(out_shape, dtype=keys.dtype, device=qkv.device)
    query, key = out[:, :num_qo_heads], out[:, num_qo_heads:]
    as_it_is = qkv.dim() == 2 and q_norm is None
    if as_it_is:
        before = qkv.view(batch, -1, head_dim)[:, :num_qo_heads].unsqueeze(2)
    else:
        before = torch.empty_like(query, memory_format=torch.contiguous_format)
    tensors, numbers, constants = _gate_arguments(gate, slots)
    group = num_qo_heads // num_kv_heads
    shape = tile_shape(group, head_dim)
    rope_append_kernel[(batch, num_kv_heads)](
        qkv,
        keys,
        values,
        cos if cos.stride(1) == 1 else cos.contiguous(),
        sin if sin.stride(1) == 1 else sin.contiguous(),
        slots.contiguous(),
        q_norm if q_norm is not None else qkv,
        k_norm if k_norm is not None else qkv,
        out,
        before,
        *tensors,
        eps,
        num_kv_heads,
        *numbers,
        cos.stride(0),
        sin.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        HEAD_DIM=head_dim,
        GROUP=group,
        **shape,
        SPLITS=1 if qkv.dim() == 2 else qkv.shape[0],
        HAS_NORM=q_norm is not None,
        STORE_BEFORE=not as_it_is,
        **constants,
        maxnreg=max_registers(shape["num_warps"]),
        **pdl_options(qkv.device),
    )
    return query, before, key


def _gate_arguments(
    gate: GateInputs | None, unused: torch.Tensor
) -> tuple[list[torch.Tensor], list[int], dict[str, Any]]:
    """Tensors, numbers and compile-time arguments of the decision and of the key copy."""
    if gate is None:
        constants = {"GATE": False, "KIND": "exact", "LARGEST": 1.0, **gate_constants(False, False)}
        return [unused] * 14, [0] * 3, constants
    copy, kind = gate.key_copy, KeyCopyKind.EXACT
    tensors, numbers = [*gate_tensors(gate), unused, unused], [*gate_numbers(gate), 0]
    if copy is not None:
        kind = copy.kind
        tensors[-2:] = copy.data.view(torch.uint8), copy.scale
        numbers[-1] = copy.scale.shape[2]
    constants = {"GATE": True, "KIND": kind.value, "LARGEST": 1.0 if copy is None else kind.largest}
    return tensors, numbers, {**constants, **gate_constants(gate.audit is not None, copy is not None)}
