"""Decode steps of one layer, as the comparison methods see them."""

from __future__ import annotations

import dataclasses
import functools

import torch

from prhs_kernels.errors import InputError, UsageError
from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.memory import Memory, PromptRows


@dataclasses.dataclass(frozen=True, eq=False)
class DecodeRows:
    """Queries of `num_steps` decode steps of one sequence in one layer, with the keys they may attend.

    A step at position t sees positions `window_start .. t`; keys behind t belong to later steps.
    `dense_probs` stand for the scores of a method that computes them: the oracle and exact top-k scan every
    key; other methods may look only at what they load, and count it.
    """

    query: torch.Tensor  # [num_qo_heads, num_steps, head_dim], as attention uses it (after RoPE)
    keys: torch.Tensor  # [num_kv_heads, kv_len_max, head_dim], key i is position i
    dense_probs: (
        torch.Tensor
    )  # [num_qo_heads, num_steps, kv_len_max] float32, attention of the unmodified model
    positions: torch.Tensor  # [num_steps] int64, position of each query
    window_start: torch.Tensor | None = None  # [num_steps] int64, first position of the model's own window
    layer: int = 0
    scale: float = 1.0  # what dot products are multiplied by
    memory: Memory = dataclasses.field(default_factory=Memory)

    def __post_init__(self) -> None:
        num_qo_heads, num_steps, head_dim = self.query.shape
        num_kv_heads, length, _ = self.keys.shape
        if num_kv_heads < 1 or num_qo_heads % num_kv_heads:
            raise InputError(f"{num_qo_heads} query heads are not a multiple of {num_kv_heads} KV heads")
        expected = {
            "keys": (self.keys, (num_kv_heads, length, head_dim)),
            "dense_probs": (self.dense_probs, (num_qo_heads, num_steps, length)),
            "positions": (self.positions, (num_steps,)),
            "window_start": (self.window_start, (num_steps,)),
        }
        for name, (value, shape) in expected.items():
            if value is not None and tuple(value.shape) != shape:
                raise InputError(f"{name} has shape {tuple(value.shape)}, the queries need {shape}")
        if num_steps and not 0 <= int(self.positions.min()) <= int(self.positions.max()) < length:
            raise InputError(f"positions must lie in [0, {length}), the number of keys")

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[0]

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[0] // self.keys.shape[0]

    @property
    def prompt(self) -> PromptRows:
        """This layer's prefill. UsageError where its queries were not kept."""
        try:
            return self.memory.prompts[self.layer]
        except KeyError:
            raise UsageError(
                "this selector looks at the prompt's queries, which were not kept: give it before the prefill"
            ) from None

    @functools.cached_property
    def first_visible(self) -> torch.Tensor:
        """First position each step may attend, `[num_steps]` int64."""
        return (
            torch.zeros_like(self.positions) if self.window_start is None else self.window_start.clamp(min=0)
        )

    @functools.cached_property
    def num_visible(self) -> torch.Tensor:
        """Positions each step may attend, `[num_steps]` int64."""
        return self.positions + 1 - self.first_visible

    @functools.cached_property
    def visible(self) -> torch.Tensor:
        """What each step may attend: causal, inside the model's window; `[num_steps, kv_len_max]` bool."""
        key = torch.arange(self.keys.shape[1], device=self.keys.device)
        return (key <= self.positions[:, None]) & (key >= self.first_visible[:, None])

    @functools.cached_property
    def group_mass(self) -> torch.Tensor:
        """Mean dense probability over each group's query heads, `[num_kv_heads, num_steps, kv_len_max]`."""
        return self.by_group(self.dense_probs).mean(1)

    def by_group(self, per_head: torch.Tensor) -> torch.Tensor:
        """View `[num_qo_heads, ...]` as `[num_kv_heads, group_size, ...]`."""
        return per_head.reshape(self.num_kv_heads, self.group_size, *per_head.shape[1:])

    def chosen(
        self,
        kept: torch.Tensor,
        size: torch.Tensor,
        *,
        retrieved: torch.Tensor | bool,
        extra_rows: torch.Tensor | int = 0,
    ) -> Choice:
        """A `Choice` with K and V of `kept` loaded, and `extra_rows` of whatever was scored to find it.

        retrieved: where something was scored; counts only where `size` leaves a choice.
        """
        contested = (size < self.num_visible).expand(kept.shape[:2])
        read = (2 * kept.sum(-1) + extra_rows).expand(kept.shape[:2])
        return Choice(kept, contested & retrieved, contested, read)


def falling_rank(weight: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Place of every position in falling order of `weight [..., n]`, int64; what is not allowed comes last.

    Equal weights are taken from the lowest position on. Compared with a size, one sort gives the top-k of
    any k. `allowed` broadcasts to `weight`, which is finite.
    """
    order = weight.masked_fill(~allowed, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def uniform_size(rows: DecodeRows, fraction: float) -> torch.Tensor:
    """The same attended fraction for every head and step: `[num_kv_heads, num_steps]` int64.

    `fraction` is of the positions that dense attention covers: `kv_len`, or the model's own window where that
    is shorter. At least one position, the current one.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"budget {fraction} must be a fraction of the visible positions in (0, 1]")
    size = (rows.num_visible.double() * fraction).round().long()
    return size.clamp(min=1).expand(rows.num_kv_heads, -1)
