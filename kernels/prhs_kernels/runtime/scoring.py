"""Layer-parallel scoring: a run of given tokens, each of them a decode step, layer by layer.

Token t at layer l depends only on earlier layers and earlier tokens, so walking the selectors over all steps
of a layer before going to the next gives exactly what step-by-step decoding gives (a test holds us to it).
A run that nobody observes can be stepped by the decode engine instead, with the kernels that a user decodes
with.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.backend import Backend, use_triton
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.attach import check_params, check_selector, dense_params, sparse_attention
from prhs_kernels.runtime.attention import LayerObservation, Observer
from prhs_kernels.runtime.cache import PrhsCache
from prhs_kernels.runtime.distributed import num_ranks
from prhs_kernels.runtime.engine import DecodeEngine
from prhs_kernels.runtime.static_cache import StaticCache
from prhs_kernels.runtime.stats import DecodeStats
from prhs_kernels.runtime.support import engine_unsupported
from prhs_kernels.selectors.base import StepSelector

MAX_STEPS = 512  # decode steps that go through a layer together; bounds the memory for scores


@dataclasses.dataclass(frozen=True)
class ScoringResult:
    """One pass over a prompt's decode steps.

    logits: `[steps, vocabulary]`, the prediction after each step. stats: what was read and kept.
    prefill_dropped: layer -> `[num_qo_heads]`, loss of sampled prompt rows; layers without one are absent.
    backend: what chose and attended, `reference` or `triton`.
    """

    logits: torch.Tensor
    stats: DecodeStats
    prefill_dropped: dict[int, torch.Tensor]
    backend: str = "reference"


class Scorer:
    """Teacher-forced closed-loop passes of one model over one prompt.

    `tokens[:prefill_length]` are the prompt, every later token is a decode step. Runs that differ in the time
    axis only share one prefill; use `prepared` to keep it between them. Comparison selectors that look at the
    prompt's attention need `keep_queries`. `backend="triton"` steps runs without observer and comparison
    selector through the decode engine, where it can run them; `auto` does so on CUDA.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: list[int],
        prefill_length: int,
        *,
        keep_queries: bool = False,
        backend: Backend = "reference",
    ) -> None:
        if num_ranks(model) > 1:
            raise UsageError("a scoring pass needs all heads in one process; run it without torchrun")
        if not 0 < prefill_length < len(tokens):
            raise UsageError(f"prefill_length = {prefill_length} must be in [1, {len(tokens) - 1}]")
        self.model = model
        self.tokens = torch.tensor([tokens], device=model.device)
        self.prefill_length = prefill_length
        self.keep_queries = keep_queries
        self.backend: Backend = "triton" if use_triton(backend, self.tokens) else "reference"
        self._observer: Observer | None = None

    @contextlib.contextmanager
    def prepared(self, params: SelectorParams) -> Iterator[PreparedScorer]:
        """Prefill once with the depth and layer axes of `params`; then run any time axis on top of it."""
        unfrozen: dict[int, torch.Tensor] = {}
        with torch.inference_mode():
            if params.layer is not None:
                unfrozen = self._dense_keys(params)
            with sparse_attention(self.model, params, self._notify, keep_queries=self.keep_queries) as cache:
                cache.unfrozen_keys = unfrozen
                self.model(
                    input_ids=self.tokens[:, : self.prefill_length], past_key_values=cache, logits_to_keep=1
                )
                yield PreparedScorer(self, cache)

    def run(
        self,
        params: SelectorParams,
        observer: Observer | None = None,
        selector: StepSelector | None = None,
    ) -> ScoringResult:
        """One pass: prefill, then all decode steps; `observer` gets one `LayerObservation` per layer."""
        with self.prepared(params) as prepared:
            return prepared.run(params, observer, selector)

    def _dense_keys(self, params: SelectorParams) -> dict[int, torch.Tensor]:
        """Frozen positions' keys as a dense prefill computes them, for the layers that freeze."""
        # with an observer the cache keeps what a sliding window would drop
        with sparse_attention(self.model, dense_params(self.model.config), self._notify) as cache:
            self.model(
                input_ids=self.tokens[:, : self.prefill_length], past_key_values=cache, logits_to_keep=1
            )
            return {
                layer: cache.keys_and_values(layer)[0][:, :, :frozen].clone()
                for layer in range(params.num_layers)
                if (frozen := params.frozen_prefix(layer, self.prefill_length))
            }

    def _notify(self, observation: LayerObservation) -> None:
        if self._observer is not None:
            self._observer(observation)


class PreparedScorer:
    """A prefilled `Scorer`: runs that differ in the time axis only start from the same cache."""

    def __init__(self, scorer: Scorer, cache: PrhsCache) -> None:
        self._scorer, self._cache = scorer, cache
        self._static: StaticCache | None = None

    def run(
        self,
        params: SelectorParams,
        observer: Observer | None = None,
        selector: StepSelector | None = None,
    ) -> ScoringResult:
        """Decode all steps after the prefill with the time axis of `params`, or with another method.

        Args:
            selector: chooses every step's sets in closed loop; `params` have every axis off.
        """
        scorer, cache = self._scorer, self._cache
        check_params(scorer.model.config, params)
        check_selector(params, selector)
        if _prefill_settings(params) != _prefill_settings(cache.params):
            raise UsageError("depth and layer parameters differ from those of the prefill; prepare again")
        on_engine = observer is None and selector is None and scorer.backend == "triton"
        if on_engine and engine_unsupported(scorer.model, params, "triton") is None:
            return self.run_on_engine(params, "triton")
        cache.rewind(scorer.prefill_length)
        cache.params, cache.treat_as_decode, scorer._observer = params, True, observer
        cache.selector = selector
        try:
            steps = scorer.tokens[:, scorer.prefill_length :]
            # an observer gets every layer once
            parts = steps.split(MAX_STEPS if observer is None else steps.shape[1], dim=1)
            logits = torch.cat(
                [scorer.model(input_ids=part, past_key_values=cache).logits for part in parts], dim=1
            )
        finally:
            cache.treat_as_decode, scorer._observer = False, None
        return ScoringResult(logits[0], cache.stats, dict(cache.prefill_dropped))

    def run_on_engine(self, params: SelectorParams, backend: Backend) -> ScoringResult:
        """The same, one step at a time on the decode engine, with its operators of this backend."""
        scorer, cache = self._scorer, self._cache
        cache.rewind(scorer.prefill_length)
        slots = scorer.tokens.shape[1]
        if self._static is None:
            self._static = StaticCache.copy_of(cache, slots)
        with DecodeEngine(scorer.model, params, batch_size=1, max_len=slots, backend=backend) as engine:
            engine.continue_from(self._static, scorer.prefill_length)
            logits = []
            for column in scorer.tokens[:, scorer.prefill_length :].unbind(dim=1):
                engine.step(column)
                logits.append(engine.logits.clone())
            return ScoringResult(
                torch.cat(logits), engine.stats(), dict(cache.prefill_dropped), str(engine.backend)
            )


def _prefill_settings(params: SelectorParams) -> tuple[object, ...]:
    """What of the parameters a prefill depends on."""
    window = None if params.depth is None else (params.depth, params.num_sinks, params.num_local)
    return window, params.layer
