"""Train the embedded model from scratch: `python -m prhs_calibration.reference_model.train --minutes 45`.

One script for two CPU cores and for a GPU. Seeded and resumable: with `--tokens` a run that was interrupted
and resumed ends with the same bits (on the same machine); with `--minutes` the schedule follows the clock.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import data
from .batches import BatchSource
from .long_run import LongRun
from .options import TrainingOptions
from .recall import draw_facts
from .short_run import ShortRun
from .task_rows import TaskRows
from .tokenizer import load_tokenizer, save_tokenizer, tokenize, train_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def main(argv: list[str] | None = None) -> None:
    """Command line: every field of TrainingOptions is an option of the same name."""
    parser = argparse.ArgumentParser(
        prog="python -m prhs_calibration.reference_model.train", description=__doc__
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for weights, tokenizer, curves, state"
    )
    for name in ("text", "state", "tokenised", "publish", "start"):
        parser.add_argument(f"--{name}", type=Path, default=argparse.SUPPRESS)
    for name in "minutes peak-lr weight-decay rope-theta finish-by save-seconds log-seconds wide".split():
        parser.add_argument(f"--{name}", type=float, default=argparse.SUPPRESS)
    sizes = (
        "tokens seed hidden layers ffn context-length tokens-per-step workers save-every log-every stop-after"
    )
    sizes += " vocab query-heads kv-heads head-dim favoured shortest evaluate"
    for name in sizes.split():
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("trainable", "emphasis"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--recipe", choices=("short", "long"), default="short")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--resume", action="store_true")
    train(TrainingOptions(**vars(parser.parse_args(argv))))


def train(options: TrainingOptions) -> "LlamaForCausalLM":
    """Run the schedule; writes `out` (bf16 checkpoint, tokenizer, curves.json) and the resumable state."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.recipe == "long":
        return _train_long(options)
    texts = data.unpack(options.text.read_bytes()) if options.text else data.training_files()
    tokenizer = make_tokenizer(options, texts)
    source = BatchSource(tokenizer, tokenize(tokenizer, texts), options.seed)
    held_out = BatchSource(tokenizer, tokenize(tokenizer, data.held_out_files(), limit=400), options.seed + 1)
    run = ShortRun(options, source, held_out)
    run.loop()
    return run.model


def _train_long(options: TrainingOptions) -> "LlamaForCausalLM":
    texts = {} if options.tokenised else data.training_files()
    tokenizer = load_tokenizer(options.start) if options.start else make_tokenizer(options, texts)
    tokens = (
        data.unpack_tokens(options.tokenised.read_bytes())
        if options.tokenised
        else tokenize(tokenizer, texts)
    )
    held_out = tokenize(tokenizer, data.held_out_files(), limit=400)
    run = LongRun(
        options,
        tokenizer,
        TaskRows(
            tokenizer, tokens, options.seed, options.favoured, wide=options.wide, emphasis=options.emphasis
        ),
        TaskRows(tokenizer, held_out, options.seed + 1, wide=options.wide),
    )
    run.loop()
    run.evaluate()
    return run.model


def make_tokenizer(options: TrainingOptions, texts: dict[str, str]) -> "PreTrainedTokenizerFast":
    """The tokenizer in `out` if there is one, else one trained on modules and recall sentences, and saved."""
    from random import Random

    if (options.out / "tokenizer.json").exists():
        return load_tokenizer(options.out)
    facts = draw_facts(Random(options.seed), 1000)
    sentences = [f"{fact.sentence}\n{fact.question}{fact.answer}\n" for fact in facts]
    modules = [text for name, text in texts.items() if "test/" not in name]
    tokenizer = train_tokenizer([*modules, *sentences], options.context_length, options.vocab)
    save_tokenizer(tokenizer, options.out)
    return tokenizer


if __name__ == "__main__":
    main()
