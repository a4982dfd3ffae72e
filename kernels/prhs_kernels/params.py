"""What a selector is allowed to do, per layer and KV head: plain data, no behaviour beyond the formulas.

Layers are counted from 0 to `num_layers - 1`, positions from the first real token of a sequence.
Source of the three axes: arXiv 2602.08329, sections on CIS (time), PSAW (depth) and ETF (layer).
"""

from __future__ import annotations

import dataclasses
import enum
import math

import torch

from prhs_kernels.errors import InputError
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind


class Gate(enum.IntEnum):
    """Which cosine decides whether a decode step may reuse its anchor's index set."""

    NEVER = 0  # retrieve at every step
    POST_ROPE = 1  # cosine of the queries as attention uses them
    PRE_ROPE = 2  # cosine of the queries before the rotary embedding


class FreezeMode(enum.IntEnum):
    """Where a layer takes the keys and values of frozen prompt tokens from."""

    SHARE = 0  # those of the last layer that computed them
    PROJECT = 1  # this layer's projections of the frozen hidden state


@dataclasses.dataclass(frozen=True, eq=False)
class TimeParams:
    """CIS, clustered indices sharing. Every tensor is `[num_layers, num_kv_heads]`.

    A retrieval by a query that dense attention lets see `n` positions keeps `k = floor(budget_ratio * n) +
    budget_tokens` middle ones (neither sinks nor local), all of them if there are fewer; `budget_ratio >= 1`
    is a dense head. `n` is kv_len, or the model's own sliding window once that is full.
    """

    budget_ratio: torch.Tensor  # float32, fraction of the visible positions
    budget_tokens: torch.Tensor  # int32, positions
    gate: torch.Tensor  # uint8, a `Gate`
    tau_cos: torch.Tensor  # float32, reuse needs cosine > tau_cos
    block: torch.Tensor  # int32, decode steps between two forced retrievals (s)
    # int32, neighbours r on either side of the best third that a retrieved set brings along
    dilation: torch.Tensor
    reanchor: bool = True  # a retrieval inside a block starts a new block


@dataclasses.dataclass(frozen=True)
class DepthParams:
    """PSAW, progressive sliding attention window: from `start_layer` on, old positions leave the window."""

    start_layer: int
    phi: float  # in (0, 1)
    alpha: float = 1.0  # only phi ** alpha is identified; calibration keeps alpha at 1

    def window_fraction(self, layer: int, num_layers: int) -> float:
        """Fraction of the oldest positions that layer `layer` no longer sees, in [0, 1)."""
        return _schedule(layer, num_layers, self.start_layer, self.phi, self.alpha)


@dataclasses.dataclass(frozen=True)
class LayerParams:
    """ETF, early token freezing: in prefill the prompt's first tokens skip layers from `start_layer` on."""

    start_layer: int
    psi: float  # in (0, 1)
    gamma: float = 1.0  # only psi ** gamma is identified; calibration keeps gamma at 1
    mode: FreezeMode = FreezeMode.SHARE

    def frozen_fraction(self, layer: int, num_layers: int) -> float:
        """Fraction of the prompt's first tokens that layer `layer` does not compute, in [0, 1)."""
        return _schedule(layer, num_layers, self.start_layer, self.psi, self.gamma)


def _schedule(layer: int, num_layers: int, start_layer: int, base: float, power: float) -> float:
    if layer < start_layer:
        return 0.0
    return 1.0 - base ** (power * (layer - start_layer) / (num_layers - start_layer))


@dataclasses.dataclass(frozen=True, eq=False)
class SelectorParams:
    """All that the selectors need for one model. An axis that is None is off; all None is dense attention."""

    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    num_sinks: int = 4  # always kept, positions 0 .. num_sinks - 1
    num_local: int = 32  # always kept, the most recent positions, the current one included
    time: TimeParams | None = None
    depth: DepthParams | None = None
    layer: LayerParams | None = None
    key_copy: KeyCopyKind = KeyCopyKind.EXACT  # what a retrieval reads to rank the middle positions

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_qo_heads % self.num_kv_heads:
            raise InputError(
                f"num_qo_heads = {self.num_qo_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if self.num_sinks < 0 or self.num_local < 1:
            raise InputError(
                f"num_sinks = {self.num_sinks} must be >= 0 and num_local = {self.num_local} >= 1"
            )
        if self.time is not None:
            _check_time(self.time, (self.num_layers, self.num_kv_heads))
        for name, axis in (("depth", self.depth), ("layer", self.layer)):
            if axis is not None:
                _check_axis(name, axis, self.num_layers)

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def scan_row(self) -> float:
        """Bytes a scan reads per position, as a fraction of a key in a cache of 16-bit elements.

        The convention of every figure on KV bytes, whatever dtype the cache of a run has.
        """
        return self.key_copy.scan_bytes(self.head_dim, 2) / (2 * self.head_dim)

    @property
    def is_dense(self) -> bool:
        return self.time is None and self.depth is None and self.layer is None

    def window_start(self, layer: int, position: torch.Tensor) -> torch.Tensor:
        """First non-sink position that a query at `position` sees in `layer`: `P_l(t)`, int64, same shape."""
        if self.depth is None:
            return torch.zeros_like(position)
        # float64 so that floor() agrees between devices for every position below 2 ** 53
        fraction = self.depth.window_fraction(layer, self.num_layers)
        return (position.double() * fraction).floor().long()

    def frozen_prefix(self, layer: int, prompt_length: int) -> int:
        """Number of leading prompt tokens that `layer` does not compute: `E_l(T)`."""
        if self.layer is None:
            return 0
        return math.floor(self.layer.frozen_fraction(layer, self.num_layers) * prompt_length)


def _check_time(time: TimeParams, shape: tuple[int, int]) -> None:
    fields = ("budget_ratio", "budget_tokens", "gate", "tau_cos", "block", "dilation")
    for name in fields:
        value = getattr(time, name)
        if tuple(value.shape) != shape:
            raise InputError(f"time/{name} has shape {tuple(value.shape)}, this model needs {shape}")
    checks = {
        "budget_ratio": bool((time.budget_ratio >= 0).all() and time.budget_ratio.isfinite().all()),
        "budget_tokens": bool((time.budget_tokens >= 0).all()),
        "gate": bool((time.gate <= max(Gate)).all()),
        "tau_cos": bool((time.tau_cos.abs() <= 1).all()),
        "block": bool((time.block >= 1).all()),
        "dilation": bool((time.dilation >= 0).all()),
    }
    for name, valid in checks.items():
        if not valid:
            raise InputError(f"time/{name} is out of range; the bundle is damaged or was not written by prhs")


def _check_axis(name: str, axis: DepthParams | LayerParams, num_layers: int) -> None:
    base, power = (axis.phi, axis.alpha) if isinstance(axis, DepthParams) else (axis.psi, axis.gamma)
    if not (0 < base < 1 and power >= 0 and 0 <= axis.start_layer < num_layers):
        raise InputError(
            f"{name} schedule out of range: base {base} must be in (0, 1), power {power} >= 0, "
            f"start_layer {axis.start_layer} in [0, {num_layers})"
        )
