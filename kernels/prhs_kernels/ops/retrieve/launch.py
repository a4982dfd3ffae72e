"""The four launches of a retrieval: grids fixed by shapes, what a program does decided on the device."""

from __future__ import annotations

import torch

from prhs_kernels.ops.decode_config import max_registers, next_power_of_2, precision
from prhs_kernels.ops.retrieve.config import (
    ScanConfig,
    SelectConfig,
    scan_config,
    select_config,
    weigh_blocks,
)
from prhs_kernels.ops.retrieve.state import RetrievalRule, RetrievalScratch, RetrievalState


def retrieve(
    query: torch.Tensor,
    query_pre: torch.Tensor,
    keys: torch.Tensor,
    spans: torch.Tensor,
    budget: torch.Tensor,
    rule: RetrievalRule,
    state: RetrievalState,
    scratch: RetrievalScratch,
    scale: float,
) -> None:
    """Arguments as in `api.retrieve`, already checked."""
    gate(query, query_pre, keys.shape[1], spans, budget, rule, state, scratch)
    scan(query, keys, spans, scratch, scale)
    weigh(keys.shape[1], spans, rule.num_local, state, scratch, keys.device)
    select(keys.shape[1], spans, budget, rule, state, scratch)


def gate(
    query: torch.Tensor, query_pre: torch.Tensor, num_kv_heads: int, spans: torch.Tensor,
    budget: torch.Tensor, rule: RetrievalRule, state: RetrievalState, scratch: RetrievalScratch,
) -> None:  # fmt: skip
    """Share, put on the work list, or keep everything: one program per row."""
    from prhs_kernels.ops.retrieve.triton import gate_kernel

    group, head_dim = state.anchor_query.shape[2:]
    gate_kernel[(state.count.numel(),)](
        query,
        query_pre,
        spans,
        budget,
        rule.gate,
        rule.tau_cos,
        rule.block,
        state.anchor_query,
        state.anchor_slot,
        state.indices,
        state.count,
        state.decision,
        scratch.work,
        num_kv_heads,
        state.indices.shape[-1],
        rule.num_local,
        query.stride(0),
        query.stride(1),
        query_pre.stride(0),
        query_pre.stride(1),
        HEAD_DIM=head_dim,
        GROUP=group,
        BLOCK_G=next_power_of_2(group),
        BLOCK_D=next_power_of_2(head_dim),
        BLOCK=1024,
        num_warps=4,
        maxnreg=max_registers(4),
    )


def scan(
    query: torch.Tensor, keys: torch.Tensor, spans: torch.Tensor, scratch: RetrievalScratch, scale: float,
    config: ScanConfig | None = None,
) -> None:  # fmt: skip
    """Scores of all candidates of the rows on the work list, and each chunk's running softmax."""
    from prhs_kernels.ops.retrieve.triton import scan_kernel

    num_kv_heads, head_dim = keys.shape[1], keys.shape[3]
    rows, group, max_len = scratch.scores.shape
    config = config or scan_config(head_dim, keys.dtype, rows, max_len, keys.device)
    scan_kernel[(config.programs,)](
        query,
        keys,
        spans,
        scratch.work,
        scratch.scores,
        scratch.chunk_max,
        scratch.chunk_sum,
        scale,
        num_kv_heads,
        max_len,
        scratch.chunk_max.shape[-1],
        query.stride(0),
        query.stride(1),
        *keys.stride()[:3],
        HEAD_DIM=head_dim,
        GROUP=group,
        BLOCK_G=max(16, next_power_of_2(group)),
        BLOCK_D=next_power_of_2(head_dim),
        BLOCK_N=config.block_n,
        CHUNK=config.chunk,
        PRECISION=precision(keys.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def weigh(
    num_kv_heads: int, spans: torch.Tensor, num_local: int, state: RetrievalState, scratch: RetrievalScratch,
    device: torch.device,
) -> None:  # fmt: skip
    """Importance of every middle position, with the normaliser over all candidates."""
    from prhs_kernels.ops.retrieve.triton import weigh_kernel

    rows, group, max_len = scratch.scores.shape
    config = scan_config(64, torch.float16, rows, max_len, device)
    weigh_kernel[(config.programs,)](
        spans,
        scratch.work,
        scratch.scores,
        scratch.chunk_max,
        scratch.chunk_sum,
        scratch.weights,
        state.lse,
        num_kv_heads,
        max_len,
        scratch.chunk_max.shape[-1],
        num_local,
        **weigh_blocks(group, max_len),
        GROUP=group,
        CHUNK=config.chunk,
        num_warps=4,
        maxnreg=max_registers(4),
    )


def select(
    num_kv_heads: int, spans: torch.Tensor, budget: torch.Tensor, rule: RetrievalRule,
    state: RetrievalState, scratch: RetrievalScratch, config: SelectConfig | None = None,
) -> None:  # fmt: skip
    """Top-k by importance, dilated and written as ascending slots: one program per row of the list."""
    from prhs_kernels.ops.retrieve.select.triton import select_kernel

    config = config or select_config(scratch.max_len)
    select_kernel[(state.count.numel(),)](
        spans,
        scratch.work,
        scratch.weights,
        scratch.words,
        budget,
        rule.dilation,
        state.indices,
        state.count,
        num_kv_heads,
        scratch.max_len,
        scratch.words.shape[-1],
        state.indices.shape[-1],
        rule.num_local,
        BLOCK=config.block,
        SMALL=config.small,
        PACK=config.pack,
        RESIDENT=config.resident,
        num_warps=config.num_warps,
        maxnreg=max_registers(config.num_warps),
    )
