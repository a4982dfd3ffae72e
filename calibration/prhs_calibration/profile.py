"""Model + prompts -> observations: open-loop rows for the fit, closed-loop losses for the promise.

Memory stays linear in the context: only the decode rows of one layer exist at a time, the prefill keeps no
scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedModel

from prhs_calibration.corpus import Prompt
from prhs_calibration.statistics import worst_steps
from prhs_kernels.errors import InputError
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime import distributed
from prhs_kernels.runtime.attention import LayerObservation
from prhs_kernels.runtime.scoring import Scorer

DECODE_STEPS = 64  # scored at the end of every prompt
Progress = Callable[[str, int, int], None]


class LossMeter:
    """Dropped mass of one scoring pass, per layer and query head.

    `loss` `[L, Hq]`: mean over the decode steps of the total variation between dense and sparse attention,
    which is the dropped mass where the sparse rows are a truncation, and covers replaced keys where a prefix
    was frozen. `tail` `[L, Hq]`: the same over the worst steps of each head.
    """

    def __init__(self, num_layers: int, num_qo_heads: int) -> None:
        self.loss, self.tail = np.zeros((2, num_layers, num_qo_heads))
        self.reused = False

    def __call__(self, rows: LayerObservation) -> None:
        gap = (rows.dense_probs - rows.sparse_probs).clamp(min=0).sum(-1).double().cpu().numpy()
        self.loss[rows.layer], self.tail[rows.layer] = gap.mean(-1), worst_steps(gap)
        self.reused |= bool((rows.contested & ~rows.retrieved).any())


def observe(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    params: SelectorParams,
    observers: Sequence[Callable[[LayerObservation], None]],
    report: Callable[[int, int], None],
) -> None:
    """Show every decode row of every prompt, under `params`, to all observers."""

    def show(rows: LayerObservation) -> None:
        for observer in observers:
            observer(rows)

    for done, prompt in enumerate(prompts):
        report(done, len(prompts))
        Scorer(model, prompt.input_ids, prompt.prefill_length).run(params, show)
    report(len(prompts), len(prompts))


def closed_loop_losses(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    settings: Sequence[SelectorParams],
    report: Callable[[int, int], None],
) -> np.ndarray:
    """Closed-loop loss of every prompt under every setting: `[prompts, settings]` float64."""
    return closed_loop(model, prompts, settings, report)[0]


def closed_loop(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    settings: Sequence[SelectorParams],
    report: Callable[[int, int], None],
) -> np.ndarray:
    """Loss and tail of every prompt under every setting, closed loop: `[2, prompts, settings]` float64.

    The loss is the mean dropped mass over steps, layers and heads, the tail that of each head's worst steps.
    Settings that agree in depth and layer axes share the prompt's prefill. A setting with every axis off is
    dense attention, whose loss is 0 by definition and is not run. Under torchrun the ranks share the prompts,
    and each gets all losses: a prompt's do not depend on the rank that measured them.

    Raises:
        InputError: time axes were on, some could have shared, and no step of any prompt reused a set.
    """
    sparse = [(column, params) for column, params in enumerate(settings) if not params.is_dense]
    may_reuse = any(_can_share(params) for _, params in sparse)
    mine: list[tuple[np.ndarray, bool]] = []
    for row in distributed.share(len(prompts)):
        report(row, len(prompts))
        mine.append(_closed_loop_of(model, prompts[row], sparse, len(settings)))
    report(len(prompts), len(prompts))
    losses, reused = zip(*distributed.combined(mine), strict=True)
    if may_reuse and not any(reused):
        raise InputError(
            "no decode step reused a set, so sharing was not tested; use longer prompts, or leave the time "
            "axis out (--axes depth,layer)"
        )
    return np.stack(losses, axis=1)


def _closed_loop_of(
    model: PreTrainedModel, prompt: Prompt, sparse: list[tuple[int, SelectorParams]], num_settings: int
) -> tuple[np.ndarray, bool]:
    """Loss and tail of one prompt, `[2, settings]`, and whether any step reused a set."""
    losses, reused = np.zeros((2, num_settings)), False
    scorer = Scorer(model, prompt.input_ids, prompt.prefill_length)
    for group in _by_prefill(sparse):
        with scorer.prepared(group[0][1]) as prepared:
            for column, params in group:
                meter = LossMeter(params.num_layers, params.num_qo_heads)
                prepared.run(params, meter)
                losses[:, column] = meter.loss.mean(), meter.tail.mean()
                reused |= meter.reused
    return losses, reused


def _can_share(params: SelectorParams) -> bool:
    time = params.time
    return time is not None and bool(((time.gate > 0) & (time.block > 1) & (time.budget_ratio < 1)).any())


def _by_prefill(settings: list[tuple[int, SelectorParams]]) -> list[list[tuple[int, SelectorParams]]]:
    groups: list[list[tuple[int, SelectorParams]]] = []
    for item in settings:
        for group in groups:
            if (group[0][1].depth, group[0][1].layer) == (item[1].depth, item[1].layer):
                group.append(item)
                break
        else:
            groups.append([item])
    return groups
