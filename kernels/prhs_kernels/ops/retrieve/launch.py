"""The three launches of a retrieval: grids fixed by shapes, what a program does decided on the device."""

from __future__ import annotations

from typing import Any

import torch

from prhs_kernels.ops.audit.state import LayerAudit
from prhs_kernels.ops.decode_config import max_registers, next_power_of_2, precision
from prhs_kernels.ops.retrieve.config import (
    ChooseConfig,
    ScanConfig,
    choose_config,
    scan_config,
    scan_registers,
)
from prhs_kernels.ops.retrieve.key_copy import KeyCopy
from prhs_kernels.ops.retrieve.state import (
    GateInputs,
    RetrievalRule,
    RetrievalScratch,
    RetrievalState,
    chunk_size,
    num_bins,
)


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
    key_copy: KeyCopy | None = None,
    audit: LayerAudit | None = None,
    gated: bool = False,
) -> None:
    """Arguments as in `api.retrieve`, already checked."""
    if not gated:
        gate(query, query_pre, spans, budget, rule, state, scratch, audit, key_copy is not None)
    # a row may be on the list twice, to retrieve from a copy and to be audited; on exact keys only once
    twice = audit is not None and key_copy is not None
    scan(query, keys, spans, scratch, scale, key_copy, audited=twice)
    choose(spans, budget, rule, state, scratch, audit, twice=twice)


def gate(
    query: torch.Tensor, query_pre: torch.Tensor, spans: torch.Tensor, budget: torch.Tensor,
    rule: RetrievalRule, state: RetrievalState, scratch: RetrievalScratch, audit: LayerAudit | None = None,
    copied: bool = False,
) -> None:  # fmt: skip
    """Share, put on the work list, or keep everything, and the audits' coins: one program per row."""
    from prhs_kernels.ops.overlap.triton import pdl_options
    from prhs_kernels.ops.retrieve.gate.triton import gate_kernel

    inputs = GateInputs(spans, budget, rule, state, scratch, audit=audit)
    num_kv_heads, group, head_dim = state.anchor_query.shape[1:]
    gate_kernel[(state.count.numel(),)](
        query,
        query_pre,
        *gate_tensors(inputs),
        num_kv_heads,
        *gate_numbers(inputs),
        query.stride(0),
        query.stride(1),
        query_pre.stride(0),
        query_pre.stride(1),
        **gate_constants(audit is not None, copied),
        HEAD_DIM=head_dim,
        GROUP=group,
        BLOCK_G=next_power_of_2(group),
        BLOCK_H=next_power_of_2(head_dim // 2),
        num_warps=4,
        maxnreg=max_registers(4),
        **pdl_options(query.device),
    )


def gate_tensors(inputs: GateInputs) -> tuple[torch.Tensor, ...]:
    """Arguments of a kernel that decides, in order; those of an audit are any memory without one."""
    rule, state, audit, work = inputs.rule, inputs.state, inputs.audit, inputs.scratch.work
    return (
        inputs.spans, inputs.budget, rule.gate, rule.tau_cos, rule.block, state.anchor_query,
        state.anchor_slot, state.indices, state.count, state.decision, work,
        audit.coin if audit else work,
    )  # fmt: skip


def gate_numbers(inputs: GateInputs) -> tuple[int, ...]:
    """Capacity and local positions."""
    return inputs.state.indices.shape[-1], inputs.rule.num_local


def gate_constants(audited: bool, copied: bool) -> dict[str, Any]:
    """Compile-time arguments of a kernel that decides."""
    return {"AUDIT": audited, "COPY": copied, "BLOCK": 1024}


def scan_constants(
    copy: str, head_dim: int, dtype: torch.dtype, rows: int, group: int, max_len: int, audited: bool,
    config: ScanConfig,
) -> dict[str, Any]:  # fmt: skip
    """Compile-time arguments of the scan."""
    chunk, width = chunk_size(max_len), head_dim // 2 if copy == "int4" else head_dim
    return {
        "HEAD_DIM": head_dim,
        "GROUP": group,
        "BLOCK_G": next_power_of_2(group),
        "BLOCK_D": next_power_of_2(head_dim),
        "BLOCK_N": config.block_n,
        "BLOCK_E": next_power_of_2(rows * (2 if audited else 1)),
        "CHUNK": chunk,
        "CHUNKS": -(-max_len // chunk),
        "COPY": copy,
        "WIDTH": width,
        "BLOCK_W": max(32, next_power_of_2(width)),  # the shortest product of 8-bit integers
        "PRECISION": precision(dtype),
        "LANES": min(4, config.block_n // 16),  # rows of warps in a tile
        "AUDIT": audited,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def scan(
    query: torch.Tensor, keys: torch.Tensor, spans: torch.Tensor, scratch: RetrievalScratch, scale: float,
    key_copy: KeyCopy | None = None, config: ScanConfig | None = None, audited: bool = False,
) -> None:  # fmt: skip
    """Scores of all candidates of the rows on the work list, and each chunk's running softmax."""
    from prhs_kernels.ops.overlap.triton import pdl_options
    from prhs_kernels.ops.retrieve.triton import scan_kernel

    num_kv_heads, head_dim = keys.shape[1], keys.shape[3]
    rows, group, max_len = scratch.scores.shape
    copy = "exact" if key_copy is None else key_copy.kind.value
    config = config or scan_config(head_dim, keys.dtype, keys.device, copy, group)
    scan_kernel[(config.slots + rows * (2 if audited else 1),)](
        query,
        keys,
        scratch.scores if key_copy is None else key_copy.data.view(torch.uint8),
        scratch.scores if key_copy is None else key_copy.scale,
        spans,
        scratch.work,
        scratch.scores,
        scratch.chunk_max,
        scratch.chunk_sum,
        scale,
        num_kv_heads,
        rows,
        0 if key_copy is None else key_copy.scale.shape[2],
        max_len,
        config.slots,
        query.stride(0),
        query.stride(1),
        *keys.stride()[:3],
        **scan_constants(copy, head_dim, keys.dtype, rows, group, max_len, audited, config),
        maxnreg=scan_registers(copy, keys.dtype),
        **pdl_options(keys.device),
    )


def choose_constants(group: int, max_len: int, config: ChooseConfig) -> dict[str, Any]:
    """Compile-time arguments of the choice."""
    chunk, threads = chunk_size(max_len), 32 * config.num_warps
    chunks = -(-max_len // chunk)
    return {
        "GROUP": group,
        "BLOCK_G": next_power_of_2(group),
        "BLOCK_N": config.block_n,
        "CHUNK": chunk,
        "CHUNKS": chunks,
        "BLOCK_C": next_power_of_2(chunks),
        "SAMPLE": config.sample,
        "LIST": config.list_len,
        "WORDS": threads,  # one for each thread, whose 32 keys are then loaded at once
        "EMIT": (4 if max_len > 32768 else 2) * threads,  # words of a mask at once
        "BINS": num_bins(max_len),
        "LISTED": config.listed,
        "num_warps": config.num_warps,
    }


def choose(
    spans: torch.Tensor, budget: torch.Tensor, rule: RetrievalRule, state: RetrievalState,
    scratch: RetrievalScratch, audit: LayerAudit | None = None, config: ChooseConfig | None = None,
    twice: bool = False,
) -> None:  # fmt: skip
    """Log-sum-exp of every entry of the work list; importances and the new set of rows that retrieve."""
    from prhs_kernels.ops.overlap.triton import pdl_options
    from prhs_kernels.ops.retrieve.choose.triton import choose_kernel

    rows, group, max_len = scratch.scores.shape
    config = config or choose_config(max_len, group, state.indices.shape[-1], spans.device)
    entries = rows * (2 if twice else 1)
    choose_kernel[(max(config.programs, entries),)](
        spans,
        scratch.work,
        scratch.scores,
        scratch.scores.view(torch.int32),
        scratch.chunk_max,
        scratch.chunk_sum,
        scratch.weights,
        scratch.tally,
        scratch.lists,
        state.guess,
        scratch.words,
        budget,
        rule.dilation,
        state.indices,
        state.count,
        state.lse,
        audit.lse if audit else state.lse,
        config.programs,
        state.count.shape[1],
        rows,
        max_len,
        scratch.weights.shape[1],
        scratch.words.shape[2],
        scratch.lists.shape[2],
        state.indices.shape[-1],
        rule.num_local,
        **choose_constants(group, max_len, config),
        maxnreg=128,
        **pdl_options(spans.device),
    )
