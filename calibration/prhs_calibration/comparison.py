"""Dense against sparse attention rows: the bounds of `bounds.py` beside the truth, and whether each held."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from prhs_calibration.bounds import (
    dropped_mass,
    fano_bound,
    fano_envelope,
    information_of_rows,
    marginal_bound,
    normalised,
    query_mean,
    row_entropy,
    total_variation,
    truncation_bound,
)

# Softmax rows of the same logits computed along two routes (all positions, or the kept ones only) differ by
# a few units in the last place of the logits. As a total variation, 128 of them cover logits up to 100.
ROUTE_ROUNDING = 128.0


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionComparison:
    """Dense against sparse attention of one context; float64 tensors `[...]`, one entry per head.

    `checks` has one bool `[...]` per theorem; a False is a bug in this project's code, never a property of
    a model.
    """

    delta: Tensor  # [..., nq], dropped mass; total variation when the sparse rows are not a truncation
    delta_mean: Tensor  # over the queries
    information_dense: Tensor  # nats
    information_sparse: Tensor  # nats
    fano: Tensor  # nats, bounds |information_dense - information_sparse|
    truncation: Tensor | None  # nats, bounds dense - sparse information; None when not a truncation
    marginal: Tensor  # nats, the looser route of the paper
    slack: float  # nats, rounding allowed in the checks
    checks: dict[str, Tensor]

    @property
    def information_loss(self) -> Tensor:
        """Dense minus sparse mutual information, nats; negative where sparse attention is more selective."""
        return self.information_dense - self.information_sparse

    @property
    def violations(self) -> list[str]:
        """Names of the theorems that do not hold for every head; empty unless our code is wrong."""
        return [name for name, holds in self.checks.items() if not bool(holds.all())]


@dataclasses.dataclass(frozen=True)
class _Slack:
    """How far rounding alone can push each check, from the machine epsilons of float64 and of the input."""

    information: float  # nats, of a difference of two informations and of its bound
    mass: float  # of TV against dropped mass
    kl: float  # nats
    truncation: float  # nats


def _slack(rounding: float, num_queries: int, num_positions: int) -> _Slack:
    eps = torch.finfo(torch.float64).eps
    # entropies: a few eps relative to log n each; bounds: eps times their slope log(M / eps) at tiny masses
    information = 32 * eps * (2 + math.log(num_positions) + math.log(num_queries) - math.log(eps))
    # theorem 3 itself: rows a total variation `rounding` away from the truncation move Î by at most this
    moved = float(fano_envelope(rounding, num_queries, num_positions))
    # and by the drift theorem such a rounding is a logit range of about 4 rounding
    return _Slack(information, rounding + 4 * eps, 4 * rounding + information, moved + information)


def compare_attention(
    dense: Tensor,
    sparse: Tensor,
    kept: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    rounding: float | None = None,
) -> AttentionComparison:
    """Return both informations, every bound and whether each theorem held, per head.

    `dense`, `sparse`: attention rows `[..., nq, n]`, zero outside what a query sees. `kept` bool of the
    same shape says that `sparse` is `dense` restricted to it; None when keys were replaced (freezing), then
    δ is the total variation and theorem 4 is left out. `weights [..., nq]`: law of the queries, uniform if
    None. `rounding`: total variation that two routes to the same row may differ by (default
    `ROUTE_ROUNDING` epsilons of the input's dtype). NaNs count as violations. About 20 ms per million
    entries on one CPU core.
    """
    lead, (nq, n) = dense.shape[:-2], dense.shape[-2:]
    if rounding is None:
        rounding = ROUTE_ROUNDING * torch.finfo(torch.promote_types(dense.dtype, sparse.dtype)).eps
    slack = _slack(rounding, nq, n)
    rows, sparse_rows = dense.reshape(-1, nq, n), sparse.expand(dense.shape).reshape(-1, nq, n)
    sets = None if kept is None else kept.expand(dense.shape).reshape(-1, nq, n)
    laws = None if weights is None else weights.expand(dense.shape[:-1]).reshape(-1, nq)
    heads = [
        _compare_head(
            rows[h],
            sparse_rows[h],
            None if sets is None else sets[h],
            None if laws is None else laws[h],
            slack,
            torch.finfo(dense.dtype),
        )
        for h in range(len(rows))
    ]

    def gather(name: str) -> Tensor:
        stacked = torch.stack([getattr(head, name) for head in heads])
        return stacked.reshape(lead + stacked.shape[1:])

    return AttentionComparison(
        **{name: gather(name) for name in _STACKED},
        truncation=None if kept is None else gather("truncation"),
        slack=slack.information,
        checks={k: torch.stack([h.checks[k] for h in heads]).reshape(lead) for k in heads[0].checks},
    )


_STACKED = ("delta", "delta_mean", "information_dense", "information_sparse", "fano", "marginal")


def _compare_head(
    dense: Tensor,
    sparse: Tensor,
    kept: Tensor | None,
    weights: Tensor | None,
    slack: _Slack,
    stored: torch.finfo,
) -> AttentionComparison:
    num_queries, num_positions = dense.shape
    dense, sparse = normalised(dense), normalised(sparse)
    sparse_entropy = row_entropy(sparse)
    tv = total_variation(dense, sparse)
    delta = tv if kept is None else dropped_mass(dense, kept)
    i_dense = information_of_rows(dense, row_entropy(dense), weights)
    i_sparse = information_of_rows(sparse, sparse_entropy, weights)
    tv_mean, loss = query_mean(tv, weights), i_dense - i_sparse
    fano = fano_bound(tv_mean, num_queries, num_positions)
    envelope = fano_envelope(tv_mean, num_queries, num_positions)
    marginal = marginal_bound(tv_mean, num_positions)
    upper_bounds = {"fano": fano, "fano envelope": envelope, "marginal": marginal}
    checks = {name: loss.abs() <= bound + slack.information for name, bound in upper_bounds.items()}
    truncation = None
    if kept is not None:
        truncation = truncation_bound(delta, num_positions, weights)
        checks["total variation"] = ((tv - delta).abs() <= slack.mass).all()
        checks["kl"] = _kl_holds(dense, sparse, kept, sparse_entropy, slack.kl, stored)
        checks["truncation"] = loss <= truncation + slack.truncation
    return AttentionComparison(
        delta,
        query_mean(delta, weights),
        i_dense,
        i_sparse,
        fano,
        truncation,
        marginal,
        slack.information,
        checks,
    )


def _kl_holds(
    dense: Tensor, sparse: Tensor, kept: Tensor, sparse_entropy: Tensor, slack: float, stored: torch.finfo
) -> Tensor:
    retained = dense.masked_fill(~kept, 0).sum(-1)
    cross = torch.xlogy(sparse, dense.clamp(min=torch.finfo(dense.dtype).tiny)).sum(-1)
    kl = -sparse_entropy - cross
    # rows whose kept entries underflow in the stored dtype say nothing about the theorem
    measurable = retained > stored.tiny / stored.eps**2
    return ((kl + torch.log(retained)).abs()[measurable] <= slack).all()
