"""Sparse peers in one layer's decode step: our implementations of their published selection.

Selection is plain PyTorch (products, softmax, `torch.topk`), attention is our gathering kernel, so that
a peer is not charged for a slower attention of its own. The authors' kernels may be faster or slower.
Conventions for grouped queries as in `selectors/baselines`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch

from prhs_kernels.bench.cases import Case, Inputs
from prhs_kernels.bench.timing import Calls
from prhs_kernels.ops.sparse_decode.api import sparse_decode

PAGE = 16  # positions per page of Quest
LABELS = (
    1 / 16,
    1 / 4,
)  # of the channels, DoubleSparse: as many bytes, as many channels as published in 4 bits
HSHARE = 1 / 8  # of the units retrieve: every second step, in half of the layers, half of the KV heads


@dataclasses.dataclass(frozen=True)
class Peer:
    """A selection. scores: what units (pages or positions) are chosen by, `[batch, heads, units]` of call i,
    in the precision of the tensors or, asked for, in float64; heads: those that retrieve."""

    page: int  # positions per unit
    scores: Callable[[int, bool], torch.Tensor]
    margin: float  # by how much rounding may shift a score

    def indices(self, inputs: Inputs, i: int) -> torch.Tensor:
        """`[batch, num_kv_heads, kept]` int32, ascending; heads that do not retrieve take their leader's."""
        p = inputs.problem
        chosen = self.scores(i, False).topk(p.kept // self.page, dim=-1, sorted=False).indices
        units = chosen.sort(dim=-1).values
        inside = torch.arange(self.page, device=units.device)
        found = (units[..., None] * self.page + inside).flatten(2).int()
        return found.repeat_interleave(p.num_kv_heads // found.shape[1], dim=1)


def peer_cases(inputs: Inputs) -> Iterator[Case]:
    """Quest, DoubleSparse at two label sizes, and reuse like HShare's."""
    p = inputs.problem
    key_bytes = p.head_dim * inputs.item
    yield _case(inputs, "Quest, pages of 16", _quest, 2 * key_bytes // PAGE)
    for share in LABELS:
        channels = max(1, round(share * p.head_dim))
        make = functools.partial(_double_sparse, channels)
        yield _case(inputs, f"DoubleSparse, {channels} label channels", make, channels * inputs.item)
    leaders = max(1, round(HSHARE * p.num_kv_heads))
    ratio = leaders / p.num_kv_heads
    make = functools.partial(_hshare, leaders)
    yield _case(inputs, f"HShare-like, ρ = {ratio:.3g}", make, int(ratio * key_bytes))


def _case(inputs: Inputs, name: str, make: Callable[[Inputs], Peer], scan: int) -> Case:
    """scan: bytes per position and row that the selection reads."""
    p = inputs.problem

    def prepare() -> Calls:
        peer = make(inputs)
        indices = peer.indices(inputs, 0)
        count = torch.full(indices.shape[:2], indices.shape[2], dtype=torch.int32, device=indices.device)

        def call(i: int) -> torch.Tensor:
            found = peer.indices(inputs, i % inputs.copies)
            return sparse_decode(*inputs.kv(i), found, count=count, scale=inputs.scale, backend="triton")[0]

        check_choice(peer.scores(0, True), indices, peer, p.num_kv_heads)
        inputs.check(call(0), inputs.sparse_outputs(inputs.kv(0), indices, count))
        return inputs.rotate(call)

    kept = p.kept * (2 * p.head_dim * inputs.item + 4)
    return Case(name, "peer", p.rows * (kept + p.n * scan), prepare)


def check_choice(exact: torch.Tensor, indices: torch.Tensor, peer: Peer, num_kv_heads: int) -> None:
    """AssertionError unless every unit that is clearly among the best was chosen, and as many as asked."""
    heads, units = exact.shape[1:]
    leaders = indices[:, :: num_kv_heads // heads]
    chosen = torch.zeros(exact.shape, dtype=torch.bool, device=exact.device)
    chosen.scatter_(-1, leaders.long() // peer.page, True)
    count = indices.shape[2] // peer.page
    assert bool((chosen.sum(-1) == count).all()), "a unit was chosen twice"
    last = exact.topk(count, dim=-1).values[..., -1:]
    missing = (exact > last + 2 * peer.margin) & ~chosen
    assert not bool(missing.any()), f"{int(missing.sum())} of the best units are missing"


def _quest(inputs: Inputs) -> Peer:
    """Pages by the largest logit that the minimum and maximum of their keys allow (arXiv:2406.10774)."""
    p = inputs.problem
    pages = inputs.keys[..., : p.n // PAGE * PAGE, :].unflatten(3, (-1, PAGE))
    low, high = pages.amin(4), pages.amax(4)

    def scores(i: int, wide: bool) -> torch.Tensor:
        query, least, most = _packed(inputs, i), low[i], high[i]
        if wide:
            query, least, most = query.double(), least.double(), most.double()
        bound = query.clamp(min=0) @ most.mT + query.clamp(max=0) @ least.mT
        return bound.amax(2)

    reach = float(torch.maximum(low[0].abs(), high[0].abs()).float().max())
    margin = 2 * torch.finfo(inputs.dtype).eps * float(_packed(inputs, 0).float().abs().sum(-1).max()) * reach
    return Peer(PAGE, scores, margin)


def _double_sparse(channels: int, inputs: Inputs) -> Peer:
    """Positions by dot products over the channels with the largest mean `|q_c k_c|` (arXiv:2408.07092)."""
    p = inputs.problem
    weight = _packed(inputs, 0).abs().float().mean(2) * inputs.keys[0].abs().float().mean(2)
    best = weight.mean(0).topk(channels, dim=-1).indices  # per KV head, as calibration finds them
    place = best[None, :, None].expand(p.batch, -1, 1, -1)
    keys = torch.stack([each.gather(3, place.expand(-1, -1, p.n, -1)) for each in inputs.keys])

    def scores(i: int, wide: bool) -> torch.Tensor:
        query = _packed(inputs, i).gather(3, place.expand(-1, -1, p.group, -1))
        return _mean_weight(query, keys[i], inputs.scale, wide)

    margin = _margin(inputs, _packed(inputs, 0), keys[0])
    return Peer(1, scores, margin)


def _hshare(leaders: int, inputs: Inputs) -> Peer:
    """Exact keys in a few KV heads, whose positions the others take (openreview Tb5PY5vwp6)."""
    step = inputs.problem.num_kv_heads // leaders

    def scores(i: int, wide: bool) -> torch.Tensor:
        return _mean_weight(_packed(inputs, i)[:, ::step], inputs.keys[i][:, ::step], inputs.scale, wide)

    return Peer(1, scores, _margin(inputs, _packed(inputs, 0), inputs.keys[0]))


def _packed(inputs: Inputs, i: int) -> torch.Tensor:
    """Queries `[batch, num_kv_heads, group, head_dim]` of call i."""
    p = inputs.problem
    return inputs.queries[i].view(p.batch, p.num_kv_heads, p.group, p.head_dim)


def _mean_weight(query: torch.Tensor, keys: torch.Tensor, scale: float, wide: bool) -> torch.Tensor:
    """Logarithm of the group's summed softmax weight: the same order, and errors add."""
    if wide:
        query, keys = query.double(), keys.double()
    logits = (query @ keys.mT) * scale
    return logits.log_softmax(-1, dtype=torch.float64 if wide else torch.float32).logsumexp(2)


def _margin(inputs: Inputs, query: torch.Tensor, keys: torch.Tensor) -> float:
    """Rounding of a logit: half of what `2 * margin` allows."""
    largest = float(query.float().norm(dim=-1).max() * keys.float().norm(dim=-1).max())
    return 2 * torch.finfo(inputs.dtype).eps * largest * inputs.scale
