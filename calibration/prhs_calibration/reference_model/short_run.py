"""The training run of the first reference model: facts in text, with a loss on the attention of two heads."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from .attention_loss import AttentionTap
from .batches import Batch, BatchSource
from .checkpoint import load_state, save_state
from .model import new_model, save_weights
from .options import TrainingOptions
from .recall import DIGITS
from .schedule import attention_loss_weight, learning_rate, stage_at

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class ShortRun:
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
