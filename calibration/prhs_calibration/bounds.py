"""What a dropped mass implies: one pure function per theorem; `comparison.py` checks them on attention rows.

Setting of every theorem: one head, one context. `Q` is the index of a query under any law over
`num_queries` queries, `J ~ A(Q)` and `Ĵ ~ Â(Q)` are the positions that dense and sparse attention pick
among `num_positions`. `delta` is a dropped mass (for a truncation) or a total variation, `delta_bar` its
mean over `Q`. Information and entropy are in nats. Results are float64. Proofs and the assumptions behind
each bound: `docs/guarantees.md`. [paper] is arXiv 2602.08329; what is not marked so was derived in this
project.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

Real: TypeAlias = Tensor | float


def _f64(value: Real) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def binary_entropy(p: Real) -> Tensor:
    """Return `h_b(p) = -p log p - (1 - p) log(1 - p)` in nats, any shape; 0 at p = 0 and p = 1.

    Rounding outside [0, 1] is clipped.
    """
    p = _f64(p).clamp(0, 1)
    return torch.special.entr(p) + torch.special.entr(1 - p)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Return `TV = 1/2 Σ |p_i - q_i|` of rows `[..., n]` as `[...]`, in [0, 1]; summed in float64."""
    return 0.5 * (p - q).abs().sum(-1, dtype=torch.float64)


def dropped_mass(probs: Tensor, kept: Tensor) -> Tensor:
    """Return `δ = Σ_{i not kept} A_i` of dense rows `[..., n]` and `kept` bool `[..., n]`; shape `[...]`.

    Theorem 1: for `Â = A` restricted to the kept set and renormalised, `TV(A, Â) = δ`. Always an equality.
    """
    return probs.masked_fill(kept, 0).sum(-1, dtype=torch.float64)


def truncation_kl(delta: Real) -> Tensor:
    """Return `KL(Â‖A) = -log(1 - δ)` in nats of a truncation that drops `delta`, any shape.

    Theorem 1, always an equality; infinite at δ = 1. The other direction, `KL(A‖Â)`, is infinite once δ > 0.
    """
    return -torch.log1p(-_f64(delta))


def output_error_bound(delta: Real, value_diameter: Real) -> Tensor:
    """Return `‖A V - Â V‖ <= δ diam(V)`, any broadcastable shapes; unit of the values.

    Theorem 2; `delta` may be any total variation. Equal when the dropped and the kept mass each sit on one
    value and those two are a diameter apart.
    """
    return _f64(delta) * _f64(value_diameter)


def output_error_exact(probs: Tensor, kept: Tensor, values: Tensor) -> Tensor:
    """Return `A V - Â V = δ (mean of V over dropped - mean of V over kept)` as `[..., d]`, float64.

    Theorem 2 as the identity it is. `probs [..., n]`, `kept` bool `[..., n]`, `values [..., n, d]`; each
    row must keep some mass. Exact for every truncation.
    """
    a = probs.double()
    dropped = a.masked_fill(kept, 0)
    delta = dropped.sum(-1, keepdim=True)
    kept_mean = (a - dropped).unsqueeze(-2) @ values.double() / (1 - delta).unsqueeze(-1)
    return (dropped.unsqueeze(-2) @ values.double()).squeeze(-2) - delta * kept_mean.squeeze(-2)


def replaced_value_error(sparse_probs: Tensor, values: Tensor, replaced_values: Tensor) -> Tensor:
    """Return `Σ_i A'_i ‖V_i - V'_i‖` as `[...]`: what frozen values add to the output error (theorem 6).

    `‖A V - A' V'‖ <= TV(A, A') diam(V) + this`. `sparse_probs [..., n]` are the rows on frozen keys,
    `values` and `replaced_values [..., n, d]`. Equal to the error when A = A' and all differences point the
    same way.
    """
    change = (values.double() - replaced_values.double()).norm(dim=-1)
    return (sparse_probs.double() * change).sum(-1)


def fano_alphabet(num_queries: int, num_positions: int) -> int:
    """Return `M = min(num_queries, num_positions - 1)`, the number of outcomes behind the Fano bound."""
    return min(num_queries, num_positions - 1)


def fano_bound(delta_bar: Real, num_queries: int, num_positions: int) -> Tensor:
    """Return `g(δ̄) = h_b(δ̄) + δ̄ log M >= |I(Q;J) - I(Q;Ĵ)|` in nats, any shape.

    Theorem 3, at exactly `δ̄ = E TV(A(Q), Â(Q))`: `g` falls beyond `M / (M + 1)`, so for anything that is
    only an upper bound or a mean of several δ̄ use `fano_envelope`. Equal when each of `num_positions - 1`
    queries moves all its mass between its own position and one common position while the other queries stay
    on that one.
    """
    m = fano_alphabet(num_queries, num_positions)
    delta_bar = _f64(delta_bar)
    if m < 1 or num_queries < 2:
        return torch.zeros_like(delta_bar)  # one position or one query: both informations are 0
    return binary_entropy(delta_bar) + delta_bar * math.log(m)


def fano_envelope(delta: Real, num_queries: int, num_positions: int) -> Tensor:
    """Return `ḡ(δ) = min{log min(nq, n), g(min(δ, M/(M+1)))}` in nats, any shape.

    Theorem 3 for any `delta >= δ̄`. Concave and nondecreasing, so `E |ΔI| <= ḡ(E δ̄)` over prompts and
    heads, with the largest `num_queries` and `num_positions` among them. Equal where `fano_bound` is, up to
    its peak.
    """
    m = fano_alphabet(num_queries, num_positions)
    if m < 1 or num_queries < 2:
        return torch.zeros_like(_f64(delta))
    peak = m / (m + 1)
    g = fano_bound(_f64(delta).clamp(max=peak), num_queries, num_positions)
    return g.clamp(max=math.log(min(num_queries, num_positions)))


def truncation_bound(delta: Tensor, num_positions: int, weights: Tensor | None = None) -> Tensor:
    """Return `I - Î <= h_b(δ̄) - E h_b(δ(Q)) + δ̄ log M` in nats as `[...]`, from dropped masses `[..., nq]`.

    Theorem 4: pure truncations only, and only the loss of information. `weights [..., nq]` is the law of
    `Q` (uniform if None). Equal when every query puts δ on a position of its own, drops it, and the rest is
    common.
    """
    num_queries = delta.shape[-1]
    delta_bar = query_mean(_f64(delta), weights)
    spread = (binary_entropy(delta_bar) - query_mean(binary_entropy(delta), weights)).clamp(min=0)
    m = fano_alphabet(num_queries, num_positions)
    if m < 1 or num_queries < 2:
        return torch.zeros_like(delta_bar)
    return spread + delta_bar * math.log(m)


def marginal_bound(delta_bar: Real, num_positions: int) -> Tensor:
    """Return `2 [h_b(δ̄) + δ̄ log(n - 1)] >= |I - Î|` in nats, any shape.

    Theorem 5, the route [paper] names: bound `H(J)` and `H(J|Q)` separately, then add. Never below
    `fano_bound`; equal to the truth only where both are 0.
    """
    delta_bar = _f64(delta_bar)
    if num_positions < 2:
        return torch.zeros_like(delta_bar)
    return 2 * (binary_entropy(delta_bar) + delta_bar * math.log(num_positions - 1))


def output_level_bound(total_variation_mean: Real, num_contexts: int, vocab_size: int) -> Tensor:
    """Return the bound on `|I(X;Y) - I(X;Ŷ)|` in nats between contexts and next tokens, any shape.

    Theorem 8: `fano_envelope` with `ε = E TV(p, p̂)` of the next-token laws on the same teacher-forced
    contexts and the vocabulary for the positions. ε is measured; no bound on attention implies it.
    """
    return fano_envelope(total_variation_mean, num_contexts, vocab_size)


def chain_bound(stage_deltas: Tensor) -> Tensor:
    """Return `min(1, Σ_j δ_j) >= TV(A_0, A_J)` as `[...]` from `[..., stages]`.

    Theorem 7. Each δ must be measured against the stage before, not against dense attention. Equal when no
    stage undoes any of the moves before it; truncations in a row do (they renormalise), see
    `chain_truncations`.
    """
    return _f64(stage_deltas).sum(-1).clamp(max=1)


def chain_truncations(stage_deltas: Tensor) -> Tensor:
    """Return `1 - Π_j (1 - δ_j)` as `[...]` from `[..., stages]`: the exact dropped mass of truncations in
    a row.

    Theorem 7 for pure truncations, each δ relative to the renormalised stage before. Always an equality.
    """
    return -torch.expm1(torch.log1p(-_f64(stage_deltas)).sum(-1))


def logit_range(logits: Tensor, other: Tensor, dim: int = -1) -> Tensor:
    """Return `s = max_i (z'_i - z_i) - min_i (z'_i - z_i)` over `dim`, in nats; shift-free distance of
    logits."""
    change = other.double() - logits.double()
    return change.amax(dim) - change.amin(dim)


def drift_bound(spread: Real) -> Tensor:
    """Return `TV(A, A') <= tanh(s / 4)` with `spread` s from `logit_range`, any shape, never above 1.

    Equal for two groups of positions with masses `1/(1+e^{s/2})` and `1/(1+e^{-s/2})` that swap.
    """
    return torch.tanh(_f64(spread) / 4)


def dropped_mass_after_drift(delta: Real, spread: Real) -> Tensor:
    """Return the largest `δ_S(q')` with `logit δ_S(q') <= logit δ_S(q) + s`, for the same kept set; any
    shape.

    Equal when the logits of all dropped positions rise by s against the kept ones.
    """
    return torch.sigmoid(torch.special.logit(_f64(delta)) + _f64(spread))


def query_distance(cosine: Real, query_norm: Real = 1.0, anchor_norm: Real = 1.0) -> Tensor:
    """Return `‖q' - q‖ = √(‖q‖² + ‖q'‖² - 2 ‖q‖ ‖q'‖ cos)`, any shape; `√(2 - 2 cos)` for unit queries."""
    a, b = _f64(query_norm), _f64(anchor_norm)
    return (a * a + b * b - 2 * a * b * _f64(cosine)).clamp(min=0).sqrt()


def logit_range_bound(distance: Real, key_diameter: Real, scale: Real) -> Tensor:
    """Return `s <= scale ‖q' - q‖ diam(K)`, any shape; `diam(K) <= 2 max ‖k‖`.

    Equal when the change of the query is parallel to the longest difference of keys.
    """
    return _f64(scale) * _f64(distance) * _f64(key_diameter)


def paper_drift_bound(cosine: Real, max_key_norm: Real, head_dim: int) -> Tensor:
    """Return `Δ_att = ‖A(q') - A(q)‖₁ <= (2 K_max / √d) √(2 - 2 cos)`, any shape. [paper]

    Holds for queries of unit length and `scale = 1/√d` only. Vacuous above 2. At least twice what
    `drift_bound` gives on the same keys, so never attained unless 0.
    """
    return 2 * _f64(max_key_norm) / math.sqrt(head_dim) * query_distance(cosine)


def paper_retained_loss_bound(drift_l1: Real) -> Tensor:
    """Return `β <= 2 Δ_att`, the retained mass a reused set may be below the oracle's; any shape. [paper]

    From two uses of `|A'(S) - A(S)| <= TV = Δ_att / 2`, so `Δ_att` alone would do: loose by a factor of 2.
    """
    return 2 * _f64(drift_l1)


def mutual_information(probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return `I(Q;J) = H(E A(Q)) - E H(A(Q))` in nats as float64 `[...]`, exactly, from rows `[..., nq, n]`.

    Rows of any float dtype, non-negative; they are normalised first. `weights [..., nq]` is the law of `Q`
    (uniform if None).
    """
    num_queries, num_positions = probs.shape[-2:]
    rows = probs.reshape(-1, num_queries, num_positions)
    laws = (
        [None] * len(rows)
        if weights is None
        else list(weights.expand(probs.shape[:-1]).reshape(-1, num_queries))
    )
    # one head at a time: the float64 copy stays in the cache
    result = []
    for head, law in zip(rows, laws, strict=True):
        head = normalised(head)
        result.append(information_of_rows(head, row_entropy(head), law))
    return torch.stack(result).reshape(probs.shape[:-2])


def normalised(rows: Tensor) -> Tensor:
    """Return `rows [..., n]` divided by their sums, float64."""
    rows = rows.double()
    return rows / rows.sum(-1, keepdim=True)


def row_entropy(rows: Tensor) -> Tensor:
    """Return `H(row)` in nats as `[...]` from normalised rows `[..., n]`."""
    return torch.special.entr(rows).sum(-1)


def query_mean(x: Tensor, weights: Tensor | None = None, dim: int = -1) -> Tensor:
    """Return the mean of `x` under the law `weights [..., nq]` of the queries, along `dim` (-1 or -2)."""
    if weights is None:
        return x.mean(dim)
    law = normalised(weights)
    return (x * (law if dim == -1 else law.unsqueeze(-1))).sum(dim)


def information_of_rows(rows: Tensor, entropies: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return `I(Q;J)` in nats as `[...]` from normalised float64 rows `[..., nq, n]` and their entropies."""
    marginal = torch.special.entr(query_mean(rows, weights, dim=-2)).sum(-1)
    return (marginal - query_mean(entropies, weights)).clamp(min=0)
