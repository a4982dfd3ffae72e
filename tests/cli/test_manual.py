"""docs/cli.md is the command line as it is."""

from __future__ import annotations

from pathlib import Path

from prhs_cli.manual import render

MANUAL = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


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
