"""What retrieval remembers between decode steps, what it is allowed to do, and its scratch memory."""

from __future__ import annotations

import dataclasses
import enum

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.audit.state import LayerAudit
from prhs_kernels.ops.retrieve.key_copy import KeyCopy
from prhs_kernels.params import TimeParams

MAX_DILATION = 31  # neighbours on either side


class Decision(enum.IntEnum):
    """What a KV head did in the last step."""

    SHARE = 0  # reused its set, the new position added
    RETRIEVE = 1  # scored the keys and chose a new set
    KEEP_ALL = 2  # the budget covers every candidate


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalRule:
    """CIS parameters of one layer, on the device; each tensor `[num_kv_heads]`."""

    gate: torch.Tensor  # int32, a `params.Gate`
    tau_cos: torch.Tensor  # float32, sharing needs a cosine above it
    block: torch.Tensor  # int32, decode steps between two forced retrievals
    dilation: torch.Tensor  # int32, neighbours on either side of the best third
    num_local: int  # most recent positions, always kept

    @classmethod
    def from_time(
        cls, time: TimeParams, layer: int, num_local: int, device: torch.device | str
    ) -> RetrievalRule:
        """Parameters of a layer.

        Raises:
            UsageError: no re-anchoring, which needs two sets per head, or more than 31 neighbours.
        """
        if not time.reanchor:
            raise UsageError("reanchor = False is not available in the retrieve operator")
        if int(time.dilation[layer].max()) > MAX_DILATION:
            raise UsageError(f"dilation = {int(time.dilation[layer].max())} must be at most {MAX_DILATION}")
        return cls(
            gate=time.gate[layer].to(device, torch.int32),
            tau_cos=time.tau_cos[layer].to(device, torch.float32),
            block=time.block[layer].to(device, torch.int32),
            dilation=time.dilation[layer].to(device, torch.int32),
            num_local=num_local,
        )


def capacity_for(budget: int, num_sinks: int, num_local: int, dilation: int, block: int) -> int:
    """Indices that a head may need at most until its next retrieval, a multiple of 16."""
    most = budget + 2 * dilation * (budget // 3) + num_sinks + num_local + block
    return -(-most // 16) * 16


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalState:
    """One layer's sets, written in place. `heads` means `[batch, num_kv_heads]`.

    indices: `[batch, num_kv_heads, capacity]` int32 slots, ascending, valid below count (heads, int32).
    anchor_query: `[batch, num_kv_heads, group, head_dim]`, what the gate compares with.
    anchor_slot: heads int32, slot of the last retrieval, -1 for none. decision: heads int32, a `Decision`.
    lse: `[batch, num_kv_heads, group]` fp32, log-sum-exp over all candidates at the last retrieval, of the
        scores that it saw: exact on exact keys, approximate where a low-bit copy was scanned.
    guess: heads int32, bits of the importance from which the kernels list candidates in the next retrieval, 0
        for none. Any value leaves the sets as they are; the reference has no use for it.
    """

    indices: torch.Tensor
    count: torch.Tensor
    anchor_query: torch.Tensor
    anchor_slot: torch.Tensor
    decision: torch.Tensor
    lse: torch.Tensor
    guess: torch.Tensor

    @classmethod
    def allocate(
        cls, batch: int, num_kv_heads: int, group: int, head_dim: int, capacity: int,
        dtype: torch.dtype, device: torch.device | str,
    ) -> RetrievalState:  # fmt: skip
        """A state without any set, as after a prefill."""
        heads = (batch, num_kv_heads)
        return cls(
            indices=torch.full((*heads, capacity), -1, dtype=torch.int32, device=device),
            count=torch.zeros(heads, dtype=torch.int32, device=device),
            anchor_query=torch.zeros(*heads, group, head_dim, dtype=dtype, device=device),
            anchor_slot=torch.full(heads, -1, dtype=torch.int32, device=device),
            decision=torch.zeros(heads, dtype=torch.int32, device=device),
            lse=torch.full((*heads, group), -torch.inf, dtype=torch.float32, device=device),
            guess=torch.zeros(heads, dtype=torch.int32, device=device),
        )

    def reset(self) -> None:
        """Forget every set; on the device, so also inside a captured graph."""
        self.count.zero_()
        self.anchor_slot.fill_(-1)
        self.guess.zero_()


MAX_CHUNKS = 256  # of a row: one block holds what the scan found in all of them


def chunk_size(n: int) -> int:
    """Positions that are the unit of sharing out a scan, for rows of up to n."""
    return max(256, 1 << (-(-n // MAX_CHUNKS) - 1).bit_length())


def num_bins(n: int) -> int:
    """Bins in which candidates of rows of up to n are counted, two for a thread; none for short rows."""
    return 0 if n <= 4096 else 1024


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalScratch:
    """Memory of one retrieval; layers may share it. `rows = batch * num_kv_heads`.

    work: `[3 + 2 * rows]` int32: next free place of the list, its length for later stages and 1 (0 while it
        is not known), chunks of a piece of the scan, the list.
    scores: `[rows, group, n]` fp32, base-2 logits.
    weights: `[rows, n up to a multiple of 1024]` int32, bits of the importance.
    words: `[rows, 2, ceil(n / 32)]` int32, bit masks of the chosen positions and of those with neighbours.
    chunk_max, chunk_sum: `[2, rows, group, chunks]` fp32, softmax of every piece of the scan; [1]: of audits.
    tally: `[rows, 32 + bins]` int32, zero between retrievals: parts that are done, candidates, those by bin.
    lists: `[rows, 2, n / 4 up to 8192]` int32, candidates and bits of their importance; none without bins.
    """

    work: torch.Tensor
    scores: torch.Tensor
    weights: torch.Tensor
    words: torch.Tensor
    chunk_max: torch.Tensor
    chunk_sum: torch.Tensor
    tally: torch.Tensor
    lists: torch.Tensor

    @classmethod
    def allocate(
        cls, batch: int, num_kv_heads: int, group: int, n: int, device: torch.device | str
    ) -> RetrievalScratch:
        """For caches of up to n slots."""
        rows, chunks = batch * num_kv_heads, -(-n // chunk_size(n))

        def floats(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            work=zeros(3 + 2 * rows),
            scores=floats(rows, group, n),
            weights=torch.empty(rows, -(-n // 1024) * 1024, dtype=torch.int32, device=device),
            words=torch.empty(rows, 2, -(-n // 32), dtype=torch.int32, device=device),
            chunk_max=floats(2, rows, group, chunks),
            chunk_sum=floats(2, rows, group, chunks),
            tally=zeros(rows, 32 + num_bins(n)),
            lists=torch.empty(
                rows, 2, min(n // 4, 8192) if num_bins(n) else 0, dtype=torch.int32, device=device
            ),
        )

    @property
    def max_len(self) -> int:
        """Slots it was made for."""
        return self.scores.shape[2]


@dataclasses.dataclass(frozen=True, eq=False)
class GateInputs:
    """What a layer's decisions in a step follow from besides the queries; fields as arguments of `retrieve`.

    For `rope_append`, which decides in the launch that makes the queries and writes the new key's low-bit
    copy there too; `retrieve(gated=True)` then goes on from the work list in `scratch`.
    """

    spans: torch.Tensor
    budget: torch.Tensor
    rule: RetrievalRule
    state: RetrievalState
    scratch: RetrievalScratch
    key_copy: KeyCopy | None = None
    audit: LayerAudit | None = None
