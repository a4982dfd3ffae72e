"""`prhs generate`: write text with sparse attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prhs_cli import continuing, options, prompt_files
from prhs_cli.answers import AnswerFile
from prhs_cli.job import Job, settings
from prhs_cli.loading import Source
from prhs_cli.output import Output, interruptible
from prhs_cli.run_report import agreement_line, audit_line, stats_table
from prhs_kernels.runtime.distributed import finish

EPILOG = """\b
Prompt files:
  question.txt     one text, or several separated by lines that are exactly ---
  questions.jsonl  one object per line: {"prompt": "..."} or {"messages": [{"role": "user",
                   "content": "..."}]}, with "id" and "max_new_tokens" if you like
\b
Examples:
  prhs generate --prompt-file question.txt --stats
  cat question.txt | prhs generate --prompt-file - --max-new-tokens 200
  prhs generate --prompt-file question.txt --delta 0.1 --compare dense
  prhs generate --prompt-file question.txt --audit auto --stats
  prhs generate --prompt-file question.txt --temperature 0.8 --top-p 0.95 --seed 1
  prhs generate --prompt-file questions.jsonl --output answers.jsonl --batch-size 8
  torchrun --nproc-per-node 2 -m prhs_cli generate --prompt-file question.txt --model llama-3.1-8b
                   splits the model over two GPUs; needs pip install 'prhs[distributed]'"""


def command(
    prompt_file: Annotated[
        str,
        typer.Option(
            metavar="FILE|-",
            help="Text to continue, UTF-8, several after lines `---`, or JSONL; `-` reads standard input.",
            show_default=False,
        ),
    ],
    model: options.Model = "reference",
    bundle: options.BundleOption = None,
    delta: options.BundleDelta = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Stop each prompt after so many tokens.")
    ] = 64,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Prompts that run together; without it as many as fit the memory, up to 32.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.jsonl",
            help="Write one JSON object per prompt here, not to the screen; finished prompts are skipped.",
            show_default=False,
        ),
    ] = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    compare: Annotated[
        Literal["dense"] | None,
        typer.Option(
            help="Also generate with dense attention and say where the two part.", show_default=False
        ),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="End with a table of speed, budget and KV bytes.")
    ] = False,
    backend: options.Backend = "auto",
    mode: options.Mode = "audited",
    audit: options.Audit = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not use the tokenizer's chat template.")] = False,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write text with sparse attention, for one prompt or many.

    The selectors come from a bundle; --delta moves it to another point of its stored risk curve. Nothing is
    promised about a single prompt: δ is an average over prompts like those of the calibration. Prompts of
    different length run together. With --output every finished prompt is kept at once: after Ctrl-C the same
    command continues with the rest. With --json many prompts give one object per line.
    """
    out = Output(as_json=as_json, quiet=quiet)
    prompts = prompt_files.read_prompts(prompt_file)
    file = None if output is None else AnswerFile(output)
    if prompts.ignored:
        out.note(f"keys of {prompt_file} that mean nothing here: {', '.join(prompts.ignored)}")
    from prhs_kernels.runtime.sampling import Sampling

    source = Source(model, bundle, revision, device, dtype, spread="heads")
    sampling = Sampling(temperature, top_p, seed)
    chosen = settings(backend, mode, audit, compares=compare is not None)
    job = Job.prepare(out, source, delta, sampling, chosen, dense=compare is not None)
    requests = job.requests(prompts.prompts, raw, max_new_tokens)
    if prompts.is_text and file is None:
        with interruptible("nothing was printed" if as_json else "the text so far is all there is"):
            answer = continuing.stream(job, requests[0])
        summary = job.summary()
        parts = _parts(job, [answer], stats)
        out.result({**job.facts, **answer, **{n: {**answer[n], **summary[n]} for n in summary}}, *parts)
    else:
        answers = continuing.answer_all(job, prompts.prompts, requests, batch_size, file)
        summary = job.summary()
        whole = {"answers": len(answers), "output": None if file is None else str(file.path)}
        if file is not None:
            parts = [f"{len(answers)} new answers of {len(requests)} prompts in {file.path}"]
            out.result({**job.facts, **whole, **summary}, *parts, *_parts(job, answers, stats))
        elif stats or not out.as_json:  # the answers are on the screen, with --json one per line
            data = {**job.facts, **whole, **summary}
            out.line(data) if out.as_json else out.result(data, *_parts(job, answers, stats))
    finish()


def _parts(job: Job, answers: list[dict[str, Any]], stats: bool) -> list[Any]:
    """The lines about dense attention and the audit, when they ran, and the table, when it was asked for."""
    summary = job.summary()
    lines = [agreement_line(answers)] if answers and "dense" in answers[0] else []
    audited = audit_line(summary, job.facts["delta"])
    return [*lines, *filter(None, [audited]), *([stats_table(summary)] if stats and summary else [])]
