"""Wiring of the verbs, and the only place where an exception becomes a line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from prhs_cli import errors
from prhs_cli.commands import (
    analyze,
    bench,
    calibrate,
    doctor,
    evaluate,
    generate,
    inspect,
    models,
    plot,
    verify_bound,
)
from prhs_kernels.runtime.distributed import launched

app = typer.Typer(
    name="prhs",
    help="Sparse attention with a calibrated, checkable bound on the attention mass it drops.",
    epilog="""\b
Start here:
  prhs calibrate reference --delta 0.02     fit the selectors to a model, write a bundle
  prhs verify-bound --delta 0.02            check the promise on prompts not seen before
  prhs generate --prompt-file FILE --stats  write text with it, with what it saved
\b
Exit codes: 0 fine, 1 bound violated, 2 wrong usage, 3 unusable input, 4 not enough memory, disk or device,
130 interrupted.""",
    rich_markup_mode=None,  # plain help starts faster and reads the same in a pipe
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for name, module in (
    ("calibrate", calibrate),
    ("inspect", inspect),
    ("verify-bound", verify_bound),
    ("generate", generate),
    ("analyze", analyze),
    ("plot", plot),
    ("evaluate", evaluate),
    ("bench", bench),
    ("models", models),
    ("doctor", doctor),
):
    app.command(name, epilog=module.EPILOG)(module.command)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"prhs {version('prhs')}")
        except PackageNotFoundError:
            typer.echo("prhs (run from a checkout, not installed)")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the command line.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return its exit code; errors go to stderr."""
    debug = "--debug" in arguments
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for programmers
    # torch's threads spin where they wait: on a machine that also does something else that costs a factor
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # but sleeping at once costs a third of the speed where nothing else runs: spin for some 10 us
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        given = arguments or ["--help"]
        code = typer.main.get_command(app).main(given, prog_name="prhs", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:
        if debug or isinstance(error, SystemExit | GeneratorExit):
            raise
        return _report(error)
    if code == errors.INTERRUPTED:  # Typer turns a Ctrl-C that no command handled into this
        return _report(KeyboardInterrupt())
    return int(code or 0) if arguments else errors.USAGE


def main() -> NoReturn:
    """Entry point of `prhs` and of `python -m prhs_cli`."""
    raise SystemExit(run(sys.argv[1:]))


def _report(error: BaseException) -> int:
    code, line = errors.describe(error)
    if code == errors.BROKEN_PIPE:
        # the reader of our output has gone: keep Python from failing again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    rank = launched().rank
    if rank == 0:
        print(f"prhs: {line}", file=sys.stderr)
    elif code not in (errors.USAGE, errors.INPUT, errors.INTERRUPTED):  # what rank 0 does not see as well
        print(f"prhs: rank {rank}: {line}", file=sys.stderr)
    return code
