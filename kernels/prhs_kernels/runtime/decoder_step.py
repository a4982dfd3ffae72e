"""One decode step through a transformers decoder on our operators: fixed shapes, nothing read by the host.

The step uses the model's weights, not its modules: it adds to the residual stream and normalises in one
kernel, and multiplies by fused projections. `unsupported` says for which models that would not be the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel

from prhs_kernels.ops.backend import Backend
from prhs_kernels.ops.retrieve.state import GateInputs
from prhs_kernels.ops.rms_norm.api import StartedNorm, rms_norm, start_norm
from prhs_kernels.ops.rope_append.api import rope_append
from prhs_kernels.ops.silu_mul.api import silu_mul
from prhs_kernels.ops.skinny_linear import api as skinny
from prhs_kernels.ops.step_plan.api import StepPlan
from prhs_kernels.runtime.attach import OwnHook

Pair = tuple[torch.Tensor, torch.Tensor | None]  # weight and bias of a projection
Rows = torch.Tensor | StartedNorm  # what a projection multiplies
# layer, query after and before RoPE, new key, plan -> output `[batch, num_qo_heads, 1, head_dim]`
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, StepPlan], torch.Tensor]
Gate = Callable[[int, StepPlan], GateInputs | None]  # of a layer, where the rotation decides who retrieves

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
SYNCING_ROPE = ("dynamic", "longrope")  # frequencies that change with the length of the sequence


def unsupported(model: PreTrainedModel) -> str | None:
    """Why this model has to run through its own modules, or None if the step computes the same."""
    config: Any = model.config
    decoder: Any = model.base_model
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if any(name in rope_type for name in SYNCING_ROPE):
        return f"rotary embedding of type '{rope_type}' depends on the length of the sequence"
    if config.hidden_act not in ("silu", "swish"):
        return f"activation '{config.hidden_act}' has no fused operator"
    modules: list[tuple[str, Any]] = [("lm_head", getattr(model, "lm_head", None))]
    for index, layer in enumerate(decoder.layers):
        modules += [(f"layer {index} {name}", getattr(layer.self_attn, name)) for name in PROJECTIONS]
        modules += [(f"layer {index} {name}", getattr(layer.mlp, name)) for name in MLP]
    for name, module in modules:
        # a subclass may quantise, adapt or shard; the step would pass it by
        if type(module) is not torch.nn.Linear or type(module.weight) is not torch.nn.Parameter:
            return f"{name} is not a plain linear projection"
    hooked = [module for module in model.modules() if any(_foreign_hooks(module))]
    if hooked:
        return f"a forward hook on {type(hooked[0]).__name__} would not be called"
    places = {parameter.device for parameter in model.parameters()}
    if len(places) > 1:
        return f"its weights lie on {len(places)} devices"
    return None


def _foreign_hooks(module: torch.nn.Module) -> Iterator[object]:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return (hook for hook in hooks if not isinstance(hook, OwnHook))


@dataclasses.dataclass(frozen=True, eq=False)
class LayerWeights:
    """What a decoder layer multiplies with; projections that read the same input are one."""

    input_norm: torch.Tensor
    qkv: Pair
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Pair
    post_norm: torch.Tensor
    gate_up: Pair
    down: Pair
    eps: float
    scale: float

    @classmethod
    def of(cls, layer: Any) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        norms = [getattr(getattr(attention, name, None), "weight", None) for name in ("q_norm", "k_norm")]
        return cls(
            input_norm=layer.input_layernorm.weight,
            qkv=fuse([attention.q_proj, attention.k_proj, attention.v_proj]),
            q_norm=norms[0],
            k_norm=norms[1],
            o=(attention.o_proj.weight, attention.o_proj.bias),
            post_norm=layer.post_attention_layernorm.weight,
            gate_up=fuse([mlp.gate_proj, mlp.up_proj]),
            down=(mlp.down_proj.weight, mlp.down_proj.bias),
            eps=layer.input_layernorm.variance_epsilon,
            scale=attention.scaling,
        )


def fuse(projections: list[torch.nn.Linear]) -> Pair:
    """One weight for projections of the same input, of which theirs become views: no memory is added.

    Values, shapes and the parameters themselves stay what they were; a second call finds them fused.
    """
    weights: list[torch.Tensor] = [module.weight for module in projections]
    # tensors made in inference mode would make the parameters unfit for training
    with torch.inference_mode(weights[0].is_inference()), torch.no_grad():
        if not _adjacent(weights):
            whole = torch.cat([weight.detach() for weight in weights])
            parts = whole.split([weight.shape[0] for weight in weights])
            for weight, part in zip(weights, parts, strict=True):
                weight.data = part
        first = weights[0].detach()
        rows = sum(weight.shape[0] for weight in weights)
        fused = first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
        biases = [module.bias.detach() for module in projections if module.bias is not None]
        return fused, torch.cat(biases) if biases else None


def _adjacent(weights: list[torch.Tensor]) -> bool:
    """Whether the weights follow each other in one storage."""
    storage, place = weights[0].untyped_storage().data_ptr(), weights[0].data_ptr()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != storage or weight.data_ptr() != place:
            return False
        if not weight.is_contiguous():
            return False
        place += weight.nbytes
    return True


class DecoderStep:
    """`[batch]` token ids to `[batch, vocabulary]` logits, with attention over `keys` and `values`.

    keys, values: one `[batch, num_kv_heads, n, head_dim]` per layer; the step appends to them.
    """

    def __init__(self, model: PreTrainedModel, max_positions: int, backend: Backend) -> None:
        decoder: Any = model.base_model
        head: Any = model.lm_head  # type: ignore[attr-defined]
        self.embedding: torch.Tensor = decoder.embed_tokens.weight.detach()
        self.layers = [LayerWeights.of(layer) for layer in decoder.layers]
        self.norm: torch.Tensor = decoder.norm.weight
        self.eps: float = decoder.norm.variance_epsilon
        self.head: Pair = (head.weight.detach(), head.bias)
        self.rotary = rotary_table(model, max_positions)
        self.backend: Backend = backend

    def __call__(
        self, tokens: torch.Tensor, plan: StepPlan, keys: list[torch.Tensor], values: list[torch.Tensor],
        attend: Attend, gate: Gate,
    ) -> torch.Tensor:  # fmt: skip
        out, residual = self.embedding[tokens], None
        cos, sin = self.rotary[plan.positions].unbind(dim=1)
        for index, layer in enumerate(self.layers):
            normed, residual = self._norm(out, layer.input_norm, layer.eps, residual, layer.qkv)
            query, query_pre, key = rope_append(
                self._project(normed, layer.qkv),
                keys[index],
                values[index],
                cos=cos,
                sin=sin,
                slots=plan.slots[index],
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=layer.eps,
                gate=gate(index, plan),
                backend=self.backend,
            )
            out = self._project(attend(index, query, query_pre, key, plan).flatten(1), layer.o)
            normed, residual = self._norm(out, layer.post_norm, layer.eps, residual, layer.gate_up)
            out = self._project(self._activate(normed, layer.gate_up), layer.down)
        normed, _ = rms_norm(out, self.norm, self.eps, residual=residual, backend=self.backend)
        return linear(normed, *self.head)

    def _norm(
        self, out: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, pair: Pair
    ) -> tuple[Rows, torch.Tensor]:
        """Add to the residual stream and normalise it for a projection; that may have to finish it."""
        if residual is not None and self._skinny(residual, pair):
            return start_norm(out, weight, eps, residual=residual, backend=self.backend)
        return rms_norm(out, weight, eps, residual=residual, backend=self.backend)

    def _skinny(self, rows: torch.Tensor, pair: Pair) -> bool:
        return self.backend == "triton" and skinny.fits(rows.shape[0], pair[0])

    def _project(self, rows: Rows, pair: Pair) -> torch.Tensor:
        """A projection, or its partial sums; the kernel that comes next takes both."""
        if isinstance(rows, StartedNorm) or self._skinny(rows, pair):
            return skinny.linear_parts(rows, *pair, backend=self.backend)
        return linear(rows, *pair)

    def _activate(self, rows: Rows, pair: Pair) -> torch.Tensor:
        if isinstance(rows, StartedNorm) or self._skinny(rows, pair):
            return skinny.gated_linear(rows, *pair, backend=self.backend)
        return silu_mul(linear(rows, *pair), backend=self.backend)


def rotary_table(model: PreTrainedModel, max_positions: int) -> torch.Tensor:
    """cos and sin of every position, `[max_positions, 2, head_dim / 2]`, in the model's dtype."""
    rotary: Any = model.base_model.rotary_emb  # type: ignore[union-attr]
    like = torch.empty(1, 1, dtype=model.dtype, device=model.device)
    positions = torch.arange(max_positions, device=model.device)[None]
    return torch.stack([table[0, :, : table.shape[-1] // 2] for table in rotary(like, positions)], dim=1)
