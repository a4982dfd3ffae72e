"""What is asked of a decode loop, and what it records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from prhs_kernels.errors import UsageError
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.audit import Audit
from prhs_kernels.runtime.auditing import Auditor
from prhs_kernels.runtime.engine import Attention, Mode
from prhs_kernels.runtime.sampling import Sampling
from prhs_kernels.runtime.stats import DecodeStats

AUDIT_SEED = 20_260_209  # of the audit's coin: nothing of a request, so that no one can tune it


@dataclasses.dataclass
class Generation:
    """A run of the decode loop; filled while `generate_tokens` is consumed. Times in seconds."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    time_to_first_token: float = float("nan")
    decode_seconds: float = 0.0
    kv_bytes_resident: int = 0
    kv_bytes_resident_dense: int = 0
    mode: Mode = "audited"  # or `released`; see docs/notation.md
    backend: str = "reference"  # what ran: `reference` or `triton`
    attention: Attention = "sparse"
    audit: Audit | None = None  # what was dropped, if that was asked for
    notes: list[str] = dataclasses.field(default_factory=list)  # what the user should hear, once
    stats: DecodeStats = dataclasses.field(default_factory=DecodeStats)

    @property
    def tokens_per_second(self) -> float:
        """Decode steps per second and sequence; the first token belongs to the prefill."""
        steps = self.new_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else float("nan")

    def to_dict(self) -> dict[str, float | int | str]:
        """Everything `prhs generate --stats` prints."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "time_to_first_token": self.time_to_first_token,
            "tokens_per_second": self.tokens_per_second,
            **self.stats.to_dict(),
            "kv_bytes_resident": self.kv_bytes_resident,
            "kv_bytes_resident_dense": self.kv_bytes_resident_dense,
            "mode": self.mode,
            "backend": self.backend,
            "attention": self.attention,
        }


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask `[batch, longest]` int64, shorter prompts padded on the left."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UsageError("every prompt needs at least one token")
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What to continue and how; ids and mask `[batch, longest]` on the model's device."""

    model: PreTrainedModel
    params: SelectorParams
    ids: torch.Tensor
    mask: torch.Tensor
    prompt_steps: int
    limits: torch.Tensor  # [batch] int64 on the host, new tokens of each
    sampling: Sampling
    stop_token_ids: tuple[int, ...]
    run: Generation
    auditor: Auditor | None

    @property
    def max_new_tokens(self) -> int:
        return int(self.limits.max())
