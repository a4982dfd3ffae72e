"""Add one decode step of all layers to running sums."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.ops.backend import Backend, check_like, check_shape, use_triton
from prhs_kernels.ops.retrieve.state import RetrievalState
from prhs_kernels.ops.step_count import reference
from prhs_kernels.ops.step_plan.api import StepPlan

FIELDS = ("units", "kept", "fraction", "visible", "retrieved", "contested", "rows_read")


@dataclasses.dataclass(frozen=True, eq=False)
class ChosenSets:
    """Sets of the layers that choose any; the others keep what their spans hold.

    state: stacked, its leading axis is place and sequence. place: `[layers]` int32, a layer's place in it, -1
    for none. gate, block: `[places, num_kv_heads]` int32, see `RetrievalRule`. anchor: `[places * batch,
    num_kv_heads]` int32, `state.anchor_slot` as it was before the step.
    """

    state: RetrievalState
    place: torch.Tensor
    gate: torch.Tensor
    block: torch.Tensor
    anchor: torch.Tensor


def step_count(
    totals: torch.Tensor,
    plan: StepPlan,
    alive: torch.Tensor,
    sets: ChosenSets | None,
    group: int,
    *,
    scan_row: float = 1.0,
    backend: Backend = "auto",
) -> None:
    """Add a step to `totals`; sums as `runtime.stats.DecodeStats` defines them.

    Args:
        totals: `[layers, batch, 7]` float64, `FIELDS` in order.
        plan: of the step; alive: `[batch]` bool, sequences that count.
        sets: after the step; None if every layer keeps everything. group: query heads per KV head.
        scan_row: rows that one scanned position costs, `SelectorParams.scan_row`.

    Raises:
        UsageError: shapes, dtypes or devices that do not go together.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    layers, batch, heads = plan.budget.shape
    check_shape("totals", totals, (layers, batch, len(FIELDS)))
    check_like("totals", totals, totals, (torch.float64,))
    check_shape("alive", alive, (batch,))
    check_like("alive", alive, totals, (torch.bool,))
    if sets is not None:
        places = sets.gate.shape[0]
        check_shape("sets.place", sets.place, (layers,))
        check_shape("sets.state.count", sets.state.count, (places * batch, heads))
        for name in ("gate", "block", "anchor"):
            shape = (places * batch, heads) if name == "anchor" else (places, heads)
            check_shape(f"sets.{name}", getattr(sets, name), shape)
            check_like(f"sets.{name}", getattr(sets, name), totals, (torch.int32,))
    if not use_triton(backend, totals):
        reference.step_count(totals, plan, alive, sets, group, scan_row)
        return
    from prhs_kernels.ops.step_count import triton as kernel

    kernel.step_count(totals, plan, alive, sets, group, scan_row)
