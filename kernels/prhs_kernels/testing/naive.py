"""The method once more, one token, one head and one Python set at a time: what the tests compare with.

Written from docs/notation.md and shares nothing with the selectors or the runtime but the parameters.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import transformers

from prhs_kernels.params import FreezeMode, Gate, SelectorParams


def schedule(layer: int, num_layers: int, start: int, base: float, power: float, length: int) -> int:
    """`floor((1 - base^(power (l - l_s) / (L - l_s))) length)`, 0 below `l_s`."""
    if layer < start:
        return 0
    return math.floor((1.0 - base ** (power * (layer - start) / (num_layers - start))) * length)


def visible(params: SelectorParams, layer: int, t: int, sliding_window: int | None) -> set[int]:
    """Positions the query at `t` may see in this layer: the model's own window, then PSAW's."""
    seen = set(range(t + 1))
    if sliding_window is not None:
        seen = {i for i in seen if t - i < sliding_window}
    if params.depth is not None:
        axis = params.depth
        first = schedule(layer, params.num_layers, axis.start_layer, axis.phi, axis.alpha, t)
        seen = {i for i in seen if i >= first or i < params.num_sinks or t - i < params.num_local}
    return seen


@dataclasses.dataclass
class Anchor:
    """query, query_pre: `[group, head_dim]`; position of the retrieval, of the block, the dilated set."""

    query: torch.Tensor
    query_pre: torch.Tensor
    position: int
    block_start: int
    chosen: set[int]


@dataclasses.dataclass
class Step:
    """What one KV head did at one decode step."""

    kept: set[int]
    retrieved: bool = False
    contested: bool = False
    gated: bool = False


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Smallest cosine between corresponding rows of `[group, head_dim]`."""
    rows = zip(a.double(), b.double(), strict=True)
    return min(min(1.0, float(x @ y / (x.norm() * y.norm()))) for x, y in rows)


def retrieve(scores: torch.Tensor, allowed: set[int], middle: set[int], count: int, radius: int) -> set[int]:
    """The best `count` of `middle` and the neighbours of the best third; scores `[group, n]`."""
    order = sorted(allowed)
    weight = dict.fromkeys(order, 0.0)
    for row in scores:
        for i, probability in zip(order, row[order].softmax(-1).tolist(), strict=True):
            weight[i] += probability
    ranked = sorted(middle, key=lambda i: (-torch.tensor(weight[i]).float().item(), i))[:count]
    neighbours = {i + r for i in ranked[: count // 3] for r in range(-radius, radius + 1)}
    return (set(ranked) | neighbours) & middle


def low_bit(key: torch.Tensor, kind: str) -> torch.Tensor:
    """A key `[head_dim]` as its low-bit copy has it: one scale, times integers or e4m3 numbers."""
    largest = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}[kind]
    scale = key.float().abs().max() / largest
    if float(scale) == 0.0:
        return torch.zeros_like(key)
    ratio = key.float() / scale
    ratio = ratio.to(torch.float8_e4m3fn).float() if kind == "fp8" else ratio.round()
    return (ratio * scale).to(key.dtype)


def cis_step(
    params: SelectorParams,
    layer: int,
    head: int,
    t: int,
    seen: int,
    allowed: set[int],
    query: torch.Tensor,
    query_pre: torch.Tensor,
    scores: torch.Tensor,
    anchor: Anchor | None,
    scan: torch.Tensor | None = None,
) -> tuple[Step, Anchor | None]:
    """One decode step of one KV head that dense attention lets see `seen` positions.

    query, query_pre `[group, head_dim]`, scores `[group, n]`; scan: scores from the low-bit copy.
    """
    time = params.time
    if time is None:
        return Step(allowed), None
    ratio = float(time.budget_ratio[layer, head])
    sinks = {i for i in allowed if i < params.num_sinks}
    local = {i for i in allowed if t - i < params.num_local}
    middle = allowed - sinks - local
    count = math.floor(ratio * seen) + int(time.budget_tokens[layer, head])
    if ratio >= 1 or count >= len(middle):
        return Step(allowed), None
    gate, fresh = int(time.gate[layer, head]), True
    step = Step(set(), contested=True)
    if anchor is not None and t - anchor.block_start < int(time.block[layer, head]):
        fresh = False
        if gate != Gate.NEVER:
            step.gated = True
            pair = (query, anchor.query) if gate == Gate.POST_ROPE else (query_pre, anchor.query_pre)
            if cosine(*pair) > float(time.tau_cos[layer, head]):
                grown = {i for i in allowed if i > anchor.position - params.num_local}
                step.kept = (anchor.chosen & allowed) | sinks | grown
                return step, anchor
    chosen = retrieve(
        scores if scan is None else scan, allowed, middle, count, int(time.dilation[layer, head])
    )
    step.kept, step.retrieved = chosen | sinks | local, True
    if fresh or time.reanchor:
        anchor = Anchor(query, query_pre, t, t, chosen)
    return step, anchor


@dataclasses.dataclass
class NaiveRun:
    """logits: `[1 + steps, vocabulary]`, after the prompt and after every decode step.

    steps: `[layer][head]` -> one `Step` per decode step. keys: `[layer]` -> `[n, num_kv_heads, head_dim]`.
    """

    logits: torch.Tensor
    steps: list[list[list[Step]]]
    keys: list[torch.Tensor]


class NaiveModel:
    """A decoder of the supported families run row by row; weights and norms are the model's own."""

    def __init__(self, model: transformers.PreTrainedModel, params: SelectorParams) -> None:
        self.model: Any = model
        self.decoder: Any = model.base_model
        self.params = params
        shape = range(params.num_layers), range(params.num_kv_heads)
        self.keys: list[list[torch.Tensor]] = [[] for _ in shape[0]]
        self.values: list[list[torch.Tensor]] = [[] for _ in shape[0]]
        self.anchors: list[list[Anchor | None]] = [[None for _ in shape[1]] for _ in shape[0]]
        self.steps: list[list[list[Step]]] = [[[] for _ in shape[1]] for _ in shape[0]]

    @torch.no_grad()
    def run(self, tokens: list[int], prefill_length: int) -> NaiveRun:
        """Prefill, then every later token as a decode step."""
        self.tables = self.decoder.rotary_emb(
            self.decoder.embed_tokens.weight, torch.arange(len(tokens))[None]
        )
        states = [self.decoder.embed_tokens(torch.tensor(token)) for token in tokens]
        prompt = states[:prefill_length]
        for layer in range(self.params.num_layers):
            prompt = self._prefill_layer(layer, prompt)
        finished = [prompt[-1]]
        for t in range(prefill_length, len(tokens)):
            hidden = states[t]
            for layer in range(self.params.num_layers):
                hidden = self._row(layer, hidden, t, decode=True)
            finished.append(hidden)
        logits = torch.stack([self.model.lm_head(self.decoder.norm(hidden)) for hidden in finished])
        return NaiveRun(logits, self.steps, [torch.stack(rows) for rows in self.keys])

    def _prefill_layer(self, layer: int, states: list[torch.Tensor]) -> list[torch.Tensor]:
        axis, frozen = self.params.layer, 0
        if axis is not None:
            frozen = schedule(
                layer, self.params.num_layers, axis.start_layer, axis.psi, axis.gamma, len(states)
            )
        for t in range(frozen):
            if axis is not None and axis.mode == FreezeMode.PROJECT:
                _, _, key, value = self._project(layer, states[t], t)
            else:
                key, value = self.keys[layer - 1][t], self.values[layer - 1][t]
            self.keys[layer].append(key)
            self.values[layer].append(value)
        rest = [self._row(layer, states[t], t, decode=False) for t in range(frozen, len(states))]
        return states[:frozen] + rest

    def _row(self, layer: int, hidden: torch.Tensor, t: int, decode: bool) -> torch.Tensor:
        """One token through one layer."""
        block, params = self.decoder.layers[layer], self.params
        query, query_pre, key, value = self._project(layer, hidden, t)
        self.keys[layer].append(key)
        self.values[layer].append(value)
        keys, values = torch.stack(self.keys[layer]), torch.stack(self.values[layer])
        window = getattr(block.self_attn, "sliding_window", None) or self._window
        allowed = visible(params, layer, t, window)
        seen = min(t + 1, window or t + 1)
        outputs = []
        for head in range(params.num_kv_heads):
            group = slice(head * params.group_size, (head + 1) * params.group_size)
            scores = query[group] @ keys[:, head].T * block.self_attn.scaling
            kept, scan = allowed, None
            if params.key_copy != "exact":
                copies = torch.stack([low_bit(key, params.key_copy) for key in keys[:, head]])
                scan = query[group] @ copies.T * block.self_attn.scaling
            if decode:
                step, self.anchors[layer][head] = cis_step(
                    params, layer, head, t, seen, allowed, query[group], query_pre[group], scores,
                    self.anchors[layer][head], scan,
                )  # fmt: skip
                self.steps[layer][head].append(step)
                kept = step.kept
            order = sorted(kept)
            outputs += [row[order].softmax(-1) @ values[order, head] for row in scores]
        hidden = hidden + block.self_attn.o_proj(torch.cat(outputs))
        return hidden + block.mlp(block.post_attention_layernorm(hidden))

    @property
    def _window(self) -> int | None:
        # Mistral keeps its window in the config, Qwen per layer in the attention module
        config = self.model.config
        return config.sliding_window if config.model_type == "mistral" else None

    def _project(self, layer: int, hidden: torch.Tensor, t: int) -> tuple[torch.Tensor, ...]:
        """Query after and before RoPE `[num_qo_heads, d]`, key after RoPE and value `[num_kv_heads, d]`."""
        attention = self.decoder.layers[layer].self_attn
        normed = self.decoder.layers[layer].input_layernorm(hidden)
        query, key, value = (
            project(normed).view(-1, self.params.head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if self.model.config.model_type == "qwen3":
            query, key = attention.q_norm(query), attention.k_norm(key)
        return self._rotate(query, t), query, self._rotate(key, t), value

    def _rotate(self, rows: torch.Tensor, t: int) -> torch.Tensor:
        """Turn the pairs (i, i + d/2) of every row by the angle of position t."""
        cos, sin = self.tables[0][0, t], self.tables[1][0, t]
        half = rows.shape[-1] // 2
        result = rows.clone()
        for i in range(half):
            result[:, i] = rows[:, i] * cos[i] - rows[:, i + half] * sin[i]
            result[:, i + half] = rows[:, i + half] * cos[i + half] + rows[:, i] * sin[i + half]
        return result
