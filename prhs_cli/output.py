"""Where things are printed: results on stdout, progress and notes on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prhs_calibration.results import to_json
from prhs_cli.errors import Interrupted
from prhs_kernels.runtime.distributed import launched

if TYPE_CHECKING:  # Rich is imported when something is drawn: `prhs --help` does without
    from rich.console import Console, RenderableType
    from rich.progress import Progress

ProgressCallback = Callable[[str, int, int], None]


class Output:
    """One command's voice. `as_json`: stdout is JSON. `quiet`: nothing but results and errors.

    Of several ranks that do the same only rank 0 speaks.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.silent = launched().rank > 0
        self.quiet = quiet or self.silent

    def note(self, line: str) -> None:
        """Something the user should know that is not the result, on stderr."""
        if not self.quiet:
            _console(sys.stderr).print(line, markup=False, highlight=False, soft_wrap=True)

    def result(self, data: Mapping[str, Any], *parts: RenderableType) -> None:
        """The command's result: `data` with `--json`, else `parts` one below the other."""
        if self.silent:
            return
        if self.as_json:
            print(to_json(data))
            return
        console = _console(sys.stdout)
        for part in parts:
            console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))

    def line(self, data: Mapping[str, Any], *texts: str) -> None:
        """One of several results: `data` on one line with `--json`, else `texts` one below the other."""
        if not self.silent:
            print(to_json(data, indent=None) if self.as_json else "\n".join(texts), flush=True)

    def text(self, piece: str) -> None:
        """A piece of streamed text, as it comes; nothing with `--json`."""
        if not self.as_json and not self.silent:
            sys.stdout.write(piece)
            sys.stdout.flush()

    @contextmanager
    def progress(self) -> Iterator[ProgressCallback]:
        """Yield `progress(stage, done, total)`: bars with rate and time left, or plain lines in a pipe."""
        if self.quiet:
            yield lambda stage, done, total: None
        elif sys.stderr.isatty():
            with _bars() as bars:
                yield _BarWriter(bars)
        else:
            yield LineWriter()


@contextmanager
def interruptible(consequence: str) -> Iterator[None]:
    """Say on Ctrl-C what became of the work, for example that no file was written."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {consequence}") from None


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None
) -> RenderableType:
    """A table in the house style; columns of numbers are right-aligned."""
    from rich import box
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(row[index] is None or _is_number(row[index]) for row in rows)
        drawn.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(_cell(value) for value in row))
    return drawn


def pairs(rows: Mapping[str, object], *, title: str | None = None) -> RenderableType:
    """Names and values below each other."""
    from rich.table import Table

    drawn = Table(
        title=title, title_justify="left", box=None, show_header=False, title_style="bold", pad_edge=False
    )
    drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, value in rows.items():
        drawn.add_row(name, _cell(value))
    return drawn


class LineWriter:
    """Progress for logs: nothing for stages below two seconds, else a line every ten and at the end."""

    patience, interval = 2.0, 10.0  # seconds

    def __init__(self) -> None:
        self._stage, self._done = "", 0
        self._started = self._printed = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage or done < self._done:
            self._stage, self._started = stage, now
            self._printed = now + self.patience - self.interval
        self._done = done
        late = now - self._started >= self.patience and done >= total
        if late or now - self._printed >= self.interval:
            self._printed = now
            print(self._line(stage, done, total, now - self._started), file=sys.stderr, flush=True)

    def _line(self, stage: str, done: int, total: int, elapsed: float) -> str:
        line = f"{stage}: {done}/{total}" if total else f"{stage}: {done}"
        if 0 < done < total and elapsed > 0:
            line += f", {done / elapsed:.2g}/s, {elapsed / done * (total - done):.0f} s left"
        elif done and elapsed >= 1:
            line += f", {elapsed:.0f} s"
        return line


class _BarWriter:
    """Progress for terminals: one Rich bar per stage."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total or None)
        self._bars.update(self._tasks[stage], completed=done, total=total or None)


def _bars() -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.3g}/s" if task.speed else "")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    # Rich would print above the bars whatever goes to stdout, even what the user sends to a file
    return Progress(*columns, console=_console(sys.stderr), redirect_stdout=sys.stdout.isatty())


def _console(stream: Any) -> Console:
    """Made afresh so that a redirected stream is honoured; without a terminal Rich leaves colours out."""
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else 120)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object) -> str:
    """Four significant digits are enough to read; the result file has all of them."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value != value:  # not measured, or nothing there to measure
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
