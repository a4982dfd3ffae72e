"""`make demo`: every verb once on the embedded model, and its claims checked. Exits 1 when one fails."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from prhs_calibration.results import read_result
from prhs_cli.app import run

FOLDER = Path("demo-output")
DELTA = 0.02  # promised by the bundle and checked by verify-bound
GENERATION_DELTA = 0.1  # at which text is generated
SEEDS = (0, 1, 2)
PROMPT_TOKENS = 2_000  # at least; some of the context is left for the answer
NEW_TOKENS = 8  # a space and five digits, and a little more
MAX_ATTENDED = 0.25  # fraction of the positions
MAX_SECONDS = 8 * 60.0


class Demo:
    """Runs verbs as a user would type them, and remembers which claims failed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failed: list[str] = []
        self.started = time.monotonic()

    def verb(self, *arguments: str) -> int:
        """Show the command line, run it and return its exit code; anything but 0 and 1 ends the demo."""
        print(f"\n$ prhs {' '.join(arguments)}", flush=True)
        began = time.monotonic()
        code = run(arguments)
        print(f"[{time.monotonic() - began:.0f} s]", flush=True)
        if code not in (0, 1):
            raise SystemExit(code)
        return code

    def json(self, *arguments: str) -> dict[str, Any]:
        """Run a verb quietly and return the object it prints."""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = run([*arguments, "--json", "--quiet"])
        if code:
            raise SystemExit(code)
        return dict(json.loads(printed.getvalue()))

    def claim(self, text: str, holds: bool) -> None:
        """Print a claim with its state and remember a failure."""
        print(f"  {'ok    ' if holds else 'FAILED'} {text}", flush=True)
        if not holds:
            self.failed.append(text)


def main() -> int:
    """Run the demo in `demo-output/` and return the exit code."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the package
    FOLDER.mkdir(exist_ok=True)
    demo = Demo(FOLDER)
    bundle = str(FOLDER / "bundle.safetensors")
    demo.verb("calibrate", "reference", "--delta", str(DELTA), "--output", bundle)
    demo.verb("inspect", bundle)
    _verify(demo, bundle)
    _generate(demo, bundle)
    _analyze(demo, bundle)
    seconds = time.monotonic() - demo.started
    demo.claim(f"the demo took {seconds:.0f} s, at most {MAX_SECONDS:.0f} s", seconds <= MAX_SECONDS)
    print("\nwritten:")
    for path in sorted(FOLDER.iterdir()):
        print(f"  {path.resolve()}")
    print("\nall claims hold" if not demo.failed else f"\n{len(demo.failed)} claims FAILED")
    return 1 if demo.failed else 0


def _verify(demo: Demo, bundle: str) -> None:
    result = demo.folder / "bound.json"
    code = demo.verb("verify-bound", "--delta", str(DELTA), "--bundle", bundle, "--output", str(result))
    data = read_result(result, kind="bound")["data"]
    demo.claim(
        f"dropped mass {data['decision']['mean']:.4g} on held-out prompts, {data['verdict']} at δ = {DELTA}",
        code == 0 and data["verdict"] != "violated",
    )


def _generate(demo: Demo, bundle: str) -> None:
    from transformers import AutoTokenizer

    from prhs_calibration import corpus
    from prhs_calibration.reference_model import reference_path

    tokenizer = AutoTokenizer.from_pretrained(reference_path())
    options = ["--bundle", bundle, "--delta", str(GENERATION_DELTA), "--max-new-tokens", str(NEW_TOKENS)]
    print(f"\nA random fact is planted in {PROMPT_TOKENS:,} tokens of real text, then asked for.")
    for seed in SEEDS:
        prompt, answer = corpus.recall_prompt(tokenizer, num_tokens=PROMPT_TOKENS, seed=seed)
        control, _ = corpus.recall_prompt(tokenizer, num_tokens=PROMPT_TOKENS, seed=seed, with_fact=False)
        files = {name: demo.folder / f"{name}-{seed}.txt" for name in ("prompt", "control")}
        files["prompt"].write_text(prompt, encoding="utf-8")
        files["control"].write_text(control, encoding="utf-8")
        if seed == SEEDS[0]:
            demo.verb(
                "generate", "--prompt-file", str(files["prompt"]), *options, "--compare", "dense", "--stats"
            )
        _check_seed(demo, seed, answer.strip(), files, [*options, "--compare", "dense"])


def _check_seed(demo: Demo, seed: int, answer: str, files: dict[str, Path], options: list[str]) -> None:
    found = {
        name: demo.json("generate", "--prompt-file", str(path), *options) for name, path in files.items()
    }
    sparse, dense = found["prompt"]["sparse"], found["prompt"]["dense"]
    tokens = sparse["prompt_tokens"]
    demo.claim(f"seed {seed}: the prompt has {tokens} tokens", tokens >= PROMPT_TOKENS)
    for name, text in (("dense", dense["text"]), ("sparse", sparse["text"])):
        demo.claim(f"seed {seed}: {name} finds the fact {answer}: {text!r}", answer in text)
    without = [found["control"][name]["text"] for name in ("dense", "sparse")]
    demo.claim(
        f"seed {seed}: without the fact neither does: {without[0]!r}, {without[1]!r}",
        all(answer not in text for text in without),
    )
    attended = sparse["attended_fraction"]
    demo.claim(
        f"seed {seed}: sparse at δ = {GENERATION_DELTA} attends {attended:.3f} of the positions "
        f"(effective budget {sparse['effective_budget']:.0f}, ρ = {_number(sparse['retrieval_ratio'])}); "
        f"KV bytes read, scans included: {sparse['kv_bytes_read']:.3f} of dense",
        attended <= MAX_ATTENDED,
    )


def _analyze(demo: Demo, bundle: str) -> None:
    result, figure = demo.folder / "posterior-bias.json", demo.folder / "posterior-bias.png"
    demo.verb("analyze", "posterior-bias", "--bundle", bundle, "--output", str(result))
    demo.verb("plot", "posterior-bias", str(result), "--output", str(figure))
    demo.claim("the figure is drawn", figure.stat().st_size > 0)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
