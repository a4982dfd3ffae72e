"""Every verb, end to end, on a tiny random model."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path

import pytest

from prhs_calibration.bundle import Bundle

from .conftest import CALIBRATION, DELTA, Prhs, Workplace


def generation(workplace: Workplace) -> list[object]:
    common = ["--model", workplace.model, "--bundle", workplace.bundle]
    return ["generate", "--prompt-file", workplace.prompt, *common, "--max-new-tokens", 12]


def verification(workplace: Workplace, *more: object) -> list[object]:
    common = ["--model", workplace.model, "--corpus", workplace.corpus, "--context-length", 160]
    return ["verify-bound", *common, "--prompts", 24, *more]


def test_calibrate_writes_to_the_data_folder_and_says_so(
    prhs: Prhs, workplace: Workplace, own_data_folder: Path
) -> None:
    done = prhs("calibrate", workplace.model, *CALIBRATION, "--corpus", workplace.corpus, "--json", "--quiet")
    assert (done.code, done.err) == (0, "")
    path = Path(done.json["bundle"])
    assert path.parent == own_data_folder / "bundles"
    assert path.read_bytes() == workplace.bundle.read_bytes(), "the same inputs must give the same bytes"
    assert done.json["delta"] == DELTA


def test_calibrate_dry_run_writes_nothing(prhs: Prhs, workplace: Workplace, own_data_folder: Path) -> None:
    done = prhs("calibrate", workplace.model, "--dry-run", "--json")
    assert done.code == 0
    assert done.json["flops"] > 0 and done.json["peak_bytes"] > 0
    shown = prhs("calibrate", workplace.model, "--dry-run").out
    assert "minutes at 100 TFLOP/s" in shown and "beside the weights" in shown
    assert not own_data_folder.exists()


def test_inspect_shows_the_promise_and_the_curve(prhs: Prhs, workplace: Workplace) -> None:
    done = prhs("inspect", workplace.bundle)
    assert done.code == 0
    assert f"δ = {DELTA}" in done.out and "risk curve" in done.out
    data = prhs("inspect", workplace.bundle, "--json").json
    bundle = Bundle.load(workplace.bundle)
    assert data["metadata"]["delta"] == DELTA
    assert data["dial"][-1] == {"lambda": 1.0, "mean_loss": pytest.approx(0.0, abs=1e-6), "tail": 0.0}
    assert data["operating_point"]["tail"] >= data["operating_point"]["mean_loss"]
    assert data["metadata"]["key_copy"] in ("exact", "int8", "int4") and "retrievals scan" in done.out
    assert data["operating_point"]["lambda"] == pytest.approx(float(bundle.dial[bundle.metadata.dial_index]))


def test_verify_bound_holds_and_keeps_the_result(prhs: Prhs, workplace: Workplace, tmp_path: Path) -> None:
    result = tmp_path / "bound.json"
    done = prhs(*verification(workplace, "--bundle", workplace.bundle, "-o", result))
    assert done.code == 0, done.out
    assert "verdict" not in done.err and str(result) in done.out
    content = json.loads(result.read_text("utf-8"))
    assert content["kind"] == "bound"
    assert content["data"]["verdict"] in ("held", "undecided")
    assert content["conditions"]["seeds"] == {"corpus": 0}
    assert content["data"]["decision"]["mean"] <= DELTA


def test_verify_bound_violated_exits_1(prhs: Prhs, workplace: Workplace, tmp_path: Path) -> None:
    """A bundle at its sparsest operating point, which promises a tenth of its δ."""
    bundle = Bundle.load(workplace.bundle)
    metadata = dataclasses.replace(bundle.metadata, delta=DELTA / 10, dial_index=0)
    assert float(bundle.mean_loss[0]) > 3 * metadata.delta
    wrong = tmp_path / "wrong.safetensors"
    dataclasses.replace(bundle, metadata=metadata).save(wrong)
    done = prhs(*verification(workplace, "--bundle", wrong))
    assert done.code == 1
    assert "violated" in done.out


def test_verify_bound_undecided_is_1_only_when_strict(prhs: Prhs, workplace: Workplace) -> None:
    few = [*verification(workplace, "--bundle", workplace.bundle), "--prompts", 2]
    done = prhs(*few)
    assert done.code == 0 and "undecided" in done.out and "prompts would decide" in done.out
    assert "other text or length" not in done.err
    assert prhs(*few, "--strict").code == 1
    assert "other text or length" in prhs(*few, "--context-length", 128).err


def test_the_newest_matching_bundle_is_used_and_named(
    prhs: Prhs, workplace: Workplace, own_data_folder: Path
) -> None:
    folder = own_data_folder / "bundles"
    folder.mkdir(parents=True)
    (folder / "mine.safetensors").write_bytes(workplace.bundle.read_bytes())
    done = prhs("generate", "--prompt-file", workplace.prompt, "--model", workplace.model)
    assert done.code == 0
    assert str(folder / "mine.safetensors") in done.err


def test_streamed_text_is_the_text(prhs: Prhs, workplace: Workplace) -> None:
    streamed = prhs(*generation(workplace))
    whole = prhs(*generation(workplace), "--json")
    assert streamed.code == whole.code == 0
    assert streamed.out == whole.json["sparse"]["text"] + "\n"
    assert whole.json["sparse"]["new_tokens"] == len(whole.json["sparse"]["tokens"])


def test_sampling_follows_the_seed(prhs: Prhs, workplace: Workplace) -> None:
    sampled = [*generation(workplace), "--temperature", 1.5, "--json"]
    tokens = [prhs(*sampled, "--seed", seed).json["sparse"]["tokens"] for seed in (1, 1, 2)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_compare_dense_says_where_the_two_part(prhs: Prhs, workplace: Workplace) -> None:
    done = prhs(*generation(workplace), "--compare", "dense", "--stats")
    assert done.code == 0
    assert done.out.index("--- sparse ---") < done.out.index("--- dense ---")
    assert "agree on" in done.out and "attended fraction" in done.out
    data = prhs(*generation(workplace), "--compare", "dense", "--json").json
    sparse, dense, same = data["sparse"]["tokens"], data["dense"]["tokens"], data["same_tokens"]
    assert sparse[:same] == dense[:same]
    assert sparse[same : same + 1] != dense[same : same + 1] or sparse == dense
    assert data["dense"]["attended_fraction"] == 1.0


def test_a_smaller_delta_attends_more(prhs: Prhs, workplace: Workplace) -> None:
    """--delta moves the bundle along its stored curve."""
    loose, tight = (
        prhs(*generation(workplace), "--delta", delta, "--json").json for delta in (0.3, DELTA / 2)
    )
    assert loose["lambda"] < tight["lambda"]
    assert loose["sparse"]["attended_fraction"] < tight["sparse"]["attended_fraction"]


def test_prompt_from_standard_input(
    prhs: Prhs, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prhs(*generation(workplace)).out
    typed = io.TextIOWrapper(io.BytesIO(workplace.prompt.read_bytes()))
    monkeypatch.setattr(sys, "stdin", typed)
    arguments = [part if part != workplace.prompt else "-" for part in generation(workplace)]
    assert prhs(*arguments).out == expected


def test_new_tokens_are_cut_to_the_context(prhs: Prhs, workplace: Workplace) -> None:
    done = prhs(*generation(workplace), "--max-new-tokens", 10_000)
    assert done.code == 0
    assert "fit the context of 512" in done.err


def test_analyze_and_plot(prhs: Prhs, workplace: Workplace, tmp_path: Path, own_data_folder: Path) -> None:
    common = [
        "--model",
        workplace.model,
        "--bundle",
        workplace.bundle,
        "--context-length",
        160,
        "--prompts",
        2,
    ]
    done = prhs(
        "analyze", "posterior-bias", *common, "--selectors", "oracle,quest", "--budgets", "0.125,0.25"
    )
    assert done.code == 0
    assert len(list((own_data_folder / "results").glob("posterior-bias-*.json"))) == 1
    figure = tmp_path / "figure.png"
    drawn = prhs("plot", "posterior-bias", "-o", figure)
    assert drawn.code == 0 and str(own_data_folder) in drawn.err, "the newest result is drawn, and named"
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_plot_bound_and_risk(prhs: Prhs, workplace: Workplace, tmp_path: Path) -> None:
    result = tmp_path / "bound.json"
    assert prhs(*verification(workplace, "--bundle", workplace.bundle, "-o", result)).code == 0
    for figure, source in (("bound", result), ("risk", workplace.bundle)):
        path = tmp_path / f"{figure}.svg"
        assert prhs("plot", figure, source, "-o", path).code == 0
        assert "<svg" in path.read_text("utf-8")


def test_generate_asks_for_memory_first(
    prhs: Prhs, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prhs_calibration import models

    loaded = models.load(str(workplace.model), device="cpu")
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: loaded)  # the weights already fit
    monkeypatch.setattr("prhs_calibration.memory.available", lambda device: 1000)
    done = prhs(*generation(workplace))
    assert done.code == 4 and "not enough memory" in done.err and done.out == ""


def test_models_shows_the_cards_of_embedded_models(prhs: Prhs) -> None:
    for name in ("reference", "reference-8k"):
        card = prhs("models", "--card", name)
        assert card.code == 0 and f"`{name}`" in card.out and "licence" in card.out.lower()
    other = prhs("models", "--card", "llama-3-8b")
    assert other.code == 3 and "reference-8k" in other.err


def test_models_lists_and_removes_bundles(prhs: Prhs, workplace: Workplace, own_data_folder: Path) -> None:
    folder = own_data_folder / "bundles"
    folder.mkdir(parents=True)
    (folder / "mine.safetensors").write_bytes(workplace.bundle.read_bytes())
    (folder / "broken.safetensors").write_bytes(b"no bundle")
    listed = prhs("models", "--json").json
    assert {known["alias"] for known in listed["models"]} >= {"reference", "llama-3.1-8b", "qwen3-8b"}
    assert {found["name"]: found["problem"] is None for found in listed["bundles"]} == {
        "mine": True,
        "broken": False,
    }
    assert "mine" in prhs("models").out
    assert prhs("models", "--remove", "mine").code == 0
    assert not (folder / "mine.safetensors").exists()


def test_doctor_names_versions_devices_and_places(prhs: Prhs, own_data_folder: Path) -> None:
    done = prhs("doctor")
    assert done.code == 0
    for words in ("torch", "transformers", "cpu", "generate --backend auto", str(own_data_folder)):
        assert words in done.out
    data = prhs("doctor", "--json").json
    assert data["devices"][0][0] == "cpu" and data["devices"][0][2] > 0
    if len(data["devices"]) == 1:
        assert data["runs"]["generate --backend auto"].startswith("reference") and "CUDA" in done.out


def test_doctor_says_why_a_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from prhs_kernels.ops import backend

    cuda = torch.device("cuda")
    for capability, words in (((9, 0), "sm_90"), ((7, 5), "tested from sm_80 on")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(backend, "has_triton", lambda: True)
        assert words in backend.explain_backend(cuda) and "CUDA graph" in backend.explain_backend(cuda)
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert "triton is not installed" in backend.explain_backend(cuda)
    assert "need a CUDA device" in backend.explain_backend(torch.device("cpu"))
