"""Posterior bias: how much more mass a selector drops than the oracle at equal size, and where it misses.

Words and definitions: docs/notation.md. All selectors see the same decode rows of the dense model (open loop)
on held-out prompts and spend the same measured budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from prhs_calibration.evaluation.comparison import BUDGETS, Progress, Settings, compare
from prhs_calibration.evaluation.points import DEFAULTS
from prhs_kernels.errors import UsageError

if TYPE_CHECKING:
    from prhs_calibration.bundle import Bundle
    from prhs_calibration.corpus import Prompt
    from prhs_calibration.models import LoadedModel
    from prhs_kernels.runtime.attention import LayerObservation

KIND = "posterior-bias"


def analyze(
    loaded: LoadedModel,
    bundle: Bundle,
    *,
    selectors: Sequence[str] = DEFAULTS,
    budgets: Sequence[float] = BUDGETS,
    num_prompts: int = 16,
    context_length: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    published: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare selectors on held-out prompts; returns the `data` of a posterior-bias result file.

    Args:
        budgets: attended fractions (kept / visible positions), the same for every selector.
        num_prompts: prompts of the verify split; intervals are over prompts, so at least 2 for any.
        context_length: tokens per prompt, decode steps included; the model's own when None.
        confidence: of the Student t intervals.
        published: also every comparison method at the budgets of its publication.
        progress: called as `progress(stage, done, total)`.

    Raises:
        UsageError: unknown selector, or a budget outside (0, 1). InputError: the bundle is another model's.
    """
    from prhs_calibration import corpus
    from prhs_calibration.evaluation.fitting import fitted
    from prhs_kernels.runtime.attach import dense_params
    from prhs_kernels.runtime.scoring import Scorer

    settings = Settings(tuple(selectors), tuple(budgets), confidence=confidence, published=published)
    if num_prompts < 1:
        raise UsageError(f"{num_prompts} prompts: at least 1 is needed")
    bundle.check_model(loaded.fingerprint)
    length = loaded.prompt_length(context_length)
    prompts = corpus.build(
        loaded.tokenizer, count=num_prompts, context_length=length, seed=seed, split="verify", sources=None
    )
    dense = dense_params(loaded.model.config)
    methods = fitted(loaded, settings.selectors, context_length=length, seed=seed, progress=progress)
    keep_queries = any(methods[name].reads_prompt for name in settings.selectors if name in methods)

    def replay(prompt: Prompt, observer: Callable[[LayerObservation], None]) -> None:
        ids, prefill = prompt.input_ids, prompt.prefill_length
        Scorer(loaded.model, ids, prefill, keep_queries=keep_queries).run(dense, observer)

    lowest = float(bundle.tensors["time/lambda"][0])
    result = compare(prompts, replay, bundle.params_at, lowest, settings, methods=methods, progress=progress)
    return result | {"model": loaded.model_id, "seed": seed, "context_length": length}
