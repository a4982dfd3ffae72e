"""`prhs generate`: stream text with sparse attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prhs_cli import options, prompting
from prhs_cli.loading import Source
from prhs_cli.output import Output, interruptible, table

if TYPE_CHECKING:
    from prhs_calibration.models import LoadedModel
    from prhs_kernels.params import SelectorParams
    from prhs_kernels.runtime.decode import Sampling

EPILOG = """\b
Examples:
  prhs generate --prompt-file question.txt --stats
  cat question.txt | prhs generate --prompt-file - --max-new-tokens 200
  prhs generate --prompt-file question.txt --delta 0.1 --compare dense
  prhs generate --prompt-file question.txt --temperature 0.8 --top-p 0.95 --seed 1"""


def command(
    prompt_file: Annotated[
        str,
        typer.Option(
            metavar="FILE|-", help="Text to continue, UTF-8; `-` reads standard input.", show_default=False
        ),
    ],
    model: options.Model = "reference",
    bundle: options.BundleOption = None,
    delta: options.BundleDelta = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Stop after so many tokens.")] = 64,
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
    raw: Annotated[bool, typer.Option("--raw", help="Do not use the tokenizer's chat template.")] = False,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write text with sparse attention, token by token.

    The selectors come from a bundle; --delta moves it to another point of its stored risk curve. Nothing is
    promised about a single prompt: δ is an average over prompts like those of the calibration.
    """
    out = Output(as_json=as_json, quiet=quiet)
    text = prompting.read_prompt(prompt_file)
    from prhs_kernels.runtime.attach import dense_params
    from prhs_kernels.runtime.decode import Sampling

    loaded, chosen = Source(model, bundle, revision, device, dtype).open(out)
    dial = chosen.metadata.dial_index if delta is None else chosen.dial_for(delta)
    variants = {"sparse": chosen.params(dial)} | (
        {"dense": dense_params(loaded.model.config)} if compare else {}
    )
    runs = Runs(out, loaded, text, raw, max_new_tokens, Sampling(temperature, top_p, seed))
    with interruptible("the text so far is all there is"):
        data = {name: runs.run(name, params, titled=bool(compare)) for name, params in variants.items()}
    report = {
        "model": loaded.model_id,
        "bundle": str(chosen.path),
        "delta": chosen.metadata.delta if delta is None else delta,
        "lambda": float(chosen.dial[dial]),
        **data,
    }
    if compare:
        report["same_tokens"] = _common_prefix(data["sparse"]["tokens"], data["dense"]["tokens"])
    parts = [_agreement(report)] if compare else []
    out.result(report, *parts, *([_stats(data)] if stats else []))


class Runs:
    """The prompt, ready to be continued with different selector parameters."""

    def __init__(
        self, out: Output, loaded: LoadedModel, text: str, raw: bool, max_new_tokens: int, sampling: Sampling
    ) -> None:
        from prhs_calibration import memory

        self.out, self.loaded, self.sampling = out, loaded, sampling
        self.prompt = prompting.encode_prompt(loaded.tokenizer, text, raw=raw)
        self.limit = prompting.new_token_limit(len(self.prompt), max_new_tokens, loaded.context_length)
        if self.limit < max_new_tokens:
            out.note(f"at most {self.limit} new tokens fit the context of {loaded.context_length}")
        needed = memory.run_bytes(loaded.model.config, len(self.prompt) + self.limit, loaded.model.dtype)
        memory.check_memory(
            needed, loaded.model.device, f"a context of {len(self.prompt) + self.limit} tokens"
        )
        self.stops = prompting.stop_token_ids(loaded.model, loaded.tokenizer)

    def run(self, name: str, params: SelectorParams, *, titled: bool) -> dict[str, Any]:
        """Stream one continuation and return its text, token ids and statistics."""
        from prhs_kernels.runtime.decode import Generation, generate_tokens

        if titled:
            self.out.text(f"--- {name} ---\n")
        run, words, tokens, pieces = Generation(), prompting.Detokenizer(self.loaded.tokenizer), [], []
        steps = generate_tokens(
            self.loaded.model,
            [self.prompt],
            params,
            max_new_tokens=self.limit,
            sampling=self.sampling,
            stop_token_ids=self.stops,
            run=run,
        )
        for (token,) in steps:
            assert token is not None  # a single prompt ends the loop when it ends
            tokens.append(token)
            pieces.append(words.add(token))
            self.out.text(pieces[-1])
        pieces.append(words.finish())
        self.out.text(pieces[-1] + "\n")
        return {"text": "".join(pieces), "tokens": tokens, **run.to_dict()}


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _agreement(report: dict[str, Any]) -> str:
    sparse, dense, same = report["sparse"]["tokens"], report["dense"]["tokens"], report["same_tokens"]
    if sparse == dense:
        return f"sparse and dense agree on all {same} tokens"
    return f"sparse and dense agree on the first {same} of {max(len(sparse), len(dense))} tokens"


def _stats(data: dict[str, dict[str, Any]]) -> Any:
    names = [name for name in next(iter(data.values())) if name not in ("text", "tokens")]
    rows = [[LABELS.get(name, name), *(data[variant][name] for variant in data)] for name in names]
    return table(["", *data], rows)


LABELS = {
    "prompt_tokens": "prompt tokens",
    "new_tokens": "new tokens",
    "time_to_first_token": "time to first token [s]",
    "tokens_per_second": "decode steps per second",
    "retrieval_ratio": "retrieval ratio ρ",
    "effective_budget": "effective budget [positions]",
    "attended_fraction": "attended fraction",
    "kv_bytes_read": "KV bytes read, scans included / dense",
    "kv_bytes_resident": "KV bytes resident",
    "kv_bytes_resident_dense": "KV bytes resident, dense",
}
