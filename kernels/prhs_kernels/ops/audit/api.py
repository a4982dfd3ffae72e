"""Draw the coins of a decode step, and add up what it dropped."""

from __future__ import annotations

import torch

from prhs_kernels.ops.audit import reference
from prhs_kernels.ops.audit.state import StepAudit
from prhs_kernels.ops.backend import Backend, check_like, check_shape, use_triton
from prhs_kernels.ops.retrieve.state import RetrievalState


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


def count_dropped(
    lse_kept: torch.Tensor,
    state: RetrievalState,
    audit: StepAudit,
    *,
    exact: bool = True,
    alive: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Add a step to the totals of `audit`, after `retrieve` and `sparse_decode` of all its layers.

    Dropped mass of a head is `1 - exp(lse_kept - lse)`, relative to the keys in use. The log-sum-exp over all
    candidates is the retrieval's or, for an audited unit, that of the audit's scan. Nothing is read back.

    Args:
        lse_kept: `[layers, batch, num_qo_heads, 1]` fp32 of `sparse_decode`.
        state: after the layers' `retrieve`, stacked: its leading axis is layer and sequence.
        audit: whose coins these retrievals were given.
        exact: whether retrievals scan exact keys; with a low-bit copy they are audited by the coin too.
        alive: `[batch]` bool, sequences that count; None for all.

    Raises:
        UsageError: shapes, dtypes or devices that do not go together.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    layers, batch, num_kv_heads, group = audit.lse.shape
    check_shape("lse_kept", lse_kept, (layers, batch, num_kv_heads * group, 1))
    check_like("lse_kept", lse_kept, audit.lse)
    check_shape("state.lse", state.lse, (layers * batch, num_kv_heads, group))
    check_like("state.lse", state.lse, audit.lse)
    if alive is not None:
        check_shape("alive", alive, (batch,))
        check_like("alive", alive, lse_kept, (torch.bool,))
    if not use_triton(backend, lse_kept):
        reference.count_dropped(lse_kept, state.decision, state.lse, audit, exact, alive)
        return
    from prhs_kernels.ops.audit.triton import count_dropped as launch

    launch(lse_kept.contiguous(), state.decision, state.lse, audit, exact, alive)
