"""What a run counts of its own dropped mass, against a scoring pass over the same tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.params import DepthParams
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.runtime.attention import LayerObservation
from prhs_kernels.runtime.audit import Audit
from prhs_kernels.runtime.auditing import Auditor, affordable_share, dropped_mass, merged
from prhs_kernels.runtime.decode import Generation, generate_tokens
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.testing.inputs import exact_model, random_tokens, selector_params
from prhs_kernels.testing.runs import VARIANTS

PROMPTS = [random_tokens(length, seed=length) for length in (45, 9, 30)]
TIME = {"budget_tokens": [3, 5], "tau_cos": [0.1, 0.3], "gate": [1, 2]}
AXES: dict[str, dict[str, Any]] = {
    "time": {"time": TIME},
    "depth": {"depth": DepthParams(0, 0.3)},
    "both": {"time": TIME, "depth": DepthParams(0, 0.3)},
}


def audited(model: Any, prompts: list[list[int]], params: Any, **settings: Any) -> tuple[Audit, list[Any]]:
    run = Generation()
    rows = list(generate_tokens(model, prompts, params, max_new_tokens=8, run=run, **settings))
    assert run.audit is not None
    return run.audit, rows


def scored(model: Any, prompt: list[int], written: list[int], params: Any) -> tuple[float, float, int]:
    """Dropped mass of all units and of the retrievals of a teacher-forced pass, summed; the units."""
    total = known = 0.0
    units = 0

    def observe(seen: LayerObservation) -> None:
        nonlocal total, known, units
        heads, steps, n = seen.kept.shape
        probs = seen.dense_probs.reshape(heads, -1, steps, n)
        mass = (probs * ~seen.kept[:, None]).sum(-1).mean(1)
        total, known = total + float(mass.sum()), known + float((mass * seen.retrieved).sum())
        units += mass.numel()

    Scorer(model, [*prompt, *written[:-1]], len(prompt)).run(params, observe)
    return total, known, units


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("variant", ["llama", "qwen3-window", "mistral-window"])
def test_auditing_everything_is_the_scoring_pass(variant: str, axes: str) -> None:
    model_type, overrides = VARIANTS[variant]
    model = exact_model(model_type, **overrides)
    params = selector_params(model.config, **AXES[axes])
    together = audited(model, PROMPTS, params, audit=1.0)[0]
    parts = []
    for prompt in PROMPTS:
        audit, rows = audited(model, [prompt], params, audit=1.0)
        total, known, units = scored(model, prompt, [row[0] for row in rows], params)
        assert audit.units == units and audit.audited_units == audit.other_units
        assert audit.exact_mass + audit.audited_mass == pytest.approx(total, rel=1e-6)
        assert audit.exact_mass == pytest.approx(known, rel=1e-6, abs=1e-12)
        assert audit.interval() == pytest.approx((total / units, total / units), rel=1e-6)
        parts.append(audit)
    assert total > 0, "a case in which nothing is dropped tests nothing"
    alone = merged(parts)
    for name in ("exact_units", "exact_mass", "other_units", "audited_units", "audited_mass"):
        assert getattr(together, name) == pytest.approx(getattr(alone, name), rel=1e-9), name


def test_the_coin_picks_its_share_and_changes_nothing_else() -> None:
    model = exact_model("llama")
    params = selector_params(model.config, **AXES["both"])
    plain = list(generate_tokens(model, PROMPTS, params, max_new_tokens=8))
    whole, rows = audited(model, PROMPTS, params, audit=1.0)
    half, same = audited(model, PROMPTS, params, audit=0.5)
    assert rows == same == plain
    assert (half.exact_units, half.exact_mass) == (whole.exact_units, whole.exact_mass)
    assert half.other_units == whole.other_units
    deviation = math.sqrt(half.other_units * 0.25)
    assert abs(half.audited_units - half.other_units / 2) < 5 * deviation
    assert 0 < half.audited_mass < whole.audited_mass
    lower, upper = half.interval()
    assert lower <= whole.estimate <= upper
    assert audited(model, PROMPTS, params, audit=0.5)[0] == half, "the coin is seeded"


def test_sequences_that_ended_no_longer_count() -> None:
    model = exact_model("llama")
    params = selector_params(model.config, **AXES["time"])
    free = [row[0] for row in generate_tokens(model, PROMPTS[:1], params, max_new_tokens=8)]
    stops = [free[3]]
    end = free.index(stops[0])
    short = audited(model, PROMPTS[:1], params, audit=1.0, stop_token_ids=stops)[0]
    assert short.units == end * 4 * 2
    run = Generation()
    list(generate_tokens(model, PROMPTS, params, max_new_tokens=8, stop_token_ids=stops, run=run, audit=1.0))
    assert run.audit is not None and run.audit.units == run.stats.units


def test_dropped_mass_of_a_plain_case() -> None:
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(1, 1, 2, 1, 4) + 5
    visible = torch.tensor([[[True, True, True, False]]])
    kept = torch.tensor([[[[True, False, True, False]]]])
    assert float(dropped_mass(scores, kept, visible)) == pytest.approx(0.3 / 0.9)


def test_units_that_kept_everything_are_not_scored() -> None:
    def fail() -> torch.Tensor:
        raise AssertionError("nothing was to be measured")

    auditor = Auditor(1.0, seed=0)
    kept = torch.ones(1, 2, 1, 5, dtype=torch.bool)
    auditor.add(fail, kept, torch.zeros(1, 2, 1, dtype=torch.bool), kept[:, 0], None)
    assert auditor.audit == Audit(2.0, 0.0, 0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(UsageError, match="audit"):
        Auditor(share, seed=0)


def test_what_cannot_be_audited_is_refused() -> None:
    model = exact_model("llama")
    dense = dense_params(model.config)
    for settings in ({"mode": "released"}, {"selector": object()}):
        with pytest.raises(UsageError, match="an audit needs"):
            generate_tokens(model, PROMPTS[:1], dense, max_new_tokens=2, audit=0.1, **settings)


def test_an_affordable_share_scans_in_a_tenth_of_the_steps_at_most() -> None:
    for rows in (1, 2, 8, 128, 4096):
        share = affordable_share(rows)
        assert 1 - (1 - share) ** rows <= 0.1
    model = exact_model("llama")
    run = Generation()
    params = selector_params(model.config, time=TIME)
    list(generate_tokens(model, PROMPTS, params, max_new_tokens=3, run=run, audit="auto"))
    assert run.audit is not None and run.audit.probability == 0.1 / 6
