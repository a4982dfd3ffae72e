"""How a checkpoint's dense attention looks: adjacent queries, sinks, concentration, layers alike."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from .fused import FusedLlama

_ROWS = 64  # query rows per prompt for statistics of attention rows


class AdjacentCosine:
    """Tap: mean cosine of each head's query with the one before it, after RoPE."""

    def __init__(self, num_layers: int) -> None:
        self.sums: list[Tensor | None] = [None] * num_layers
        self.batches = 0

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, x: Tensor) -> None:
        cosine = functional.cosine_similarity(query[:, :, 1:].float(), query[:, :, :-1].float(), dim=-1)
        mean = cosine.mean((0, 2))
        so_far = self.sums[layer]
        self.sums[layer] = mean if so_far is None else so_far + mean
        self.batches += layer == 0

    def per_head(self) -> Tensor:
        """[layers, heads]."""
        return torch.stack([total for total in self.sums if total is not None]) / max(1, self.batches)

    def mean(self) -> list[float]:
        """Per layer."""
        means: list[float] = self.per_head().mean(1).tolist()
        return means


def attention_figures(forward: FusedLlama, prompts: npt.NDArray[np.uint16], device: str) -> dict[str, Any]:
    """Statistics of dense attention on whole prompts `[n, T]`; rows come from the last eighth.

    Per layer and head: cosine of adjacent queries after RoPE, positions needed for 98 % of a row (share
    of the row), mass on position 0 and on the first four. Per layer against the one before: cosine of inputs,
    keys and values, and overlap of the rows (1 - total variation, mean over heads in order).
    """
    layers = len(forward.model.model.layers)
    cosines = AdjacentCosine(layers)
    sums: dict[str, list[Tensor]] = {}
    length = prompts.shape[1]
    at = torch.linspace(length - length // 8, length - 1, min(_ROWS, length // 8), device=device).long()
    last: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        sums.setdefault(name, []).append(value.double().cpu())

    def tap(layer: int, query: Tensor, key: Tensor, value: Tensor, x: Tensor) -> None:
        cosines(layer, query, key, value, x)
        group = query.shape[1] // key.shape[1]
        keys = key.repeat_interleave(group, dim=1).float()
        scores = query[:, :, at].float() @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        later = torch.arange(length, device=device) > at[:, None]
        rows = scores.masked_fill(later, float("-inf")).softmax(-1)[0]
        cumulated = rows.sort(dim=-1, descending=True).values.cumsum(-1)
        needed = (cumulated < 0.98).sum(-1) + 1
        add("positions_for_98_percent", (needed / (at + 1)).mean(-1))
        add("median_positions_for_98_percent", needed.float().median(-1).values)
        add("sink_mass_first", rows[..., 0].mean(-1))
        add("sink_mass_first_four", rows[..., :4].sum(-1).mean(-1))
        seen = {"input": x.view(1, length, -1), "key": key, "value": value}
        for name, now in seen.items():
            if name in last:
                add(
                    f"similarity_{name}",
                    functional.cosine_similarity(now.float(), last[name].float(), dim=-1).mean(),
                )
        if "rows" in last:
            add("overlap_rows", torch.minimum(rows, last["rows"]).sum(-1).mean())
        last.update(seen | {"rows": rows})

    for prompt in prompts:
        last.clear()
        forward.hidden(torch.from_numpy(prompt[None].astype(np.int64)).to(device), tap)
    figures: dict[str, Any] = {"prompts": len(prompts), "length": length, "rows_per_prompt": len(at)}
    figures["adjacent_cosine"] = _rounded(cosines.per_head())
    figures["adjacent_cosine_mean"] = round(float(cosines.per_head().mean()), 4)
    for name, values in sums.items():
        stacked = torch.stack(values).unflatten(0, (len(prompts), -1)).mean(0)
        figures[name] = _rounded(stacked)
        figures[f"{name}_mean"] = round(float(stacked.mean()), 4)
    return figures


def _rounded(values: Tensor) -> Any:
    return [_rounded(v) for v in values] if values.dim() else round(float(values), 4)
