"""Train the embedded model from scratch: `python -m prhs_calibration.reference_model.train --minutes 45`.

One script for two CPU cores and for a GPU. Seeded and resumable: with `--tokens` a run that was interrupted
and resumed ends with the same bits (on the same machine); with `--minutes` the schedule follows the clock.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from prhs_kernels.errors import InputError

from . import data
from .attention_loss import AttentionTap
from .batches import Batch, BatchSource
from .checkpoint import load_state, save_state
from .recall import DIGITS, draw_facts
from .schedule import attention_loss_weight, learning_rate, stage_at
from .tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, save_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class TrainingOptions:
    """Everything a run depends on; `minutes` (wall clock) or `tokens` says how long, `minutes` first."""

    out: Path
    tokens: int = 12_000_000
    minutes: float | None = None
    device: str = "cpu"
    seed: int = 0
    resume: bool = False
    hidden: int = 256
    layers: int = 8
    ffn: int = 640
    context_length: int = 2048
    tokens_per_step: int = 8192
    peak_lr: float = 2e-3
    weight_decay: float = 0.05
    workers: int = 0
    save_every: int = 500  # steps
    log_every: int = 50  # steps
    stop_after: int | None = None  # steps; for tests of resuming
    text: Path | None = None  # packed training text instead of this Python's standard library
    state: Path | None = None  # default: out/state.safetensors
    recipe: str = "short"  # "short": facts up to 2,048 tokens; "long": tasks up to the whole context
    vocab: int = VOCAB_SIZE  # of a tokenizer trained here
    query_heads: int | None = None  # default: hidden / 32
    kv_heads: int | None = None  # default: hidden / 64
    head_dim: int | None = None  # default: hidden / query heads
    rope_theta: float = 10_000.0
    tokenised: Path | None = (
        None  # training text as tokens of out's tokenizer (`pack_tokens`), instead of text
    )
    favoured: int = 0  # tokens at the front of `tokenised` that are drawn more often
    compile: bool = False
    finish_by: float | None = None  # Unix time at which training has to end; long recipe
    publish: Path | None = None  # folder that gets weights and curves every save_seconds; long recipe
    save_seconds: float = 75.0
    log_seconds: float = 10.0
    start: Path | None = None  # checkpoint to fine-tune instead of a new model; long recipe
    trainable: str = ""  # regular expression: only tensors whose names it is found in are trained
    wide: float = 0.0  # share of the episodes in wider wordings; long recipe
    emphasis: str = ""  # kinds of episodes drawn four times as often, with commas between; long recipe
    shortest: int = 0  # tokens of the shortest rows of the curriculum; long recipe
    evaluate: int = 0  # items per task, length and forms in the measurement at the end; long recipe


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
    run = _Run(options, source, held_out)
    run.loop()
    return run.model


def _train_long(options: TrainingOptions) -> "LlamaForCausalLM":
    from .long_run import LongRun
    from .task_rows import TaskRows

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


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer saved in a folder."""
    from transformers import PreTrainedTokenizerFast

    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(folder))
    return loaded


def tokenize(
    tokenizer: "PreTrainedTokenizerFast", texts: dict[str, str], limit: int | None = None
) -> npt.NDArray[np.uint16]:
    """All files after one another, each ended by `</s>`; `limit` takes the first files only."""
    encoded = tokenizer(list(texts.values())[:limit], add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([*ids, EOS_ID], dtype=np.uint16) for ids in encoded])


def new_model(options: TrainingOptions) -> "LlamaForCausalLM":
    """Llama with weights drawn at std 1/sqrt(hidden): at this width the usual 0.02 never learns to recall."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    query_heads = options.query_heads or options.hidden // 32
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_hidden_layers=options.layers,
        num_attention_heads=query_heads,
        num_key_value_heads=options.kv_heads or options.hidden // 64,
        head_dim=options.head_dim or options.hidden // query_heads,
        rope_parameters={"rope_type": "default", "rope_theta": options.rope_theta},
        max_position_embeddings=options.context_length,
        initializer_range=options.hidden**-0.5,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def started_model(options: TrainingOptions) -> "LlamaForCausalLM":
    """The model of `start` in fp32, only the tensors that `trainable` is found in to be trained."""
    from transformers import LlamaForCausalLM

    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(str(options.start), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(re.search(options.trainable, name)))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"no tensor of {options.start} matches --trainable {options.trainable!r}")
    return model


def save_weights(model: "LlamaForCausalLM", out: Path, max_shard_size: str = "1GB") -> None:
    """Write the bf16 checkpoint; the fp32 weights of the model in training stay as they are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_dict({**model.config.to_dict(), "dtype": "bfloat16"})
    rounded = LlamaForCausalLM(config)
    rounded.to(torch.bfloat16)  # type: ignore[arg-type]
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(str(out), max_shard_size=max_shard_size)


class _Run:
    """One training run: model, optimizer, counters and curves."""

    def __init__(self, options: TrainingOptions, source: BatchSource, held_out: BatchSource) -> None:
        self.options, self.source, self.held_out = options, source, held_out
        self.model = new_model(options)
        self.model.to(options.device)  # type: ignore[arg-type]
        self.tap = AttentionTap(options.layers)
        self.tap.install(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=options.peak_lr,
            betas=(0.9, 0.95),
            weight_decay=options.weight_decay,
            fused=options.device.startswith("cuda"),
        )
        self.state_path = options.state or options.out / "state.safetensors"
        self.step, self.elapsed, self.curves = 0, 0.0, list[dict[str, Any]]()
        if options.resume:
            counters = load_state(self.state_path, self.model, self.optimizer)
            self.step, self.elapsed, self.curves = counters["step"], counters["elapsed"], counters["curves"]

    @property
    def progress(self) -> float:
        if self.options.minutes is not None:
            return min(1.0, self.elapsed / (60 * self.options.minutes))
        return min(1.0, self.step * self.options.tokens_per_step / self.options.tokens)

    def loop(self) -> None:
        started = time.monotonic() - self.elapsed
        last = self.options.stop_after
        while self.progress < 1 and not (last and self.step >= last):
            length, end = stage_at(self.progress, self.options.context_length)
            for batch in self._batches(length):
                figures = self._train_step(batch)
                self.step += 1
                self.elapsed = time.monotonic() - started
                if self.step % self.options.log_every == 0:
                    self._log(length, figures)
                if self.step % self.options.save_every == 0:
                    self.save()
                if self.progress >= end - 1e-9 or (last and self.step >= last):
                    break
        self.save()

    def _batches(self, length: int) -> Iterator[Batch]:
        from torch.utils.data import DataLoader

        self.source.length, self.source.batch_size = length, max(1, self.options.tokens_per_step // length)
        workers = self.options.workers
        return iter(
            DataLoader(
                self.source,  # type: ignore[arg-type]
                batch_size=None,
                sampler=range(self.step, 1 << 40),
                collate_fn=_as_is,  # type: ignore[arg-type]
                num_workers=workers,
                prefetch_factor=8 if workers else None,
            )
        )

    def _train_step(self, batch: Batch) -> dict[str, Tensor | float]:
        self.model.train()
        device, weight = self.options.device, attention_loss_weight(self.progress)
        rate = learning_rate(self.progress, self.options.peak_lr)
        self.tap.enabled = weight > 0
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16):
            text, answer, _ = score(self.model, batch, device)
            loss = text + answer
            figures: dict[str, Tensor | float] = {
                "text": text.detach(),
                "answer": answer.detach(),
                "lr": rate,
            }
            if weight > 0:
                rows = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.step)
                answers, planted = (torch.from_numpy(a).to(device) for a in (batch.answers, batch.planted))
                early, middle = self.tap.losses(answers, planted, rows)
                loss = loss + weight * (early + middle)
                figures |= {"attention_early": early.detach(), "attention_middle": middle.detach()}
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return figures

    @torch.no_grad()
    def _log(self, length: int, figures: dict[str, Tensor | float]) -> None:
        self.model.eval()
        self.tap.enabled = False
        self.held_out.length, self.held_out.batch_size = length, max(4, min(256, 65536 // length))
        if self.options.device == "cpu":
            self.held_out.batch_size = max(2, 8192 // length)
        text, answer, exact = score(self.model, self.held_out[self.step], self.options.device)
        tokens = self.step * self.options.tokens_per_step
        row: dict[str, Any] = {"step": self.step, "tokens": tokens, "length": length, "seconds": self.elapsed}
        row |= {f"train_{key}": float(value) for key, value in figures.items()}
        row |= {
            "held_out_text": float(text),
            "held_out_answer": float(answer),
            "held_out_recall": float(exact),
        }
        self.curves.append({key: round(value, 5) for key, value in row.items()})
        print(json.dumps(self.curves[-1]), flush=True)

    def save(self) -> None:
        """Weights, curves and resumable state."""
        counters = {"step": self.step, "elapsed": self.elapsed, "curves": self.curves}
        save_state(self.state_path, self.model, self.optimizer, counters)
        save_weights(self.model, self.options.out)
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(self.options).items()}
        curves = {"options": settings, "elapsed_seconds": self.elapsed, "curves": self.curves}
        (self.options.out / "curves.json").write_text(json.dumps(curves, indent=1) + "\n")


def score(model: "LlamaForCausalLM", batch: Batch, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(mean nats per text token, mean nats per answer digit, share of answers right in every digit)."""
    ids = torch.from_numpy(batch.ids).to(device, non_blocking=True)
    logits = model(input_ids=ids, use_cache=False).logits
    nats = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    nats = nats.view(ids.shape[0], -1)
    mask = torch.from_numpy(batch.text_mask).to(device)[:, 1:]
    answers = torch.from_numpy(batch.answers).to(device)
    asked = answers >= 0
    rows = answers.clamp(min=1) - 1
    answer_nats = nats.gather(1, rows) * asked
    right = (logits[:, :-1].argmax(-1) == ids[:, 1:]).gather(1, rows)
    whole = right.unflatten(1, (-1, DIGITS)).all(-1) & asked.unflatten(1, (-1, DIGITS)).all(-1)
    count = asked.sum().clamp(min=1)
    return (nats * mask).sum() / mask.sum(), answer_nats.sum() / count, whole.sum() * DIGITS / count


def _as_is(batch: Batch) -> Batch:
    return batch


if __name__ == "__main__":
    main()
