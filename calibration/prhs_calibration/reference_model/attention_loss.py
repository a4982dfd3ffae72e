"""Auxiliary loss on the attention of two heads, from which recall starts.

An early head is taught to look two tokens back, a middle head to look from a question's answer to the digit
that was planted. Neither target needs attention matrices: only the rows that are scored are computed.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .task_rows import TaskBatch

NAME = "prhs_training"
_EARLY_ROWS = 64
_MOST_TARGETS = 48  # supervised answer tokens per row of tasks


class AttentionTap:
    """Keeps post-RoPE queries and keys of the two supervised layers during a training forward."""

    def __init__(self, num_layers: int) -> None:
        self.early, self.middle = 1, num_layers // 2
        self.enabled = True
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Causal SDPA; query [B, Hq, T, d], key and value [B, Hkv, T, d]; returns [B, T, Hq, d]."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if self.enabled and layer in (self.early, self.middle):
            self._seen[layer] = (query[:, 0], key[:, 0])
        out = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    def install(self, model: nn.Module) -> None:
        """Make `model` attend through this tap (registered process-wide under one name, last tap wins)."""
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(NAME, self.attend)
        AttentionMaskInterface.register(NAME, _no_mask)
        model.set_attn_implementation(NAME)  # type: ignore[operator]

    def losses(self, answers: Tensor, planted: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats of (early head to token t - 2, middle head to planted digit), then forget.

        answers, planted: [B, A] int64 positions, -1 padded; the row that predicts answer a is a - 1.
        """
        query, key = self._seen.pop(self.early)
        length = query.shape[1]
        rows = torch.randint(2, length, (_EARLY_ROWS,), generator=generator).to(query.device)
        rows_all = rows.expand(query.shape[0], -1)
        early = row_loss(query, key, rows_all, rows_all - 2)
        query, key = self._seen.pop(self.middle)
        middle = row_loss(query, key, answers - 1, planted)
        return early, middle


def row_loss(query: Tensor, key: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of one head's attention rows `rows` [B, R] against `targets` (negative = absent)."""
    index = rows.clamp(min=0)[..., None].expand(-1, -1, query.shape[-1])
    with torch.autocast(query.device.type, enabled=False):
        logits = query.float().gather(1, index) @ key.float().transpose(1, 2) * query.shape[-1] ** -0.5
    columns = torch.arange(key.shape[1], device=key.device)
    logits = logits.masked_fill(columns > rows[..., None], float("-inf"))
    absent = targets < 0
    logits = logits.masked_fill(absent[..., None], 0.0)
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.clamp(min=0).flatten(), reduction="none")
    valid = ~absent.flatten()
    return (losses * valid).sum() / valid.sum().clamp(min=1)


def targets_by_row(batch: TaskBatch, rng: np.random.Generator) -> tuple[Any, Any]:
    """Columns of answers and of where they were stated, `[rows, most]` with -1 where there is none."""
    rows, length = batch.ids.shape
    known = np.flatnonzero(batch.planted >= 0)
    rng.shuffle(known)
    owner = batch.answers[known] // length
    order = np.argsort(owner, kind="stable")
    known, owner = known[order], owner[order]
    counts = np.bincount(owner, minlength=rows)
    rank = np.arange(len(known)) - np.repeat(np.cumsum(counts) - counts, counts)
    keep = rank < _MOST_TARGETS
    width = max(1, min(_MOST_TARGETS, int(counts.max(initial=1))))
    asked = np.full((rows, width), -1, dtype=np.int64)
    stated = np.full((rows, width), -1, dtype=np.int64)
    asked[owner[keep], rank[keep]] = batch.answers[known[keep]] % length
    stated[owner[keep], rank[keep]] = batch.planted[known[keep]] % length
    return asked, stated


def _no_mask(*_: Any, **__: Any) -> None:
    """Training sequences are unpadded: causality alone, which SDPA applies itself."""
    return None
