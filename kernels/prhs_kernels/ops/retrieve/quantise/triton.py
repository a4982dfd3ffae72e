"""Writing key copies on the GPU; rounding is the same as PyTorch's, bit by bit.

Divisions are IEEE and rounding is done by adding and subtracting a large number, ties to even: the same on
every architecture and in the interpreter, whose own conversion to e4m3 is not exact.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prhs_kernels.ops.retrieve.codes.triton import round_even
from prhs_kernels.ops.retrieve.key_copy import SMALLEST, KeyCopy, KeyCopyKind

TINY = tl.constexpr(SMALLEST)


@triton.jit
def to_e4m3(x):
    """Bits of the nearest e4m3 number, ties to even, for |x| <= 448; uint8."""
    size = tl.abs(x)
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    # 1.5 * 2**(exponent + 20): its last bit is worth 2**(exponent - 3), the last bit of an e4m3 number
    magic = (((exponent + 147) << 23) | 0x400000).to(tl.float32, bitcast=True)
    size = (size + magic) - magic
    normal = (size.to(tl.int32, bitcast=True) >> 20) - 960  # 8 * (127 - 7): the bias changes
    code = tl.where(size < 0.015625, (size * 512.0).to(tl.int32), normal)
    return (code | tl.where(x.to(tl.int32, bitcast=True) < 0, 128, 0)).to(tl.uint8)  # -0.0 has its sign too


@triton.jit
def codes_of(keys, scale, LARGEST: tl.constexpr):
    """`keys / scale`, not yet rounded; zeros where the scale is 0."""
    used = scale > 0.0
    ratio = tl.div_rn(keys, tl.broadcast_to(tl.where(used, scale, 1.0)[:, None], keys.shape))
    return tl.minimum(tl.maximum(tl.where(used[:, None], ratio, 0.0), -LARGEST), LARGEST)


@triton.jit
def code_of(keys, scale, KIND: tl.constexpr, LARGEST: tl.constexpr):
    """Codes of keys, each row with its scale; int4 in a whole byte."""
    ratio = codes_of(keys, scale, LARGEST)
    if KIND == "fp8":
        return to_e4m3(ratio)
    else:
        return round_even(ratio).to(tl.int32).to(tl.uint8)


@triton.jit
def store_codes(
    data_ptr, row_scale_ptr, place, low, high, inside, valid,
    HALF: tl.constexpr, KIND: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Quantise keys and write them to the places `[BLOCK_N]` of a copy.

    low, high: halves of the keys `[BLOCK_N, BLOCK_H]` fp32, 0 outside of `inside`. valid: keys to write.
    """
    amax = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
    scale = tl.where(amax >= TINY, tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32)), 0.0)
    low, high = code_of(low, scale, KIND, LARGEST), code_of(high, scale, KIND, LARGEST)
    offs = tl.arange(0, low.shape[1])
    if KIND == "int4":
        ptrs = data_ptr + place[:, None] * HALF + offs[None, :]
        tl.store(ptrs, (low & 15) | ((high & 15) << 4), mask=inside)
    else:
        ptrs = data_ptr + place[:, None] * (2 * HALF) + offs[None, :]
        tl.store(ptrs, low, mask=inside)
        tl.store(ptrs + HALF, high, mask=inside)
    tl.store(row_scale_ptr + place, scale, mask=valid)


@triton.jit
def quantise_kernel(
    k_ptr,  # [batch, num_kv_heads, steps, HEAD_DIM]
    slots_ptr,  # [batch]
    data_ptr,  # [batch, num_kv_heads, n, bytes of a key], uint8
    row_scale_ptr,  # [batch, num_kv_heads, n], fp32
    num_kv_heads,
    steps,
    n,
    stride_kb,
    stride_kh,
    stride_kn,
    HALF: tl.constexpr,  # of HEAD_DIM
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    LARGEST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // num_kv_heads, row % num_kv_heads
    step = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slots_ptr + batch).to(tl.int64) + step
    valid = (step < steps) & (slot >= 0) & (slot < n)
    offs = tl.arange(0, BLOCK_H)
    inside = valid[:, None] & (offs[None, :] < HALF)
    ptrs = k_ptr + batch * stride_kb + head * stride_kh + step.to(tl.int64)[:, None] * stride_kn
    low = tl.load(ptrs + offs[None, :], mask=inside, other=0.0).to(tl.float32)
    high = tl.load(ptrs + HALF + offs[None, :], mask=inside, other=0.0).to(tl.float32)
    store_codes(data_ptr, row_scale_ptr, row * n + slot, low, high, inside, valid, HALF, KIND, LARGEST)


def write_key_copy(keys: torch.Tensor, slots: torch.Tensor, copy: KeyCopy) -> None:
    """Arguments as in `KeyCopy.write`, already checked."""
    batch, num_kv_heads, n = copy.scale.shape
    steps, half = keys.shape[2], keys.shape[3] // 2
    block_n = min(16, triton.next_power_of_2(max(steps, 1)))
    quantise_kernel[(batch * num_kv_heads, triton.cdiv(steps, block_n))](
        keys,
        slots,
        copy.data.view(torch.uint8),
        copy.scale,
        num_kv_heads,
        steps,
        n,
        *keys.stride()[:3],
        HALF=half,
        BLOCK_H=triton.next_power_of_2(half),
        BLOCK_N=block_n,
        KIND=KeyCopyKind(copy.kind).value,
        LARGEST=copy.kind.largest,
        num_warps=4 if block_n > 1 else 1,
    )
