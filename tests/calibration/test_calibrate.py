"""Calibrate and verify a tiny random model: the whole path from prompts to verdict, in seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from prhs_calibration import corpus, models, risk, verify
from prhs_calibration.bundle import Bundle
from prhs_calibration.calibrate import CalibrationOutcome, calibrate, estimate_cost
from prhs_calibration.models import LoadedModel
from prhs_calibration.profile import closed_loop_losses
from prhs_calibration.verify import verify_bound
from prhs_kernels.errors import InputError, UsageError
from prhs_kernels.params import LayerParams
from prhs_kernels.testing.models import tiny_checkpoint

DELTA, PROMPTS, CONTEXT = 0.15, 10, 192


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model") / "llama"
    tiny_checkpoint(folder, "llama")
    return models.load(str(folder), device="cpu")


def run(loaded: LoadedModel, **changes: object) -> CalibrationOutcome:
    options: dict[str, object] = {
        "delta": DELTA,
        "num_prompts": PROMPTS,
        "fit_prompts": 4,
        "context_length": CONTEXT,
        "seed": 3,
    }
    return calibrate(loaded, **(options | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def outcome(loaded: LoadedModel) -> CalibrationOutcome:
    return run(loaded)


def test_the_same_inputs_give_the_same_bytes(
    loaded: LoadedModel, outcome: CalibrationOutcome, tmp_path: Path
) -> None:
    outcome.bundle.save(tmp_path / "first.safetensors")
    run(loaded).bundle.save(tmp_path / "second.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()


def test_another_seed_gives_other_prompts_and_another_curve(
    loaded: LoadedModel, outcome: CalibrationOutcome
) -> None:
    other = run(loaded, seed=4).bundle
    assert other.metadata.corpus_hash != outcome.bundle.metadata.corpus_hash
    ours, theirs = outcome.bundle.tensors["risk/loss"], other.tensors["risk/loss"]
    assert ours.shape != theirs.shape or not torch.equal(ours, theirs)


def test_the_bundle_survives_its_file(outcome: CalibrationOutcome, tmp_path: Path) -> None:
    path = tmp_path / "bundle.safetensors"
    outcome.bundle.save(path)
    again = Bundle.load(path)
    assert again.metadata == outcome.bundle.metadata
    assert again.dial_for(DELTA) == outcome.bundle.metadata.dial_index


def test_the_stored_curve_is_what_the_parameters_lose(
    loaded: LoadedModel, outcome: CalibrationOutcome
) -> None:
    bundle = outcome.bundle
    prompts = corpus.build(loaded.tokenizer, count=PROMPTS, context_length=CONTEXT, seed=3, split="select")
    settings = [bundle.params(index) for index in range(len(bundle.dial))]
    again = closed_loop_losses(loaded.model, prompts, settings, lambda done, total: None)
    np.testing.assert_allclose(again, bundle.tensors["risk/loss"].numpy(), atol=1e-6)
    assert (again[:, -1] == 0).all() and again[:, 0].mean() > DELTA


def test_the_operating_point_is_the_one_risk_control_chooses(outcome: CalibrationOutcome) -> None:
    loss = outcome.bundle.tensors["risk/loss"].double().numpy()
    index = outcome.bundle.metadata.dial_index
    bound = (PROMPTS * risk.running_maximum(loss).mean(0) + 1) / (PROMPTS + 1)
    assert bound[index] <= DELTA
    assert index == 0 or bound[index - 1] > DELTA


def test_no_prompt_is_in_two_splits(loaded: LoadedModel) -> None:
    splits = [
        {
            p.text_hash
            for p in corpus.build(loaded.tokenizer, count=12, context_length=CONTEXT, seed=3, split=s)
        }
        for s in ("fit", "select", "verify")
    ]
    assert all(len(split) == 12 for split in splits)
    assert not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])


def test_the_key_copy_is_the_one_that_reads_the_fewest_bytes(outcome: CalibrationOutcome) -> None:
    compared = {found["kind"]: found for found in outcome.summary["key_copies"]}
    assert set(compared) == {"exact", "int8", "int4"}
    chosen = outcome.bundle.metadata.key_copy
    assert chosen == min(compared, key=lambda kind: compared[kind]["predicted_cost"])
    assert outcome.bundle.params(0).key_copy == chosen
    assert compared["int4"]["scan_row"] < compared["int8"]["scan_row"] < compared["exact"]["scan_row"] == 1.0
    assert compared["int4"]["recall"] < compared["exact"]["recall"] == 1.0


def test_a_key_copy_can_be_asked_for(loaded: LoadedModel) -> None:
    bundle = run(loaded, key_copy="exact", num_prompts=6).bundle
    assert bundle.metadata.key_copy == "exact" and bundle.params(0).scan_row == 1.0


def test_the_tail_is_stored_and_lies_above_the_mean(outcome: CalibrationOutcome) -> None:
    bundle = outcome.bundle
    tail = bundle.tensors["profile/tail"]
    assert tail.shape == bundle.dial.shape and float(tail[-1]) == 0.0
    assert (tail[:-1].double() > bundle.mean_loss[:-1]).all()
    assert outcome.summary["tail"] == pytest.approx(float(tail[bundle.metadata.dial_index]))


@pytest.mark.parametrize("axes", [{"depth"}, {"layer"}, {"time", "depth"}])
def test_axes_can_be_left_out(loaded: LoadedModel, axes: set[str]) -> None:
    bundle = run(loaded, axes=frozenset(axes), delta=0.5).bundle
    assert ("depth/schedule" in bundle.tensors) <= ("depth" in axes)
    assert ("layer/schedule" in bundle.tensors) <= ("layer" in axes)
    if "time" not in axes:
        kept = bundle.params(0).time
        assert kept is None or bool((kept.budget_ratio > 0.99).all())
    assert verify_bound(loaded, bundle, delta=0.5, num_prompts=3, seed=3).verdict != "violated"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": 0.0}, "between 0 and 1"),
        ({"delta": 1.5}, "between 0 and 1"),
        ({"delta": 0.02}, "at least 49"),
        ({"delta": 0.02, "target": "high-probability"}, "at least 149"),
        ({"axes": frozenset({"width"})}, "width"),
        ({"key_copy": "int2"}, "int2"),
    ],
)
def test_impossible_wishes_are_refused_before_any_work(
    loaded: LoadedModel, change: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(loaded, **change, progress=pytest.fail)


def test_progress_names_its_stages_and_reaches_the_end(loaded: LoadedModel) -> None:
    seen: dict[str, tuple[int, int]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        seen[stage] = (done, total)

    run(loaded, num_prompts=6, progress=progress)
    assert {"depth profile", "time profile", "risk curve"} <= set(seen)
    assert seen["risk curve"] == (6, 6)


def test_cost_grows_with_the_request(loaded: LoadedModel) -> None:
    small = estimate_cost(loaded.model.config, num_prompts=10, context_length=128)
    large = estimate_cost(loaded.model.config, num_prompts=20, context_length=256)
    assert large.flops > small.flops and large.peak_bytes > small.peak_bytes


def test_verification_measures_what_calibration_promised(
    loaded: LoadedModel, outcome: CalibrationOutcome
) -> None:
    report = verify_bound(loaded, outcome.bundle, delta=DELTA, num_prompts=8, seed=3)
    assert report.verdict in ("held", "undecided")
    assert report.losses.shape == (8,) and report.decision.num_prompts == 8
    assert report.losses.mean() == pytest.approx(report.dropped_mass.mean())
    layer, head = report.worst
    assert report.dropped_mass[layer, head] == report.dropped_mass.max()
    assert (report.information_gap <= report.fano + 1e-9).all()
    assert (report.fano <= report.marginal + 1e-9).all()
    assert 0 < report.output_tv < 1 and report.output_prompts == 8
    assert report.violations == [] and report.case is None
    assert 0 < report.stats["attended_fraction"] < 1
    assert report.to_dict()["loop"] == "closed"
    assert (report.tail >= report.dropped_mass - 1e-9).all() and report.tail.max() <= 1
    kinds = report.kinds.values()
    assert sum(kind["prompts"] for kind in kinds) == 8
    mean = sum(kind["prompts"] * kind["dropped_mass"] for kind in kinds) / 8
    assert mean == pytest.approx(report.losses.mean())


def test_verification_is_deterministic_and_its_prompts_follow_the_seed(
    loaded: LoadedModel, outcome: CalibrationOutcome
) -> None:
    losses = [
        verify_bound(loaded, outcome.bundle, delta=DELTA, num_prompts=3, seed=seed).losses
        for seed in (3, 3, 5)
    ]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert not np.array_equal(losses[0], losses[2])


@pytest.mark.parametrize("seed", range(5))
def test_a_bundle_moved_to_three_times_the_risk_is_caught(
    loaded: LoadedModel, outcome: CalibrationOutcome, seed: int
) -> None:
    delta = 0.04
    risks = outcome.bundle.mean_loss
    moved = outcome.bundle.with_dial(int((risks - 3 * delta).abs().argmin()))
    assert float(risks[moved.metadata.dial_index]) > 2 * delta
    moved = dataclasses.replace(moved, metadata=dataclasses.replace(moved.metadata, delta=delta))
    report = verify_bound(loaded, moved, delta=delta, num_prompts=40, seed=seed)
    assert report.verdict == "violated" and report.decision.lower > delta


def test_a_bundle_of_another_model_is_refused(
    loaded: LoadedModel, outcome: CalibrationOutcome, tmp_path: Path
) -> None:
    tiny_checkpoint(tmp_path / "other", "llama", num_hidden_layers=3)
    other = models.load(str(tmp_path / "other"), device="cpu")
    with pytest.raises(InputError, match="num_layers"):
        verify_bound(other, outcome.bundle, delta=DELTA, num_prompts=2)


def test_a_failed_theorem_is_a_violation_and_keeps_the_case(
    loaded: LoadedModel, outcome: CalibrationOutcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest: Callable[..., object] = verify.compare_attention

    def broken(dense: torch.Tensor, sparse: torch.Tensor, kept: torch.Tensor | None) -> object:
        # rows that are not what the kept set makes of the dense ones, as a wrong kernel would give
        return honest(dense, sparse.roll(1, dims=-1), kept)

    monkeypatch.setattr(verify, "compare_attention", broken)
    report = verify_bound(loaded, outcome.bundle, delta=DELTA, num_prompts=2, seed=3)
    assert report.verdict == "violated" and report.violations
    assert report.case is not None and set(report.case) == {"dense", "sparse", "kept"}


def test_frozen_layers_are_measured_as_total_variation(loaded: LoadedModel) -> None:
    bundle = run(loaded, axes=frozenset({"time", "layer"}), delta=0.6).bundle
    params = bundle.params(0)
    frozen = dataclasses.replace(params, time=None, layer=LayerParams(1, 0.3))
    prompts = corpus.build(loaded.tokenizer, count=2, context_length=CONTEXT, seed=3, split="verify")
    losses = closed_loop_losses(loaded.model, prompts, [frozen], lambda done, total: None)
    assert (losses > 0.01).all() and (losses < 1).all()
