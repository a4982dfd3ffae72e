"""Add up the dropped mass of a decode step."""

from __future__ import annotations

import torch

from prhs_kernels.ops.audit import reference
from prhs_kernels.ops.audit.state import LayerAudit
from prhs_kernels.ops.backend import Backend, check_like, check_shape, use_triton
from prhs_kernels.ops.retrieve.state import RetrievalState


def count_dropped(
    lse_kept: torch.Tensor,
    state: RetrievalState,
    audit: LayerAudit,
    *,
    exact: bool = True,
    alive: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Add one step of a layer to the totals of `audit`, after `retrieve` and `sparse_decode`.

    Dropped mass of a head is `1 - exp(lse_kept - lse)`, relative to the keys in use. The log-sum-exp over all
    candidates is the retrieval's or, for an audited unit, that of the audit's scan. Nothing is read back.

    Args:
        lse_kept: `[batch, num_qo_heads, 1]` fp32 of `sparse_decode`.
        state: after `retrieve` in the same step. audit: what `retrieve` was given.
        exact: whether retrievals scan exact keys; with a low-bit copy they are audited by the coin too.
        alive: `[batch]` bool, sequences that count; None for all.

    Raises:
        UsageError: shapes, dtypes or devices that do not go together.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    batch, num_kv_heads, group = audit.lse.shape
    check_shape("lse_kept", lse_kept, (batch, num_kv_heads * group, 1))
    check_like("lse_kept", lse_kept, audit.lse)
    check_shape("state.lse", state.lse, (batch, num_kv_heads, group))
    check_like("state.lse", state.lse, audit.lse)
    if alive is not None:
        check_shape("alive", alive, (batch,))
        check_like("alive", alive, lse_kept, (torch.bool,))
    if not use_triton(backend, lse_kept):
        reference.count_dropped(lse_kept, state.decision, state.lse, audit, exact, alive)
        return
    from prhs_kernels.ops.audit.triton import count_dropped as launch

    launch(lse_kept.contiguous(), state.decision, state.lse, audit, exact, alive)
