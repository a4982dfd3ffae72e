"""Draw the coins of a decode step, and add up what it dropped."""

from __future__ import annotations

import torch

from prhs_kernels.ops.audit import reference
from prhs_kernels.ops.audit.state import LayerAudit, ScanScratch, StepAudit
from prhs_kernels.ops.backend import (
    Backend,
    check_attention,
    check_kernel_limits,
    check_like,
    check_shape,
    use_triton,
)


def draw_coins(audit: StepAudit, *, backend: Backend = "auto") -> None:
    """Toss a coin for every unit of the step at hand; `audit.coin` is written. Before its `retrieve`.

    Raises:
        ResourceError: `backend="triton"` where triton cannot run.
    """
    if not use_triton(backend, audit.coin):
        reference.draw_coins(audit)
        return
    from prhs_kernels.ops.audit.triton import draw_coins as launch

    launch(audit)


def scan_units(
    query: torch.Tensor,
    keys: torch.Tensor,
    audit: LayerAudit,
    *,
    spans: torch.Tensor,
    visible: torch.Tensor,
    decision: torch.Tensor,
    scale: float,
    count: torch.Tensor | None = None,
    scratch: ScanScratch | None = None,
    backend: Backend = "auto",
) -> None:
    """Score everything that dense attention sees, for the units that the coin picked; `audit.lse` is written.

    For layers whose window hides positions from a retrieval. Of the others nothing is read.

    Args:
        query: `[batch, num_qo_heads, 1, head_dim]`; keys: `[batch, num_kv_heads, n, head_dim]`.
        spans: `[batch, 4]` int32, what the step may see; its end is also where dense attention ends.
        visible: `[batch]` int32, positions that dense attention sees.
        decision: `[batch, num_kv_heads]` int32, written: a `Decision`, `KEEP_ALL` for a unit that keeps all
            of these, which drops nothing, else `SHARE`.
        scale: factor on the dot products, positive. scratch: memory for the kernel, allocated if None.
        count: `[batch, num_kv_heads]` int32, sizes of the sets; None where heads keep all of their spans.

    Raises:
        UsageError: shapes, dtypes, devices, head_dim or group that the backend cannot take.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    check_attention(query, keys, keys, scale)
    batch, num_kv_heads = keys.shape[:2]
    group = query.shape[1] // num_kv_heads
    check_shape("audit.lse", audit.lse, (batch, num_kv_heads, group))
    tables = {"spans": spans, "visible": visible, "decision": decision, "audit.coin": audit.coin}
    for name, table in (tables if count is None else {**tables, "count": count}).items():
        heads = (batch, num_kv_heads)
        check_shape(name, table, {"spans": (batch, 4), "visible": (batch,)}.get(name, heads))
        check_like(name, table, query, (torch.int32,))
    if not use_triton(backend, query):
        reference.scan_units(query, keys, audit, spans, visible, decision, scale, count)
        return
    check_kernel_limits(query, keys)
    from prhs_kernels.ops.audit.triton import scan_units as launch

    scratch = scratch or ScanScratch.allocate(batch, num_kv_heads, group, query.device)
    launch(query, keys, audit, spans.contiguous(), visible.contiguous(), decision, scale, count, scratch)


def count_dropped(
    lse_kept: torch.Tensor,
    audit: StepAudit,
    *,
    decision: torch.Tensor,
    lse: torch.Tensor | None = None,
    alive: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Add a step to the totals of `audit`, after `retrieve` and `sparse_decode` of all its layers.

    Dropped mass of a head is `1 - exp(lse_kept - lse)`, relative to the keys in use. The log-sum-exp over all
    candidates is the retrieval's or, for an audited unit, that of the audit's scan. Nothing is read back.

    Args:
        lse_kept: `[layers, batch, num_qo_heads, 1]` fp32 of `sparse_decode`.
        audit: whose coins these retrievals were given.
        decision: `[layers, batch, num_kv_heads]` int32, a `Decision` each, of `retrieve` or `scan_units`.
        lse: `[layers, batch, num_kv_heads, group]` fp32 of retrievals on exact keys that saw all that dense
            attention sees, whose mass is exact; None where such units are audited by the coin too.
        alive: `[batch]` bool, sequences that count; None for all.

    Raises:
        UsageError: shapes, dtypes or devices that do not go together.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    layers, batch, num_kv_heads, group = audit.lse.shape
    check_shape("lse_kept", lse_kept, (layers, batch, num_kv_heads * group, 1))
    check_like("lse_kept", lse_kept, audit.lse)
    check_shape("decision", decision, (layers, batch, num_kv_heads))
    check_like("decision", decision, audit.lse, (torch.int32,))
    if lse is not None:
        check_shape("lse", lse, tuple(audit.lse.shape))
        check_like("lse", lse, audit.lse)
    if alive is not None:
        check_shape("alive", alive, (batch,))
        check_like("alive", alive, lse_kept, (torch.bool,))
    if not use_triton(backend, lse_kept):
        reference.count_dropped(lse_kept, audit, decision, lse, alive)
        return
    from prhs_kernels.ops.audit.triton import count_dropped as launch

    lse = None if lse is None else lse.contiguous()
    launch(lse_kept.contiguous(), audit, decision.contiguous(), lse, alive)
