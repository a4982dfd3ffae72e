"""The training forward of a Llama model in few kernels: per-token stages on flat tokens, then attention.

All stages but attention see `[tokens, hidden]`, whatever the sequence length, so that they are compiled once
for a whole length curriculum. The weights stay those of the transformers model.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Tap = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]


def _norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[tokens, heads, head_dim]`, first half against second half."""
    half = x.shape[-1] // 2
    x = x.float()
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def _project(
    x: Tensor,
    gain: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    dt: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(query, key, value), each `[tokens, heads, head_dim]` of type `dt`, query and key rotated."""
    tokens, dim = x.shape[0], cos.shape[-1]
    h = _norm(x, gain, eps).to(dt)
    query, key, value = ((h @ w.to(dt).t()).view(tokens, -1, dim) for w in (wq, wk, wv))
    return _rotate(query, cos, sin).to(dt), _rotate(key, cos, sin).to(dt), value


def _finish(
    x: Tensor, attended: Tensor, wo: Tensor, gain: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """Residual stream after the output projection and the MLP."""
    dt = attended.dtype
    x = x + attended @ wo.to(dt).t()
    h = _norm(x, gain, eps).to(dt)
    return x + (functional.silu(h @ gate.to(dt).t()) * (h @ up.to(dt).t())) @ down.to(dt).t()


def _nats(x: Tensor, gain: Tensor, table: Tensor, targets: Tensor, eps: float, dt: torch.dtype) -> Tensor:
    """Cross-entropy of every row against its target, fp32."""
    logits = (_norm(x, gain, eps).to(dt) @ table.to(dt).t()).float()
    return torch.logsumexp(logits, dim=-1) - logits.gather(1, targets[:, None]).squeeze(1)


class FusedLlama:
    """Forward passes of `model` for training and measuring; `compiled` uses torch.compile for the stages."""

    def __init__(self, model: "LlamaForCausalLM", *, dtype: torch.dtype, compiled: bool = False) -> None:
        self.model, self.dtype = model, dtype
        self.compiled = compiled
        self.backends: list[SDPBackend] = []  # of attention, in order of preference; empty: PyTorch's choice
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._project: Any = _project
        self._finish: Any = _finish
        self._nats: Any = _nats
        if compiled:
            self._project, self._finish, self._nats = (
                torch.compile(stage, dynamic=False) for stage in (_project, _finish, _nats)
            )

    def hidden(self, ids: Tensor, tap: Tap | None = None) -> Tensor:
        """Residual stream `[B * T, hidden]` after the last layer for ids `[B, T]`.

        `tap(layer, query, key, value, x)` sees each layer's post-RoPE query `[B, Hq, T, d]`, key and value
        `[B, Hkv, T, d]` and its input x `[B * T, hidden]`.
        """
        with sdpa_kernel(self.backends, set_priority=True) if self.backends else nullcontext():
            return self._hidden(ids, tap)

    def _hidden(self, ids: Tensor, tap: Tap | None) -> Tensor:
        inner: Any = self.model.model
        batch, length = ids.shape
        cos, sin = self._rope(batch, length, ids.device)
        eps = float(self.model.config.rms_norm_eps)
        x = functional.embedding(ids.flatten(), inner.embed_tokens.weight)
        for index, layer in enumerate(inner.layers):
            attention, mlp = layer.self_attn, layer.mlp
            flat = self._project(
                x,
                layer.input_layernorm.weight,
                attention.q_proj.weight,
                attention.k_proj.weight,
                attention.v_proj.weight,
                cos,
                sin,
                eps,
                self.dtype,
            )
            query, key, value = (t.view(batch, length, *t.shape[1:]).transpose(1, 2) for t in flat)
            if tap:
                tap(index, query, key, value, x)
            attended = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )
            attended = attended.transpose(1, 2).reshape(batch * length, -1)
            x = self._finish(
                x,
                attended,
                attention.o_proj.weight,
                layer.post_attention_layernorm.weight,
                mlp.gate_proj.weight,
                mlp.up_proj.weight,
                mlp.down_proj.weight,
                eps,
            )
        return x

    def nats(self, ids: Tensor, tap: Tap | None = None) -> Tensor:
        """Cross-entropy `[B, T]` of token t given those before it; column 0 is 0."""
        batch, length = ids.shape
        inner: Any = self.model.model
        targets = ids.roll(-1, dims=1).flatten()
        x = self.hidden(ids, tap)
        flat = self._nats(
            x,
            inner.norm.weight,
            inner.embed_tokens.weight,
            targets,
            float(self.model.config.rms_norm_eps),
            self.dtype,
        )
        return functional.pad(flat.view(batch, length)[:, :-1], (1, 0))

    def logits(self, x: Tensor) -> Tensor:
        """fp32 logits of rows of the residual stream."""
        inner: Any = self.model.model
        h = _norm(x, inner.norm.weight, float(self.model.config.rms_norm_eps)).to(self.dtype)
        return (h @ inner.embed_tokens.weight.to(self.dtype).t()).float()

    def _rope(self, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if (batch, length) not in self._tables:
            rotary: Any = self.model.model.rotary_emb
            angles = (
                torch.arange(length, device=device).float()[:, None]
                * rotary.inv_freq.to(device).float()[None]
            )
            angles = torch.cat((angles, angles), dim=-1).repeat(batch, 1)
            if len(self._tables) > 8:
                self._tables.clear()
            self._tables[batch, length] = (angles.cos(), angles.sin())
        return self._tables[batch, length]


def fastest_backends(shape: tuple[int, int, int, int, int], device: str) -> list[SDPBackend]:
    """Attention backends by measured time for (batch, query heads, KV heads, length, head_dim).

    Forward and backward, bf16, causal; a backend that cannot run the shape is left out. Empty on a CPU.
    """
    if not device.startswith("cuda"):
        return []
    batch, query_heads, kv_heads, length, dim = shape
    sizes = ((batch, length, heads, dim) for heads in (query_heads, kv_heads, kv_heads))
    q, k, v = (
        torch.randn(size, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for size in sizes
    )
    times: dict[SDPBackend, float] = {}
    expected: list[Tensor] = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            times[backend], found = _timed_attention(backend, q, k, v)
        except RuntimeError as error:
            print(f"{backend.name} cannot run: {str(error)[:200]}", flush=True)
            continue
        expected = expected or found
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
        print(f"{backend.name}: {1000 * times[backend]:.2f} ms, difference {max(errors):.1e}", flush=True)
        if not max(errors) < 0.02:
            del times[backend]
    return sorted(times, key=lambda backend: times[backend])


def _timed_attention(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> tuple[float, list[Tensor]]:
    """(seconds of a forward and backward, output and gradients)."""
    with sdpa_kernel(backend):
        for repeat in range(6):
            if repeat == 3:
                torch.cuda.synchronize()
                started = time.monotonic()
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            gradients = torch.autograd.grad(out, (q, k, v), out.detach())
        torch.cuda.synchronize()
    return (time.monotonic() - started) / 3, [t.detach().float() for t in (out, *gradients)]
