"""Decode under one CUDA graph: static buffers, positions and counts on the device, sampling included.

The same step runs without a graph, on a CPU too: with the reference operators, or in triton's interpreter.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from prhs_kernels.errors import UnsupportedModelError, UsageError
from prhs_kernels.ops.backend import Backend, use_triton
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.attach import check_params, check_supported, dense_params
from prhs_kernels.runtime.audit import Audit
from prhs_kernels.runtime.batch_step import BatchStep
from prhs_kernels.runtime.capture import capture
from prhs_kernels.runtime.index_sets import IndexSets
from prhs_kernels.runtime.memory import RunMemory, RunShape
from prhs_kernels.runtime.prefill import prefill
from prhs_kernels.runtime.progress import Progress
from prhs_kernels.runtime.run_audit import AuditCoin
from prhs_kernels.runtime.sampling import Sampling
from prhs_kernels.runtime.static_cache import StaticCache
from prhs_kernels.runtime.stats import DecodeStats
from prhs_kernels.runtime.support import engine_unsupported, sliding_windows

Attention = Literal["sparse", "dense"]
Mode = Literal["audited", "released"]


class DecodeEngine:
    """Prefill a batch, then decode it step by step; a context manager that gives everything back at its end.

    Args:
        model: a supported transformers model; its weights are fused in place (views of one storage).
        params: the selectors; `attention="dense"` runs without any.
        batch_size, max_len: sequences, and cache slots of each: padding, prompt and new tokens.
        prompt_len: slots that `prefill` will be given, for the memory check; 0 where nothing is prefilled.
        use_graph: capture the step into a CUDA graph; default on CUDA. False runs it directly.
        mode: `released` frees what PSAW and sliding windows no longer reach after the prefill.
        sampling, max_new_tokens, stop_token_ids: how tokens are drawn, how many at most, which end a row.
        audit: measure the mass that this share of the units drops, retrievals always (`audit`).

    Raises:
        UnsupportedModelError: the reference loop has to run this (`engine_unsupported`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        params: SelectorParams,
        *,
        batch_size: int,
        max_len: int,
        prompt_len: int = 0,
        backend: Backend = "auto",
        attention: Attention = "sparse",
        use_graph: bool | None = None,
        mode: Mode = "audited",
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        stop_token_ids: tuple[int, ...] = (),
        audit: float | None = None,
        audit_seed: int = 0,
    ) -> None:
        check_supported(model.config)
        check_params(model.config, params)
        params = params if attention == "sparse" else dense_params(model.config)
        probe = torch.empty(0, device=model.device)
        self.backend: Backend = "triton" if use_triton(backend, probe) else "reference"
        reason = engine_unsupported(model, params, self.backend)
        if reason is not None:
            raise UnsupportedModelError(f"the decode engine cannot run this model: {reason}")
        self.model, self.params, self.mode = model, params, mode
        self.batch_size, self.max_len = batch_size, max_len
        self.device, self.dtype = model.device, model.dtype
        self.attention: Attention = attention
        self.use_graph = self.device.type == "cuda" if use_graph is None else use_graph
        if audit is not None and mode == "released":
            raise UsageError("an audit needs mode 'audited': what was released cannot be measured")
        if self.use_graph and self.device.type != "cuda":
            raise UsageError(f"use_graph needs a CUDA device, the model is on {self.device}")
        self.sampling = sampling or Sampling()
        self._draws = max_new_tokens or max_len
        self._stops = stop_token_ids
        self._audit = None if audit is None else (audit, audit_seed)
        self._open = False
        shape = RunShape.of(model.config, params, sliding_windows(model), self.dtype)
        self.memory = RunMemory(shape, batch_size, max_len, prompt_len, self.device)

    @torch.inference_mode()
    def __enter__(self) -> DecodeEngine:
        """Take the memory that does not depend on a prompt.

        Raises:
            ResourceError: the prefill's activations, or cache, index sets and scratch would not fit.
        """
        self.memory.check()
        try:
            with self.memory.explained():
                self._step: Any = self._allocate()
        except BaseException:
            self.__exit__()
            raise
        self._graph: Any = None
        self.length = 0  # slots in use, as the host counts them
        self.released_slots = 0  # of all layers together, since the last prefill
        self._open = True
        return self

    def __exit__(self, *_: object) -> None:
        """Free graph, cache and scratch memory; the model was only patched during `prefill`."""
        self._open = False
        self._graph = self._step = None

    def _allocate(self) -> BatchStep:
        progress = Progress.allocate(self.batch_size, self.sampling, self._draws, self._stops, self.device)
        coin = None
        if self._audit is not None:
            coin = AuditCoin(*self._audit, torch.zeros(1, dtype=torch.long, device=self.device))
        return BatchStep(self.model, self.params, self.max_len, self.backend, progress, coin)

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Run left-padded prompts `[batch, length]` through the model; logits `[batch, vocabulary]`.

        The keys and values then lie in static buffers; decode steps continue from there. The mask is 0 on
        padding and 1 on tokens.

        Raises:
            ResourceError: the memory did not suffice all the same. The engine can be used further.
        """
        self._check_open()
        batch, length = ids.shape
        if batch != self.batch_size or not 0 < length < self.max_len:
            raise UsageError(
                f"prompts {[batch, length]} do not fit batch_size = {self.batch_size}, "
                f"max_len = {self.max_len}"
            )
        ids, mask = ids.to(self.device), mask.to(self.device)
        self._graph, self._step.cache = None, StaticCache()  # what the last prompt left is in the way
        with self.memory.explained():
            logits, cache = prefill(self.model, self.params, ids, mask, self.backend)
            self._restart(length, (mask == 0).sum(dim=-1))
            shift = self._shifts()
            self.dense_bytes = cache.dense_bytes_of(self.max_len)  # with the room that ours has
            taken = StaticCache()
            taken.take(cache, self.max_len, self._step.rule.padding, shift, self.params.num_sinks)
            self._step.rule.shift.copy_(torch.tensor(shift))
            self.released_slots = sum(shift)
            self.sets.copy_keys(taken.keys, [length - moved for moved in shift])
            self._step.cache = taken
        return logits

    @torch.inference_mode()
    def continue_from(self, cache: StaticCache, kv_len: int) -> None:
        """Go on behind a prompt of `kv_len` tokens, one sequence, whose keys and values lie in `cache`.

        Its slots from `kv_len` on are overwritten. Engines that decode one after another can share it.
        """
        self._check_open()
        self._step.cache, self._graph = cache, None
        self._restart(kv_len, torch.zeros(self.batch_size, dtype=torch.long, device=self.device))
        self.sets.copy_keys(cache.keys, [kv_len] * self.params.num_layers)

    @torch.inference_mode()
    def fill_random(self, kv_len: int, seed: int) -> None:
        """Pretend a prompt of `kv_len` tokens: normal random keys and values, a random current token."""
        self._check_open()
        if not 0 < kv_len < self.max_len:
            raise UsageError(f"kv_len = {kv_len} must be in [1, {self.max_len - 1}]")
        generator = torch.Generator(self.device).manual_seed(seed)
        params = self.params
        shape = (self.batch_size, params.num_kv_heads, self.max_len, params.head_dim)
        if not self.cache.keys or self.cache.keys[0].shape != shape:
            self._graph = None
            self.cache.allocate(params.num_layers, shape, self.dtype, self.device)
        for tensor in [*self.cache.keys, *self.cache.values]:
            tensor.normal_(generator=generator)
        self.sets.copy_keys(self.cache.keys, [kv_len] * params.num_layers)
        self._restart(kv_len, torch.zeros(self.batch_size, dtype=torch.long, device=self.device))
        vocabulary = self.model.config.vocab_size
        self._step.progress.token.random_(0, vocabulary, generator=generator)

    def _restart(self, length: int, padding: torch.Tensor) -> None:
        self.length = length
        self._step.restart(length, padding)

    def _shifts(self) -> list[int]:
        """Slots that every layer's released buffer starts later: common to the rows, the least of them."""
        if self.mode != "released":
            return [0] * self.params.num_layers
        begin = self._step.plan().spans[..., 2].amin(dim=1)
        return [max(0, int(first) - self.params.num_sinks) for first in begin.tolist()]

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Decode one token per sequence; gives the next ones `[batch]` int64, in a buffer that is reused.

        Args:
            tokens: `[batch]`, the step's input; None for what the last step drew. Given tokens are part of
                the prompt: they restart the draws, and every sequence counts as unfinished.

        `logits` then holds the predictions `[batch, vocabulary]`, in a buffer that is reused under a graph.
        """
        self._check_open()
        if not self.cache.keys:
            raise UsageError("nothing to continue: call prefill or fill_random first")
        if self.length >= self.max_len:
            raise UsageError(f"the cache of {self.max_len} slots is full")
        if tokens is not None:
            self._step.progress.token.copy_(tokens)
            self._step.progress.restart()
        if self.use_graph:
            if self._graph is None:
                self.capture()
            self._graph.replay()
        else:
            with self.memory.explained():
                self._step.run()
        self.length += 1
        return self._step.progress.token

    @torch.inference_mode()
    def start(self, logits: torch.Tensor) -> torch.Tensor:
        """Draw the first token of every sequence from the logits of the prefill; `[batch]` int64."""
        self._step.progress.draw(logits, self.backend)
        return self._step.progress.token

    @torch.inference_mode()
    def capture(self) -> None:
        """Record the step into a CUDA graph; what the warm-up changed is put back.

        Raises:
            ResourceError: the memory did not suffice for the step's tensors.
        """
        self._check_open()
        with self.memory.explained():
            self._graph = capture(self._step.run, self._step.changing(), self.device)

    @torch.inference_mode()
    def stats(self) -> DecodeStats:
        """What the steps so far read and kept; waits for the device."""
        return self._step.counter.read()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def audit(self) -> Audit | None:
        """The mass dropped so far, if that was asked for; waits for the device.

        Layers without sets and window drop nothing: their units are exact.
        """
        return self._step.audit()

    @property
    def cache(self) -> StaticCache:
        """Keys and values of all layers."""
        return self._step.cache

    @property
    def sets(self) -> IndexSets:
        """What the layers attend to."""
        return self._step.sets

    @property
    def logits(self) -> torch.Tensor:
        """`[batch, vocabulary]` of the last step, in a buffer that is reused under a graph."""
        if self._step.logits is None:
            raise UsageError("no step has been decoded yet")
        return self._step.logits

    @property
    def tokens(self) -> torch.Tensor:
        """`[batch]` int64 on the device: the tokens drawn last, input of the next step."""
        return self._step.progress.token

    @property
    def alive(self) -> torch.Tensor:
        """`[batch]` bool on the device: sequences that have not drawn a stop token."""
        return self._step.progress.alive

    @property
    def resident_bytes(self) -> int:
        """Bytes of the buffers that hold keys, values and key copies, room for tokens to come included."""
        return int(self.cache.resident_bytes + self.sets.copy_bytes)

    def _check_open(self) -> None:
        if not self._open:
            raise UsageError("the decode engine works inside its with block only")
