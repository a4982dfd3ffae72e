"""Generation: prefill once, then one token at a time through a sparse cache, streaming."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from prhs_kernels.errors import UnsupportedModelError, UsageError
from prhs_kernels.ops.backend import Backend, use_triton
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.auditing import Auditor, affordable_share
from prhs_kernels.runtime.distributed import launched
from prhs_kernels.runtime.engine import Mode
from prhs_kernels.runtime.floor import memory_bandwidth, step_floor
from prhs_kernels.runtime.generation import AUDIT_SEED, Generation, Request, left_pad
from prhs_kernels.runtime.loops import engine_loop, reference_loop
from prhs_kernels.runtime.sampling import Sampling
from prhs_kernels.runtime.support import engine_unsupported, sliding_windows
from prhs_kernels.selectors.base import StepSelector

__all__ = ["Generation", "generate_tokens", "left_pad"]


def generate_tokens(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    params: SelectorParams,
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | None = None,
    stop_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    run: Generation | None = None,
    selector: StepSelector | None = None,
    prompt_steps: int = 0,
    backend: Backend = "auto",
    mode: Mode = "audited",
    dense_fallback: bool = False,
    audit: float | Literal["auto"] | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, one decode step at a time.

    Args:
        prompts: token ids of each sequence; different lengths are padded on the left.
        params: the selectors; `dense_params(model.config)` for dense attention.
        max_new_tokens: of every sequence, or of each.
        stop_token_ids: a sequence that produced one of them, or its last token, yields None from then on, and
            no longer counts.
        run: filled with counts and times while the iterator is consumed.
        selector: another method in the place of the axes of `params`, for a single prompt.
        prompt_steps: that many last tokens of every prompt are fed as decode steps, one at a time, so that
            the first new token too comes from one.
        backend: `auto` takes the decode engine with its kernels on CUDA where it can run this, the reference
            loop elsewhere; what ran, and why not the engine, is in `run`.
        mode: `released` frees what the windows no longer reach; by the engine, on any device.
        dense_fallback: let the engine attend to everything where shapes say that sparse attention cannot gain
            (`runtime.floor`); noted in `run`. Not for measuring a selector.
        audit: measure the mass that this share of the units drops, retrievals always; in mode `audited`.
            `auto` is a share that costs little (`affordable_share`). The counts are in `run.audit`.

    Raises:
        UnsupportedModelError, InputError, UsageError: see `sparse_attention`.
        ResourceError: `backend="triton"` where triton cannot run; not enough memory.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != len(prompts) or min(limits, default=1) < 1:
        raise UsageError(f"max_new_tokens = {max_new_tokens} must be at least 1, for all or for each prompt")
    if prompt_steps and not 0 < prompt_steps < min(map(len, prompts), default=0):
        raise UsageError(f"prompt_steps = {prompt_steps} must leave every prompt a token to prefill")
    if selector is not None and (backend == "triton" or mode == "released"):
        raise UsageError("a comparison selector runs on the reference, and releases nothing")
    if audit is not None and (selector is not None or mode == "released"):
        raise UsageError("an audit needs our own selectors and mode 'audited'")
    if audit == "auto":
        audit = affordable_share(len(prompts) * params.num_kv_heads)
    ids, mask = (tensor.to(model.device) for tensor in left_pad(prompts, pad_token_id))
    run = run if run is not None else Generation()
    run.mode = mode
    sampling = sampling or Sampling()
    if sampling.streams and len(sampling.streams) != len(prompts):
        raise UsageError(f"{len(sampling.streams)} streams to sample from for {len(prompts)} prompts")
    auditor = None if audit is None else Auditor(audit, seed=AUDIT_SEED + launched().rank)
    request = Request(
        model,
        params,
        ids,
        mask,
        prompt_steps,
        torch.tensor(limits),
        sampling,
        tuple(stop_token_ids),
        run,
        auditor,
    )
    run.attention = "dense" if params.is_dense else "sparse"
    if selector is None and _wants_engine(request, backend):
        if dense_fallback and not params.is_dense:
            _fall_back(request)
        return engine_loop(request, backend)
    return reference_loop(request, selector)


def _wants_engine(request: Request, backend: Backend) -> bool:
    """Whether the engine runs this; if it was expected to and cannot, the run gets a note."""
    model, params = request.model, request.params
    triton = use_triton(backend, request.ids)
    if not triton and request.run.mode == "audited":
        return False
    reason = engine_unsupported(model, params, "triton" if triton else "reference")
    if reason is not None and request.run.mode == "released":
        raise UnsupportedModelError(
            f"mode 'released' needs the decode engine, which cannot run this model: {reason}; use 'audited'"
        )
    if reason is None or backend == "triton":
        return True  # the engine itself refuses what was asked for by name
    request.run.notes.append(f"decoding without the engine: {reason}")
    return False


def _fall_back(request: Request) -> None:
    """Attend to everything if nothing is to be gained, and say so."""
    model, (batch, length) = request.model, request.ids.shape
    kv_len = length + request.max_new_tokens
    floor = step_floor(
        request.params,
        batch=batch,
        kv_len=kv_len,
        itemsize=model.dtype.itemsize,
        windows=sliding_windows(model),
        bandwidth=memory_bandwidth(model.device),
    )
    if floor.gains:
        return
    request.run.attention = "dense"
    request.run.notes.append(
        f"dense attention: at batch {batch} and {kv_len} positions it is expected to take "
        f"{1e6 * floor.dense:.0f} µs a step, sparse attention {1e6 * floor.sparse:.0f} µs"
    )
