"""Decide who retrieves, score the keys and choose index sets: one decode step of CIS."""

from __future__ import annotations

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.audit.state import LayerAudit
from prhs_kernels.ops.backend import (
    Backend,
    check_attention,
    check_kernel_limits,
    check_like,
    check_shape,
    use_triton,
)
from prhs_kernels.ops.retrieve.key_copy import MAX_FP32_FP8, KeyCopy, KeyCopyKind
from prhs_kernels.ops.retrieve.state import RetrievalRule, RetrievalScratch, RetrievalState
from prhs_kernels.ops.retrieve.step import retrieve_step


def retrieve(
    query: torch.Tensor,
    keys: torch.Tensor,
    *,
    spans: torch.Tensor,
    budget: torch.Tensor,
    rule: RetrievalRule,
    state: RetrievalState,
    scale: float,
    query_pre: torch.Tensor | None = None,
    scratch: RetrievalScratch | None = None,
    key_copy: KeyCopy | None = None,
    audit: LayerAudit | None = None,
    gated: bool = False,
    backend: Backend = "auto",
) -> None:
    """Bring every KV head's index set up to date for this step; `state` is written in place.

    A head shares its set (the newest slot is added) while the smallest cosine in its group with the query of
    its last retrieval stays above tau; otherwise it scores all candidates and takes the sinks, the local
    positions and the `budget` most important others, the best third with neighbours. A head whose budget
    covers every candidate takes them all. Nothing is read back by the host. CIS, arXiv 2602.08329.

    Args:
        query: `[batch, num_qo_heads, 1, head_dim]` after RoPE.
        keys: `[batch, num_kv_heads, n, head_dim]`, the current token's key included.
        spans: `[batch, 4]` int32 of `candidate_spans`: sinks and window. Attention over the set needs the
            same spans, since a window may have moved on since the set was chosen.
        budget: `[batch, num_kv_heads]` int32, middle positions a retrieval may keep.
        rule: parameters of the layer. state: its sets; scratch: memory for the kernels, allocated if None.
        query_pre: the query before RoPE; only needed where a gate compares that one.
        key_copy: low-bit keys to score with, at the same slots; `state.lse` is then approximate.
        audit: coins, drawn before, and their results. A head that shares, or one that scores with a copy, is
            scanned on exact keys if its coin says so; its set is not changed by that. See `ops.audit`.
        scale: factor on the dot products, positive.
        gated: `rope_append` has decided with the same arguments, so that this goes on from its work list;
            kernels only.

    Raises:
        UsageError: shapes, dtypes, devices, head_dim or group that the backend cannot take.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    query_pre = query if query_pre is None else query_pre
    _check(query, query_pre, keys, spans, budget, rule, state, scale)
    _check_options(keys, state, key_copy, audit)
    if not use_triton(backend, query):
        if gated:
            raise UsageError("gated = True continues what a kernel decided; the reference decides by itself")
        retrieve_step(query, query_pre, keys, spans, budget, rule, state, scale, key_copy, audit)
        return
    check_kernel_limits(query, keys)
    fp8 = key_copy is not None and key_copy.kind == KeyCopyKind.FP8
    if fp8 and query.dtype == torch.float32 and query.shape[-1] > MAX_FP32_FP8:
        raise UsageError(
            f"key_copy: fp8 with a float32 query takes head_dim up to {MAX_FP32_FP8}, got {query.shape[-1]}; "
            "use int8"
        )
    batch, num_kv_heads, n = keys.shape[:3]
    group = query.shape[1] // num_kv_heads
    if scratch is None:
        scratch = RetrievalScratch.allocate(batch, num_kv_heads, group, n, keys.device)
    elif scratch.scores.shape[:2] != (batch * num_kv_heads, group) or scratch.max_len < n:
        raise UsageError(
            f"scratch: made for {scratch.scores.shape[0]} rows of {scratch.max_len} slots, "
            f"needed for {batch * num_kv_heads} rows of {n}"
        )
    from prhs_kernels.ops.retrieve.launch import retrieve as launch

    launch(
        query, query_pre, keys, spans.contiguous(), budget.contiguous(), rule, state, scratch, scale,
        key_copy, audit, gated,
    )  # fmt: skip


def _check(
    query: torch.Tensor,
    query_pre: torch.Tensor,
    keys: torch.Tensor,
    spans: torch.Tensor,
    budget: torch.Tensor,
    rule: RetrievalRule,
    state: RetrievalState,
    scale: float,
) -> None:
    check_attention(query, keys, keys, scale)
    batch, num_kv_heads, _, head_dim = keys.shape
    for name, tensor in (("query", query), ("query_pre", query_pre)):
        check_shape(name, tensor, tuple(query.shape))
        check_like(name, tensor, query)
        if tensor.stride(-1) != 1:
            raise UsageError(f"{name}: expected stride 1 along head_dim, got {tensor.stride(-1)}")
    for name, tensor, shape, dtype in (
        ("spans", spans, (batch, 4), torch.int32),
        ("budget", budget, (batch, num_kv_heads), torch.int32),
        ("rule.gate", rule.gate, (num_kv_heads,), torch.int32),
        ("rule.tau_cos", rule.tau_cos, (num_kv_heads,), torch.float32),
        ("rule.block", rule.block, (num_kv_heads,), torch.int32),
        ("rule.dilation", rule.dilation, (num_kv_heads,), torch.int32),
        ("state.count", state.count, (batch, num_kv_heads), torch.int32),
    ):
        check_shape(name, tensor, shape)
        check_like(name, tensor, query, (dtype,))
    check_shape(
        "state.anchor_query",
        state.anchor_query,
        (batch, num_kv_heads, query.shape[1] // num_kv_heads, head_dim),
    )
    check_like("state.anchor_query", state.anchor_query, query)
    check_shape("state.indices", state.indices, (batch, num_kv_heads, None))


def _check_options(
    keys: torch.Tensor, state: RetrievalState, key_copy: KeyCopy | None, audit: LayerAudit | None
) -> None:
    batch, num_kv_heads, n, head_dim = keys.shape
    if key_copy is not None:
        check_shape("key_copy.scale", key_copy.scale, (batch, num_kv_heads, None))
        check_like("key_copy.scale", key_copy.scale, keys, (torch.float32,))
        if key_copy.head_dim != head_dim or key_copy.scale.shape[2] < n:
            raise UsageError(
                f"key_copy: made for {key_copy.scale.shape[2]} slots of head_dim {key_copy.head_dim}, "
                f"needed for {n} of {head_dim}"
            )
    if audit is not None:
        check_shape("audit.lse", audit.lse, tuple(state.lse.shape))
        check_like("audit.lse", audit.lse, keys, (torch.float32,))
        check_shape("audit.coin", audit.coin, tuple(state.count.shape))
        check_like("audit.coin", audit.coin, keys, (torch.int32,))
