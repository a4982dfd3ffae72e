"""A bundle's operating point as two numbers: for benchmarks, whose random weights gate like no model."""

from __future__ import annotations

import dataclasses

from prhs_calibration.bundle import Bundle
from prhs_kernels.errors import InputError


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """Means over layers and KV heads. kept: fraction of the visible positions that a set holds;
    retrieval_ratio: fraction of the rows that choose a new set in a step; key_copy: what those scan."""

    kept: float
    retrieval_ratio: float
    key_copy: str


def operating_point(bundle: Bundle, context: int) -> OperatingPoint:
    """What calibration predicted for the bundle's operating point, at this many positions.

    The retrieval ratio follows from the stored cost, which counts the kept fraction and, per retrieval, a
    scan of all keys or of their copy (`fit.read_cost`), open loop on the fit split. What dilation adds to
    the sets is in that cost too and counts as retrieval here, so the ratio is an upper estimate.

    Raises:
        InputError: the bundle's operating point is dense, or it does not hold the cost.
    """
    params = bundle.params()
    cost = bundle.tensors.get("profile/predicted_cost")
    if params.time is None or cost is None:
        raise InputError(
            f"bundle {bundle.path}: its operating point keeps every position; give --kept instead"
        )
    time = params.time
    nominal = (time.budget_ratio.double() + time.budget_tokens.double() / context).clamp(max=1)
    kept = (nominal + (params.num_sinks + params.num_local) / context).clamp(max=1)
    predicted = float(cost[bundle.metadata.dial_index])
    ratio = 2 * (predicted - float(kept.mean())) / params.scan_row
    return OperatingPoint(float(kept.mean()), min(1.0, max(0.0, ratio)), params.key_copy.value)
