"""Figures: made from result files alone, labelled, the same bytes twice, readable without colour."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from prhs_calibration.bundle import Bundle
from prhs_calibration.bundle_format import BundleMetadata
from prhs_cli.plots import bound, latency, posterior_bias, risk, style, throughput
from prhs_kernels.errors import InputError, UsageError

LAYERS, HEADS, PROMPTS = 6, 4, 40


def spread(mean: Any) -> dict[str, Any]:
    values = np.asarray(mean, dtype=float)
    return {"mean": values.tolist(), "low": (0.9 * values).tolist(), "high": (1.1 * values).tolist()}


def posterior_bias_result() -> dict[str, Any]:
    layers, bins = np.linspace(1, 2, LAYERS), np.linspace(1, 0.1, 20)
    cells = []
    for (rank, name), budget in itertools.product(enumerate(style.SELECTORS), (1 / 16, 1 / 8, 1 / 4)):
        excess = rank * 0.05 * (1 - budget)
        cells.append(
            {
                "selector": name,
                "budget": budget,
                "attended_fraction": budget * 1.01,
                "matched": True,
                "kv_bytes_read": 0.5,
                "retrieval_ratio": 0.25,
                "dropped_mass": spread(0.3 - budget + excess),
                "oracle_dropped_mass": spread(0.3 - budget),
                "excess": spread(excess),
                "by_layer": {"excess": spread(excess * layers)},
                "by_position": {"missed_mass": spread(excess * bins / 20)},
            }
        )
    data = {
        "loop": "open",
        "confidence": 0.95,
        "num_prompts": 8,
        "num_steps": 512,
        "num_layers": LAYERS,
        "context_length": 1024,
        "model": "tiny",
        "budgets": [1 / 16, 1 / 8, 1 / 4],
        "edges": {"position": [edge / 20 for edge in range(21)]},
        "cells": cells,
    }
    return {
        "kind": "posterior-bias",
        "schema": 1,
        "conditions": {"versions": {"prhs": "0.1.0"}},
        "data": data,
    }


def bound_result() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    dropped = 0.02 * rng.random((LAYERS, HEADS))
    gap = 0.1 * dropped
    gap[0] = 0
    data = {
        "loop": "closed",
        "delta": 0.02,
        "lambda": 0.3,
        "verdict": "held",
        "decision": {"confidence": 0.95, "num_prompts": 32, "mean": 0.01, "lower": 0.007, "upper": 0.014},
        "worst_layer": 2,
        "worst_head": 1,
        "decode_steps": 2048,
        "stats": {"attended_fraction": 0.21},
        "dropped_mass": dropped.tolist(),
        "information_gap": gap.tolist(),
        "fano": (dropped * 6).tolist(),
        "marginal": (dropped * 16).tolist(),
    }
    return {"kind": "bound", "schema": 1, "conditions": {"model": "tiny"}, "data": data}


def bundle() -> Bundle:
    rng = np.random.default_rng(0)
    dial = torch.linspace(0.05, 1, 12)
    loss = 0.1 * (1 - dial.numpy()) ** 2 * rng.uniform(0.5, 1.5, (PROMPTS, 1))
    metadata = BundleMetadata(
        model_id="tiny",
        revision="local",
        fingerprint={},
        weights_hash="",
        tokenizer_hash="",
        corpus_hash="",
        seeds={},
        split_sizes={},
        context_length=1024,
        delta=0.05,
        dial_index=7,
    )
    return Bundle(metadata, {"time/lambda": dial, "risk/loss": torch.tensor(loss)})


def bench_result(kind: str, batches: tuple[int, ...] = (8,)) -> dict[str, Any]:
    """Times of four cases at three contexts, as `prhs bench` saves them."""
    rows = []
    step = "layer" if kind == "bench-operator" else "sparse"
    cases = (
        ("sdpa cudnn", "dense", 1.0),
        ("dense_decode", "dense", 1.2),
        ("masked sdpa as gpt-fast", "masked", 3.0),
        (f"{step}, ρ = 0", "sparse", 0.1),
        (f"{step}, ρ = 0.125", "sparse", 0.3),
    )
    for batch, n, (case, form, factor) in itertools.product(batches, (4096, 16384, 32768), cases):
        spent = factor * batch * n / 1000
        sizes = {"num_qo_heads": 32, "num_kv_heads": 8, "head_dim": 128, "kept": 1024}
        rows.append(
            {
                "problem": sizes | {"name": "tiny", "batch": batch, "n": n},
                "case": case,
                "kind": form,
                "timing": {"p20": spent, "p50": spent, "p80": spent},
                "floor_us": 0.8 * spent,
                "copy_rate": 4e6,
            }
        )
    rows.append({**rows[0], "case": "flash-attn", "timing": None, "floor_us": None})
    conditions = {"versions": {"torch": "2.11"}, "device": "NVIDIA H200", "dtype": "bfloat16"}
    data = {"complete": True, "rows": rows}
    return {"kind": kind, "schema": 1, "conditions": conditions, "data": data}


FIGURES: dict[str, tuple[Any, Any]] = {
    "posterior-bias": (posterior_bias, posterior_bias_result),
    "bound": (bound, bound_result),
    "risk": (risk, bundle),
    "latency": (latency, lambda: bench_result("bench-operator")),
    "throughput": (throughput, lambda: bench_result("bench-decode")),
}
TIMES = ("latency", "throughput")
every_figure = pytest.mark.parametrize("name", FIGURES)


def drawn(name: str) -> Figure:
    module, make = FIGURES[name]
    figure: Figure = module.figure(make())
    return figure


@every_figure
@pytest.mark.parametrize("suffix", style.FORMATS)
def test_figure_files_are_made(name: str, suffix: str, tmp_path: Path) -> None:
    module, make = FIGURES[name]
    path = tmp_path / f"figure{suffix}"
    module.draw(make(), path)
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    content = path.read_bytes()
    assert content.startswith(start) and len(content) > 5000
    module.draw(make(), path)
    assert path.read_bytes() == content  # no dates, no random ids


@every_figure
def test_svg_has_searchable_labels(name: str, tmp_path: Path) -> None:
    module, make = FIGURES[name]
    module.draw(make(), tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert ("copy bandwidth" if name in TIMES else "dropped mass") in text and "tiny" in text


@every_figure
def test_axes_are_labelled_with_units(name: str) -> None:
    for axis in drawn(name).axes:
        assert axis.get_xlabel()
        assert "(" in axis.get_ylabel() or "per" in axis.get_ylabel()


@every_figure
def test_legend_hides_no_data(name: str) -> None:
    with style.styled():
        figure = drawn(name)
        figure.draw_without_rendering()
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes)]
    boxes = [legend.get_window_extent() for legend in legends if legend is not None]
    assert boxes
    for box, axis in itertools.product(boxes, figure.axes):
        assert not box.overlaps(axis.get_window_extent())


@every_figure
def test_nothing_is_cut_off(name: str) -> None:
    with style.styled():
        figure = drawn(name)
        figure.draw_without_rendering()
        box, whole = figure.get_tightbbox(), figure.bbox_inches
    assert box is not None
    assert box.x0 >= -0.01 and box.y0 >= -0.01
    assert box.x1 <= whole.width + 0.01 and box.y1 <= whole.height + 0.01


def lightness(color: str) -> float:
    """CIE L*, 0 black to 100 white."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_selectors_are_told_apart_without_colour() -> None:
    looks = [*style.SELECTORS.values(), style.ORACLE_AT_PRHS]
    for one, other in itertools.combinations(style.SELECTORS.values(), 2):
        assert abs(lightness(one.color) - lightness(other.color)) >= 15
        assert one.marker != other.marker
    assert len({str(look.linestyle) for look in looks}) == len(looks)
    assert max(lightness(look.color) for look in looks) <= 75  # still visible on white


def test_every_selector_of_the_analysis_has_a_look() -> None:
    from prhs_calibration.evaluation.points import COMPARED, DEFAULTS

    assert set(style.SELECTORS) == set(DEFAULTS) and set(style.EVERY) == set(COMPARED)


def test_the_other_selectors_differ_in_marker_and_line() -> None:
    looks = [*style.EVERY.values(), style.ORACLE_AT_PRHS]
    assert len({look.marker for look in style.EVERY.values()}) == len(style.EVERY)
    assert len({str(look.linestyle) for look in looks}) == len(looks)
    assert max(lightness(look.color) for look in looks) <= 75


def test_data_reaches_the_axes() -> None:
    dropped, excess, positions, layers = drawn("posterior-bias").axes
    labels = {line.get_label() for line in layers.get_lines()}
    assert labels == {"PrHS", "Quest", "StreamingLLM"}
    line = next(line for line in layers.get_lines() if line.get_label() == "PrHS")
    expected = posterior_bias_result()["data"]["cells"][4]["by_layer"]["excess"]["mean"]
    assert list(np.asarray(line.get_ydata())) == pytest.approx(expected)
    assert len(dropped.containers) == 5 and len(excess.containers) == 3
    assert all(len(line.get_xdata()) == 20 for line in positions.get_lines())  # type: ignore[arg-type]


def test_all_selectors_fit_on_the_page() -> None:
    result = posterior_bias_result()
    cells = result["data"]["cells"]
    for name in style.OTHERS:
        cells += [copy.deepcopy(cell) | {"selector": name} for cell in cells[:3]]
    with style.styled():
        figure = posterior_bias.figure(result)
        figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(style.EVERY) + 1
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_single_prompt_has_no_intervals() -> None:
    result = posterior_bias_result()

    def strip(node: Any) -> None:
        for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            if isinstance(value, dict) and "low" in value:
                value["low"] = value["high"] = None
            strip(value)

    strip(result)
    assert not posterior_bias.figure(result).axes[3].collections


def test_missed_budget_is_in_the_caption() -> None:
    result = posterior_bias_result()
    result["data"]["cells"][3] |= {"matched": False, "attended_fraction": 0.09}
    caption = posterior_bias.figure(result).get_supxlabel().replace("\n", " ")
    assert "PrHS attended 0.090 where 1/16 was asked" in caption


def test_small_biases_get_a_logarithmic_axis() -> None:
    result = posterior_bias_result()
    assert posterior_bias.figure(result).axes[1].get_yscale() == "linear"
    for cell in result["data"]["cells"][3:6]:
        cell["excess"] = spread(1e-4)
    assert posterior_bias.figure(result).axes[1].get_yscale() == "log"


def test_subset_of_selectors() -> None:
    result = posterior_bias_result()
    result["data"]["cells"] = [cell for cell in result["data"]["cells"] if cell["selector"] == "quest"]
    assert len(posterior_bias.figure(result).axes[0].containers) == 1


def test_latency_draws_every_case_and_its_floor() -> None:
    (axis,) = drawn("latency").axes
    drawn_lines = {str(line.get_label()): line for line in axis.get_lines()}
    assert {"fastest dense", "masked sdpa as gpt-fast", "layer, ρ = 0", "layer, ρ = 0.125"} <= set(
        drawn_lines
    )
    dense = drawn_lines["fastest dense"]
    assert list(np.asarray(dense.get_xdata())) == [4096, 16384, 32768]
    assert np.asarray(dense.get_ydata()) == pytest.approx([8 * 4.096, 8 * 16.384, 8 * 32.768])
    floors = [line for line in axis.get_lines() if line.get_linestyle() == ":" and len(line.get_xdata()) == 3]  # type: ignore[arg-type]
    assert len(floors) == 4
    assert np.asarray(floors[0].get_ydata()) == pytest.approx(0.8 * np.asarray(dense.get_ydata()))


def test_many_cases_with_long_names_have_looks_of_their_own_and_a_legend_that_fits(tmp_path: Path) -> None:
    result = bench_result("bench-operator")
    sparse = [row for row in result["data"]["rows"] if row["kind"] == "sparse"]
    for row in copy.deepcopy(sparse):
        for more in (
            ", in blocks of 8",
            ", in blocks of 8, int4 keys",
            ", int4 keys",
            ", fp8 keys",
            ", int8 keys",
        ):
            result["data"]["rows"].append({**row, "case": row["case"] + more})
    with style.styled():
        figure = latency.figure(result)
        figure.savefig(tmp_path / "many.png")
        box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
    named = [line for line in figure.axes[0].get_lines() if "ρ" in str(line.get_label())]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in named}
    assert len(looks) == len(named) == 12


def test_throughput_over_context_or_batch() -> None:
    (axis,) = drawn("throughput").axes
    line = next(line for line in axis.get_lines() if line.get_label() == "sparse, ρ = 0")
    assert np.asarray(line.get_ydata()) == pytest.approx([1e6 / 0.4096, 1e6 / 1.6384, 1e6 / 3.2768])
    assert "context" in axis.get_xlabel()
    wide = bench_result("bench-decode", batches=(1, 2, 4, 8))
    axes = throughput.figure(wide).axes
    assert len(axes) == 3 and all("batch" in axis.get_xlabel() for axis in axes)


def test_one_point_still_shows_its_floor() -> None:
    result = bench_result("bench-operator")
    result["data"]["rows"] = [row for row in result["data"]["rows"] if row["problem"]["n"] == 4096]
    (axis,) = latency.figure(result).axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([32.768, 98.304, 3.2768, 9.8304])
    strokes = [
        float(np.asarray(line.get_xdata())[0]) for line in axis.get_lines() if line.get_marker() == "|"
    ]
    assert strokes[::2] == pytest.approx([0.8 * bar.get_width() for bar in axis.patches])


def test_two_numbers_of_kept_positions_are_two_lines() -> None:
    result = bench_result("bench-decode")
    more = copy.deepcopy([row for row in result["data"]["rows"] if row["kind"] == "sparse"])
    for row in more:
        row["problem"]["kept"] = 2048
    result["data"]["rows"] += more
    labels = {str(line.get_label()) for line in latency.figure(result).axes[0].get_lines()}
    assert {"sparse, ρ = 0, 1024 kept", "sparse, ρ = 0, 2048 kept"} <= labels


@pytest.mark.parametrize("module", [latency, throughput])
def test_results_without_times_are_refused(module: Any) -> None:
    with pytest.raises(InputError, match="not a"):
        module.figure(bound_result())
    result = bench_result("bench-decode")
    for row in result["data"]["rows"]:
        row["timing"] = None
    with pytest.raises(InputError, match="holds no time"):
        module.figure(result)
    result = bench_result("bench-decode")
    del result["data"]["rows"][0]["problem"]["n"]
    with pytest.raises(InputError, match="incomplete"):
        module.figure(result)


@pytest.mark.parametrize("module", [posterior_bias, bound])
def test_foreign_and_incomplete_results_are_refused(module: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a"):
        module.draw({"kind": "bench", "data": {}}, tmp_path / "f.png")
    result = copy.deepcopy(FIGURES[module.KIND][1]())
    result["data"].pop("loop")
    with pytest.raises(InputError, match="incomplete"):
        module.draw(result, tmp_path / "f.png")
    assert not list(tmp_path.iterdir())


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ending"):
        risk.draw(bundle(), tmp_path / "figure.jpg")


def test_settings_are_scoped() -> None:
    before = dict(matplotlib.rcParams)
    with style.styled():
        assert matplotlib.rcParams["svg.hashsalt"] == "prhs"
    assert dict(matplotlib.rcParams) == before


def test_look_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        style.SELECTORS["prhs"].color = "#ffffff"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "text"), [(1 / 16, "1/16"), (0.1, "1/10"), (0.15, "15 %"), (0.333, "33.3 %")]
)
def test_fraction(value: float, text: str) -> None:
    assert style.fraction(value) == text
