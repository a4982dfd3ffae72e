"""What comparison methods choose offline, from prompts of the fit split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from prhs_calibration import corpus
from prhs_calibration.evaluation.open_loop import decode_rows
from prhs_calibration.evaluation.points import BASELINES
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.selectors.baselines import Baseline, DecodeRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prhs_calibration.corpus import Prompt
    from prhs_calibration.models import LoadedModel
    from prhs_kernels.runtime.attention import LayerObservation

NUM_PROMPTS = 4
NUM_STEPS = 16  # of each prompt's decode steps, evenly spaced


def fitted(
    loaded: LoadedModel,
    selectors: Sequence[str],
    *,
    context_length: int,
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> Mapping[str, Baseline]:
    """`BASELINES`, those among `selectors` that need it fitted to the model; the same for the same seed."""
    needing = [name for name in selectors if name in BASELINES and BASELINES[name].needs_fit]
    if not needing:
        return BASELINES
    prompts = corpus.build(
        loaded.tokenizer, count=NUM_PROMPTS, context_length=context_length, seed=seed, split="fit"
    )
    samples = []
    for done, prompt in enumerate(prompts):
        samples.append(sample_layers(loaded.model, prompt))
        if progress is not None:
            progress("fitting methods", done + 1, len(prompts))
    with torch.inference_mode():
        return {**BASELINES, **{name: BASELINES[name].fitted(samples) for name in needing}}


def sample_layers(model: PreTrainedModel, prompt: Prompt) -> list[DecodeRows]:
    """Some decode steps of every layer of the dense model on a prompt."""
    found: list[DecodeRows] = []

    def observe(seen: LayerObservation) -> None:
        rows = decode_rows(seen)
        steps = len(rows.positions)
        some = torch.linspace(0, steps - 1, min(NUM_STEPS, steps)).round().long().to(rows.positions.device)
        start = None if rows.window_start is None else rows.window_start[some]
        found.append(
            dataclasses.replace(
                rows,
                query=rows.query[:, some],
                dense_probs=rows.dense_probs[:, some],
                positions=rows.positions[some],
                window_start=start,
            )
        )

    Scorer(model, prompt.input_ids, prompt.prefill_length).run(dense_params(model.config), observe)
    return found
