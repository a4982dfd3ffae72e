"""The training run of the second reference model: task rows, a length curriculum up to the full context.

Progress follows the clock (`--minutes`, `--finish-by`) or the tokens (`--tokens`, repeatable). Weights and
curves are published every `save_seconds`, whole or not at all, so that a run cut short loses little.
With `--start` and `--trainable` it fine-tunes some tensors of a checkpoint; the others keep their bits.
"""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import attention_figures, measure
from .attention_loss import row_loss, targets_by_row
from .checkpoint import apply_changes, load_state, publish, save_changes, save_state
from .fused import FusedLlama, fastest_backends
from .loader import Loader
from .model import new_model, save_weights, started_model
from .options import TrainingOptions
from .schedule import (
    FINE_TUNE_STAGES,
    LONG_STAGES,
    long_attention_weight,
    long_learning_rate,
    long_stage,
)
from .task_rows import TaskBatch, TaskRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_EARLY_ROWS = 64
_SHARD = "15MB"


class LongRun:
    """One training run: model, optimizer, loaders, counters and curves."""

    def __init__(
        self,
        options: TrainingOptions,
        tokenizer: "PreTrainedTokenizerFast",
        source: TaskRows,
        held_out: TaskRows,
    ) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.duration = 60.0 * options.minutes if options.minutes is not None else None
        self.step, self.elapsed, self.tokens_seen = 0, 0.0, 0
        self.curves: list[dict[str, Any]] = []
        self.rate_factor = 1.0
        self._last = (0, 0.0)  # tokens and seconds at the last log
        self.items = measure.ItemBuilder(tokenizer, options) if options.evaluate else None
        self.state_path = options.state or options.out / "state.safetensors"
        self.model = started_model(options) if options.start else new_model(options)
        clocked = options.minutes is not None or options.finish_by is not None
        first = 0
        if options.resume:  # workers are forked before the device is touched, so the step is read first
            first = int(load_state(self.state_path, self.model, None)["batches"])
        self.loader = Loader(
            source,
            tokens_per_batch=options.tokens_per_step,
            workers=options.workers,
            length=self._stage(0.0)[0],
            length_of=None if clocked else self._length_of,
            first=first,
        )
        self.held_out = Loader(
            held_out,
            tokens_per_batch=min(options.tokens_per_step, 32768),
            workers=min(1, options.workers),
            length=self._stage(0.0)[0],
        )
        self.model.to(options.device)  # type: ignore[arg-type]
        cuda = options.device.startswith("cuda")
        dtype = torch.bfloat16 if cuda else torch.float32
        self.plain = FusedLlama(self.model, dtype=dtype)
        self.fused = FusedLlama(self.model, dtype=dtype, compiled=options.compile)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=options.peak_lr,
            betas=(0.9, 0.95),
            weight_decay=options.weight_decay,
            fused=cuda,
        )
        if options.resume:
            counters = load_state(self.state_path, self.model, self.optimizer)
            self.step, self.elapsed = counters["step"], counters["elapsed"]
            self.tokens_seen, self.curves = counters["tokens"], counters["curves"]

    @property
    def progress(self) -> float:
        if self.duration is not None:
            return min(1.0, self.elapsed / self.duration)
        return min(1.0, self.tokens_seen / self.options.tokens)

    def _stage(self, progress: float) -> tuple[int, int]:
        """(row length, batches per step)."""
        stages = FINE_TUNE_STAGES if self.options.start else LONG_STAGES
        return long_stage(progress, self.options.context_length, stages, self.options.shortest)

    def _length_of(self, step: int) -> int:
        """Row length of a batch when the run is counted in tokens."""
        done = step * self.options.tokens_per_step / self.options.tokens
        return self._stage(min(done, 1.0))[0]

    def loop(self) -> None:
        """Train until the progress is 1, publish, evaluate."""
        self._warm_up()
        if self.options.finish_by is not None:
            self.duration = max(1.0, self.options.finish_by - time.time() + self.elapsed)
            print(f"training for {self.duration - self.elapsed:.0f} s", flush=True)
        started = time.monotonic() - self.elapsed
        logged = saved = self.elapsed
        last = self.options.stop_after
        figures: dict[str, Any] = {"text": 0.0}
        while self.progress < 1 and not (last and self.step >= last):
            figures = self._train_step()
            self.step += 1
            if self.step % 4 == 0 and self.options.device.startswith("cuda"):
                torch.cuda.synchronize()  # keeps the clock honest: the queue of kernels stays short
            self.elapsed = time.monotonic() - started
            due = self.elapsed - logged >= self.options.log_seconds
            if due or self.step % self.options.log_every == 0:
                logged = self.elapsed
                self._log(figures)
            if self.elapsed - saved >= self.options.save_seconds:
                saved = self.elapsed
                self._save_or_restore(figures)
        self._save_or_restore(figures)
        self.loader.close()
        self.held_out.close()

    def _save_or_restore(self, figures: dict[str, Any]) -> None:
        """Save; if the loss is no longer a number, go back to what was saved and halve the rate instead."""
        if math.isfinite(float(figures["text"])) or not self.state_path.exists():
            self.save()
            return
        print(f"step {self.step}: the loss is not finite; back to the last saved state", flush=True)
        load_state(self.state_path, self.model, self.optimizer)
        self.rate_factor /= 2

    def evaluate(self) -> None:
        """Measure the model as stored (weights rounded to bf16) and write evaluation.json."""
        if self.items is None:
            return
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
        path = (self.options.publish or self.options.out) / "evaluation.json"
        measure.evaluate(self.plain, self.items, path, device=self.options.device)

    def _warm_up(self) -> None:
        """Choose kernels and compile before the clock starts; plain PyTorch where compiling fails."""
        started = time.monotonic()
        first = self._stage(0.0)[0]
        batch = self.loader.source.batch(0, first, max(1, self.options.tokens_per_step // first))
        weight = 0.0 if self.options.start else 1.0
        config, length = self.model.config, self.options.context_length
        rows = max(1, self.options.tokens_per_step // length)
        shape = (rows, config.num_attention_heads, config.num_key_value_heads, length, config.head_dim)
        self.fused.backends = fastest_backends(shape, self.options.device)  # type: ignore[arg-type]
        torch.set_float32_matmul_precision("high")
        try:
            self._loss(batch, weight)[0].backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001  any failure of the compiler leaves the plain path
            if not self.fused.compiled:
                raise
            print(f"not compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)
            self.fused = self.plain
            self._loss(batch, weight)[0].backward()  # type: ignore[no-untyped-call]
        if self.options.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        print(f"warm-up took {time.monotonic() - started:.1f} s", flush=True)

    def _train_step(self) -> dict[str, Any]:
        progress = self.progress
        length, accumulate = self._stage(progress)
        self.loader.set_length(length)
        self.held_out.set_length(length)
        rate = self.rate_factor * long_learning_rate(progress, self.options.peak_lr)
        weight = 0.0 if self.options.start else long_attention_weight(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        figures: dict[str, Any] = {}
        for _ in range(accumulate):
            batch = next(self.loader)
            loss, figures = self._loss(batch, weight)
            (loss / accumulate).backward()  # type: ignore[no-untyped-call]
            self.tokens_seen += batch.ids.size
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**figures, "lr": rate, "length": batch.ids.shape[1], "accumulate": accumulate}

    def _loss(self, batch: TaskBatch, weight: float) -> tuple[Tensor, dict[str, Any]]:
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        early, middle = 1, len(self.model.model.layers) // 2 - 1

        def tap(layer: int, query: Tensor, key: Tensor, value: Tensor, x: Tensor) -> None:
            if layer in (early, middle):
                seen[layer] = (query, key)

        ids, mask = self._device(batch.ids.astype(np.int64)), self._device(batch.text_mask)
        nats = self.fused.nats(ids, tap if weight > 0 else None)
        text = (nats * mask).sum() / mask.sum()
        answer = (
            nats.flatten()[self._device(batch.answers)].mean() if batch.answers.size else text.new_zeros(())
        )
        loss = text + answer
        figures: dict[str, Any] = {"text": text.detach(), "answer": answer.detach()}
        if weight > 0:
            first, second = self._attention_losses(batch, seen[early], seen[middle])
            loss = loss + weight * (first + second)
            figures |= {"attention_early": first.detach(), "attention_middle": second.detach()}
        return loss, figures

    def _attention_losses(
        self, batch: TaskBatch, early: tuple[Tensor, Tensor], middle: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Heads that look one and two tokens back, and one that looks from an answer to what was stated."""
        query, key = early
        rows, length = batch.ids.shape
        group = query.shape[1] // key.shape[1]
        picks = np.random.default_rng(self.step).integers(2, length, size=_EARLY_ROWS)
        at = self._device(picks).expand(rows, -1)
        first = row_loss(query[:, 0], key[:, 0], at, at - 1) + row_loss(
            query[:, group], key[:, 1], at, at - 2
        )
        asked, stated = targets_by_row(batch, np.random.default_rng(self.step))
        query, key = middle
        return first, row_loss(query[:, 0], key[:, 0], self._device(asked) - 1, self._device(stated))

    def _device(self, array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.options.device.startswith("cuda"):
            return tensor.pin_memory().to(self.options.device, non_blocking=True)
        return tensor.to(self.options.device)

    @torch.no_grad()
    def _log(self, figures: dict[str, Any]) -> None:
        batch = next(self.held_out)
        cosines = attention_figures.AdjacentCosine(len(self.model.model.layers))
        ids = self._device(batch.ids.astype(np.int64))
        x = self.plain.hidden(ids, cosines)
        text, answer, exact = measure.batch_figures(self.plain, x, ids, batch)
        row: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens_seen,
            "seconds": self.elapsed,
            **{key: value if isinstance(value, int) else float(value) for key, value in figures.items()},
            "tokens_per_second": round(
                (self.tokens_seen - self._last[0]) / max(1e-9, self.elapsed - self._last[1])
            ),
            "held_out_length": batch.ids.shape[1],
            "held_out_text": text,
            "held_out_answer": answer,
            "adjacent_cosine": [round(float(c), 3) for c in cosines.mean()],
            "exact": {kind: round(share, 4) for kind, share in exact.items()},
        }
        self._last = (self.tokens_seen, self.elapsed)
        self.curves.append({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
        brief = {k: v for k, v in self.curves[-1].items() if k not in ("adjacent_cosine",)}
        print(json.dumps(brief), flush=True)

    def save(self) -> None:
        """Resumable state and weights to `out`; weights and curves to `publish` as well."""
        out = self.options.out
        counters = {
            "step": self.step,
            "elapsed": self.elapsed,
            "tokens": self.tokens_seen,
            "batches": self.loader.step,
            "curves": self.curves,
        }
        save_state(self.state_path, self.model, self.optimizer, counters)
        if self.options.start:
            save_changes(out / "changed.safetensors", self.model)
            apply_changes(self.options.start, out / "changed.safetensors", out)
        else:
            save_weights(self.model, out, max_shard_size=_SHARD)
            (out / "generation_config.json").unlink(missing_ok=True)
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(self.options).items()}
        run = {
            "options": settings,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.options.device.startswith("cuda") else "cpu",
            "compiled": self.fused.compiled,
            "elapsed_seconds": self.elapsed,
            "tokens": self.tokens_seen,
            "steps": self.step,
            "curves": self.curves,
        }
        (out / "curves.json").write_text(json.dumps(run, indent=1) + "\n")
        if self.options.publish:
            try:
                publish(out, self.options.publish)
            except OSError as error:  # the run matters more than this copy
                print(f"not published: {error}", flush=True)
