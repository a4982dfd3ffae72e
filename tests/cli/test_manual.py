"""docs/cli.md is the command line as it is."""

from __future__ import annotations

import importlib.metadata

import pytest

from prhs_cli.manual import render

from .conftest import ROOT

MANUAL = ROOT / "docs" / "cli.md"


PINNED = f"typer=={importlib.metadata.version('typer')}" in (ROOT / "constraints.txt").read_text("utf-8")


@pytest.mark.skipif(not PINNED, reason="other releases of Typer word their help differently")
def test_the_manual_is_current() -> None:
    assert MANUAL.read_text("utf-8") == render(), "run `make docs`"


def test_the_manual_names_every_verb_and_option() -> None:
    text = render()
    for words in (
        "## `prhs verify-bound`",
        "- `--delta X`: ",
        "- `MODEL`: ",
        "- `--strict`: ",
        "[default: 128",
    ):
        assert words in text, words


def test_help_lists_what_can_be_named() -> None:
    from prhs_calibration.evaluation.points import BASELINES
    from prhs_calibration.evaluation.tasks import TASKS
    from prhs_cli.commands import bench, evaluate
    from prhs_kernels.bench.shapes import SHAPES

    text = render()
    for names, place in ((TASKS, evaluate.EPILOG), (SHAPES, bench.EPILOG), (BASELINES, text)):
        assert [name for name in names if name not in place] == []
