"""What goes to stdout and stderr."""

from __future__ import annotations

import io
import json
import sys
import time

import pytest

from prhs_cli.errors import Interrupted
from prhs_cli.output import LineWriter, Output, interruptible, pairs, table


def test_result_with_json_prints_only_the_object(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(as_json=True)
    out.text("streamed")
    out.result({"a": 1}, "for people")
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": 1}
    assert captured.err == ""


def test_tables_have_no_colours_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Output().result(
        {}, table(["layer", "mass"], [[0, 0.123456], [11, 0.5]], title="T"), pairs({"δ": 0.02, "on": True})
    )
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "0.1235" in printed and "0.02" in printed and "yes" in printed


def test_notes_go_to_stderr_and_quiet_silences_them(capsys: pytest.CaptureFixture[str]) -> None:
    Output().note("[not markup] kept as it is")
    Output(quiet=True).note("unwanted")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "[not markup] kept as it is\n"


def test_progress_without_a_terminal_prints_few_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))  # one second per call
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Output().progress() as progress:
        for done in range(31):
            progress("profile", done, 30)
        progress("quick", 0, 1)
        progress("quick", 1, 1)
    assert capsys.readouterr().err.splitlines() == [
        "profile: 2/30, 1/s, 28 s left",
        "profile: 12/30, 1/s, 18 s left",
        "profile: 22/30, 1/s, 8 s left",
        "profile: 30/30, 30 s",
    ]


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_draws_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Output().progress() as progress:
        for done in range(11):
            progress("profile", done, 10)
    drawn = sys.stderr.getvalue()
    assert "profile" in drawn and "10/10" in drawn and "━" in drawn


def test_quiet_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Output(quiet=True).progress() as progress:
        progress("profile", 1, 1)
    assert capsys.readouterr().err == ""


def test_line_shows_rate_and_time_left() -> None:
    assert LineWriter()._line("scan", 10, 40, 5.0) == "scan: 10/40, 2/s, 15 s left"


def test_interruption_says_what_became_of_the_work() -> None:
    with pytest.raises(Interrupted, match="no bundle was written"):
        with interruptible("no bundle was written"):
            raise KeyboardInterrupt


def test_results_that_come_during_progress_reach_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, file = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", file)
    out = Output()
    with out.progress() as progress:
        progress("tokens", 1, 2)
        out.line({}, "=== 1 ===", "text")
        progress("tokens", 2, 2)
    assert file.getvalue() == "=== 1 ===\ntext\n"
    assert "tokens" in screen.getvalue() and "===" not in screen.getvalue()
