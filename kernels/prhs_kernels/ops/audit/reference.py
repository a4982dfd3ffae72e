"""Coin and dropped mass in plain PyTorch."""

from __future__ import annotations

import torch

from prhs_kernels.ops.audit.state import LayerAudit, StepAudit

WORD = 0xFFFFFFFF


def _product(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of the product of 32-bit words that int64 tensors hold."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & WORD


def philox(seed: int | torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """First word of Philox-4x32-10 (Salmon et al., SC 2011) at `counter`, int64 in [0, 2**32).

    A seed that is a tensor goes with the counter by broadcasting.
    """
    words = [counter & WORD, *(torch.zeros_like(counter) for _ in range(3))]
    keys = [seed & WORD, seed >> 32 & WORD]
    for _ in range(10):
        (high_0, low_0), (high_2, low_2) = _product(words[0], 0xD2511F53), _product(words[2], 0xCD9E8D57)
        words = [high_2 ^ words[1] ^ keys[0], low_2, high_0 ^ words[3] ^ keys[1], low_0]
        keys = [keys[0] + 0x9E3779B9 & WORD, keys[1] + 0xBB67AE85 & WORD]
    return words[0]


def draw_coins(audit: StepAudit) -> None:
    """One coin per layer and row for the step at hand."""
    units = audit.coin[0].numel()
    rows = torch.arange(units, device=audit.coin.device)
    draws = philox(audit.seeds[:, None], audit.step * units + rows)
    audit.coin.copy_(((draws & 0x7FFFFFFF) <= audit.limit).view_as(audit.coin))


def scan_units(
    query: torch.Tensor, keys: torch.Tensor, audit: LayerAudit, spans: torch.Tensor, visible: torch.Tensor,
    decision: torch.Tensor, scale: float, count: torch.Tensor | None,
) -> None:  # fmt: skip
    """Arguments as in `api.scan_units`."""
    first, sink_end, window, end = spans.unbind(dim=-1)
    kept = (sink_end - first + end - window)[:, None] if count is None else count
    decision.copy_(torch.where(kept == visible[:, None], 2, 0).expand_as(decision))
    batch, num_kv_heads, n, head_dim = keys.shape
    slots = torch.arange(n, device=keys.device)
    seen = (slots >= (end - visible)[:, None]) & (slots < end[:, None])
    wide = torch.promote_types(query.dtype, torch.float32)
    packed = query.reshape(batch, num_kv_heads, -1, head_dim)
    scores = torch.matmul(packed, keys.transpose(-1, -2)).to(wide) * scale
    lse = scores.masked_fill(~seen[:, None, None], -torch.inf).logsumexp(dim=-1)
    audit.lse.copy_(torch.where((audit.coin == 1)[..., None], lse, audit.lse))


def count_dropped(
    lse_kept: torch.Tensor, audit: StepAudit, decision: torch.Tensor, lse: torch.Tensor | None,
    alive: torch.Tensor | None,
) -> None:  # fmt: skip
    """Arguments as in `api.count_dropped`."""
    kept, exact = lse_kept.view(audit.lse.shape), lse is not None
    counts = torch.ones_like(decision, dtype=torch.bool)
    if alive is not None:
        counts &= alive[:, None]
    retrieved, everything = counts & (decision == 1), counts & (decision == 2)
    certain = everything | (retrieved & exact)
    audited = counts & (audit.coin == 1) & ~certain

    def dropped(whole: torch.Tensor) -> torch.Tensor:
        share = 1.0 - (kept - whole).float().exp()
        return share.clamp(min=0.0).mean(dim=-1).double()

    wholes = (retrieved & exact, audit.lse if lse is None else lse), (audited, audit.lse)
    masses = [torch.where(which, dropped(whole), 0.0).sum(dim=(1, 2)) for which, whole in wholes]
    audit.sums.add_(torch.stack(masses, dim=1))
    units = certain, audited, counts & ~certain
    audit.units.add_(torch.stack([each.sum(dim=(1, 2)) for each in units], dim=1))
