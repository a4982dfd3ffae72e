"""`prhs bench`: times of the kernels and of whole decode steps against dense attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from prhs_cli import benchmarks, errors, options
from prhs_cli.output import Output

EPILOG = """\b
Examples:
  prhs bench operator                                one layer: kernels, dense rivals, sparse peers
  prhs bench operator --shape llama-2-7b --batch 16 --context 2048,8192 --kept 1/8 --retrieval 0,1/16,1
  prhs bench decode --shape llama-3-8b --batch 16 --context 32768 --kept 1024     whole decode steps
  prhs bench prefill --context 8192,32768 --fractions 0.5     PSAW's window, ETF's frozen tokens
  prhs bench operator --dry-run                      cost in time and memory
  TRITON_INTERPRET=1 prhs bench operator             a trial at toy size without a GPU
Shapes: llama-2-7b, llama-3-8b, llama-3-70b-tp8, mistral-7b, qwen2.5-7b, qwen3-8b; weights are random.
Exit code 1: a kernel gave a wrong result (it is not timed then)."""


def command(
    what: Annotated[
        Literal["operator", "decode", "prefill"], typer.Argument(help="What to measure.", show_default=False)
    ],
    shape: Annotated[
        str | None, typer.Option("--shape", metavar="A,B,…", help="Model shapes.", show_default=False)
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="N,M,…", help="Sequences per step.", show_default=False)
    ] = None,
    context: Annotated[
        str | None,
        typer.Option("--context", metavar="N,M,…", help="Positions in the cache.", show_default=False),
    ] = None,
    kept: Annotated[
        str | None,
        typer.Option(
            "--kept",
            metavar="X,Y,…",
            help="Kept positions per KV head, or a fraction such as 1/8.",
            show_default=False,
        ),
    ] = None,
    retrieval: Annotated[
        str | None,
        typer.Option(
            "--retrieval",
            metavar="X,Y,…",
            help="Retrieval ratios ρ: fraction of KV heads that choose anew in a step.",
            show_default=False,
        ),
    ] = None,
    fractions: Annotated[
        str | None,
        typer.Option(
            "--fractions",
            metavar="X,Y,…",
            help="Prefill: part of the prompt that the last layer drops.",
            show_default=False,
        ),
    ] = None,
    key_copy: Annotated[
        str | None,
        typer.Option(
            "--key-copy",
            metavar="A,B,…",
            help="What retrievals scan: exact, int8, fp8, int4.",
            show_default=False,
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            "-b",
            metavar="BUNDLE",
            help="Take kept fraction, ρ and key copy from this bundle.",
            show_default=False,
        ),
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Time other launch shapes as well.")] = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds", min=0, metavar="N", help="Begin no case after this time.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the cost in time and memory.")
    ] = False,
    output: options.ResultOutput = None,
    device: options.Device = "auto",
    dtype: options.BenchDtype = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure kernels, decode steps and prefill on a GPU.

    Every result is checked against the reference before it is timed. Without sizes: those of the project's
    targets; with some, the others are llama-3-8b, batch 8, context 32768, 1024 kept. Every row has its byte
    floor (bytes over the bandwidth of a copying kernel in the same run) and its ratio to the fastest dense
    attention. The result file is written after every case; an interrupted run continues when the same command
    is given again.
    """
    out = Output(as_json=as_json, quiet=quiet)
    request = benchmarks.Request(
        what,
        shapes=tuple(options.split_list(shape)) if shape else None,
        batches=benchmarks.numbers(batch, int, "--batch", "1,8,16"),
        contexts=benchmarks.numbers(context, int, "--context", "4096,32768"),
        kept=benchmarks.numbers(kept, benchmarks.fraction, "--kept", "1024,1/8"),
        retrieval=benchmarks.numbers(retrieval, benchmarks.fraction, "--retrieval", "0,1/16,1"),
        fractions=benchmarks.numbers(fractions, benchmarks.fraction, "--fractions", "0.25,1/2"),
        key_copies=tuple(options.split_list(key_copy)) if key_copy else None,
        bundle=bundle,
        tune=tune,
    )
    if dry_run:
        cost, parts = benchmarks.estimate(request, dtype)
        return out.result(cost, *parts)
    path, result = benchmarks.run(out, request, output, device=device, dtype=dtype, seconds=seconds)
    out.result(result, *benchmarks.rendered(request, result), f"wrote {path}")
    if benchmarks.wrong(result):
        raise typer.Exit(errors.VIOLATED)
