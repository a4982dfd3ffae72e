"""What a checkpoint can do, dense, in batches, teacher forced.

Every answer token is the argmax given the tokens before it exactly when greedy decoding writes the answer,
so one forward per item tells what decoding step by step would.
"""

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from prhs_kernels.errors import UsageError

from ..evaluation.tasks import TASKS
from ..evaluation.tasks.assemble import plain_text
from ..evaluation.tasks.types import Templates
from .attention_figures import attention_figures
from .fused import FusedLlama
from .task_rows import TaskBatch
from .tokenizer import BOS_ID

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from .options import TrainingOptions

_TOKENS_PER_BATCH = 65536
_SCORED = 512  # tokens at the end of a window over which perplexity is taken
_WINDOWS = 64


def batch_figures(
    forward: FusedLlama, x: Tensor, ids: Tensor, batch: TaskBatch
) -> tuple[float, float | None, dict[str, float]]:
    """(nats per text token, nats per answer token, share of questions answered right by task)."""
    rows, length = ids.shape
    columns = torch.arange(rows * length, device=ids.device).view(rows, length)
    mask = torch.from_numpy(batch.text_mask).to(ids.device)
    mask[:, 0] = False
    picks = columns[mask]
    picks = picks[:: max(1, len(picks) // 8192)]
    text = functional.cross_entropy(forward.logits(x[picks - 1]), ids.flatten()[picks])
    if not batch.answers.size:
        return float(text), None, {}
    answers = torch.from_numpy(batch.answers).to(ids.device)
    logits = forward.logits(x[answers - 1])
    targets = ids.flatten()[answers]
    right = (logits.argmax(-1) == targets).cpu().numpy()
    whole = np.ones(len(batch.kinds), dtype=bool)
    np.logical_and.at(whole, batch.items, right)
    kinds = np.array(batch.kinds)
    exact = {str(kind): float(whole[kinds == kind].mean()) for kind in np.unique(kinds)}
    return float(text), float(functional.cross_entropy(logits, targets)), exact


class ItemBuilder:
    """Builds the evaluation items in a process of its own while the model trains."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", options: "TrainingOptions") -> None:
        self.folder = options.out / "items"
        self.lengths = tuple(
            length for length in (512, 1024, 2048, 4096, 8192) if length >= options.context_length // 4
        )
        self.lengths = tuple(length for length in self.lengths if length <= options.context_length)
        self.count, self.tokenizer, self.context_length = options.evaluate, tokenizer, options.context_length
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self._build, daemon=True)
        self.process.start()

    def _build(self) -> None:
        torch.set_num_threads(1)
        self.folder.mkdir(parents=True, exist_ok=True)
        windows = text_windows(self.tokenizer, self.context_length, _WINDOWS)
        np.savez(self.folder / "windows.npz", ids=windows)
        for length in self.lengths:
            for name, templates in cells():
                built = build_items(self.tokenizer, name, templates, length, self.count)
                if built is None:
                    continue
                path = self.folder / f"{length}-{name}-{templates}.npz"
                np.savez(path.with_suffix(".partial.npz"), ids=built[0], starts=built[1])
                path.with_suffix(".partial.npz").rename(path)
        (self.folder / "done").touch()

    def wait(self, seconds: float = 120.0) -> None:
        """Wait for the items, for a limited time; what is there by then is used."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.is_alive() and not (self.folder / "done").exists():
            time.sleep(0.2)


def text_windows(tokenizer: "PreTrainedTokenizerBase", size: int, count: int) -> npt.NDArray[np.uint16]:
    """`count` windows of held-out text, `<s>` first: [count, size]."""
    rng = Random("perplexity windows")
    made = [plain_text(tokenizer, length=size, scored=1, rng=rng).input_ids for _ in range(count)]
    return np.array(made, dtype=np.uint16)


def cells() -> list[tuple[str, Templates]]:
    """(task, templates) of everything measured by exact match."""
    names = [task.name for task in TASKS.values() if task.metric == "exact"]
    return [(name, templates) for name in names for templates in get_args(Templates)]


def build_items(
    tokenizer: "PreTrainedTokenizerBase", name: str, templates: Templates, length: int, count: int
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]] | None:
    """(ids [count, length], first answer position [count]); None when the task does not fit the length."""
    ids = np.zeros((count, length), dtype=np.uint16)
    starts = np.zeros(count, dtype=np.int64)
    try:
        for index in range(count):
            item = TASKS[name].build(tokenizer, length=length, seed=index, templates=templates)
            ids[index] = item.input_ids
            starts[index] = length - len(item.answer_ids)
    except UsageError as error:
        print(f"no items: {name} at {length}: {error}", flush=True)
        return None
    return ids, starts


@torch.no_grad()
def evaluate(forward: FusedLlama, items: ItemBuilder, path: Path, *, device: str) -> dict[str, Any]:
    """All figures of a checkpoint; the file is rewritten after each part, so that a stop keeps the rest."""
    started = time.monotonic()
    items.wait()
    table: dict[str, Any] = {}
    result: dict[str, Any] = {
        "conditions": {
            "items_per_cell": items.count,
            "dtype": str(forward.dtype),
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
            "attention": "dense, teacher forced",
        },
        "exact_match": table,
    }
    windows = np.load(items.folder / "windows.npz")["ids"]
    result["perplexity"] = _perplexities(forward, windows, device)
    _write(path, result)
    prompts = windows[:4]
    result["attention"] = {"held_out_text": attention_figures(forward, prompts, device)}
    _write(path, result)
    for length in items.lengths:
        for file in sorted(items.folder.glob(f"{length}-*.npz")):
            if file.name.endswith(".partial.npz"):
                continue
            with np.load(file) as data:
                share = exact_share(forward, data["ids"], data["starts"], device)
            _, task, templates = file.stem.split("-")
            table.setdefault(templates, {}).setdefault(task, {})[str(length)] = round(share, 4)
        result["seconds"] = round(time.monotonic() - started, 1)
        _write(path, result)
        print(
            json.dumps(
                {
                    "length": length,
                    **{t: {k: v.get(str(length)) for k, v in r.items()} for t, r in table.items()},
                }
            )
        )
    needles = items.folder / f"{items.lengths[-1]}-multi_key_needle-seen.npz"
    if needles.exists():
        with np.load(needles) as data:
            result["attention"]["multi_key_needle"] = attention_figures(forward, data["ids"][:4], device)
    result["seconds"] = round(time.monotonic() - started, 1)
    _write(path, result)
    return result


def exact_share(
    forward: FusedLlama, ids: npt.NDArray[np.uint16], starts: npt.NDArray[np.int64], device: str
) -> float:
    """Share of items whose tokens from `starts` on are all the argmax."""
    length = ids.shape[1]
    size = max(1, _TOKENS_PER_BATCH // length)
    right = 0
    for first in range(0, len(ids), size):
        tokens = torch.from_numpy(ids[first : first + size].astype(np.int64)).to(device)
        x = forward.hidden(tokens).view(len(tokens), length, -1)
        for row, start in enumerate(starts[first : first + size].tolist()):
            guesses = forward.logits(x[row, start - 1 : length - 1]).argmax(-1)
            right += bool((guesses == tokens[row, start:]).all())
    return right / len(ids)


def _perplexities(forward: FusedLlama, windows: npt.NDArray[np.uint16], device: str) -> dict[str, Any]:
    """Perplexity of the same last tokens of each window, given contexts of several lengths."""
    full = windows.shape[1]
    scored = min(_SCORED, full // 4)
    lengths = sorted({length for length in (1024, 2048, 4096, full) if 2 * scored <= length <= full} | {full})
    rows: dict[str, Any] = {"scored_tokens": int(scored * len(windows)), "by_context": {}}
    for length in lengths:
        cut = np.concatenate(
            (np.full((len(windows), 1), BOS_ID, dtype=np.uint16), windows[:, 1 - length :]), axis=1
        )
        size, total = max(1, _TOKENS_PER_BATCH // length), 0.0
        for first in range(0, len(cut), size):
            tokens = torch.from_numpy(cut[first : first + size].astype(np.int64)).to(device)
            x = forward.hidden(tokens).view(len(tokens), length, -1)[:, -scored - 1 : -1]
            total += float(
                functional.cross_entropy(
                    forward.logits(x).flatten(0, 1), tokens[:, -scored:].flatten(), reduction="sum"
                )
            )
        rows["by_context"][str(length)] = round(float(np.exp(total / (scored * len(windows)))), 4)
    return rows


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _cell(job: tuple[str, str, Templates, int, int]) -> tuple[Any, ...]:
    """Items of one cell, in a process of a pool."""
    from transformers import AutoTokenizer

    folder, name, templates, length, count = job
    return (*job, build_items(AutoTokenizer.from_pretrained(folder), name, templates, length, count))


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Measure the checkpoint in a folder; the output file is rewritten after every cell."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(prog="python -m prhs_calibration.reference_model.measure")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100, help="items per cell")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096, 8192])
    parser.add_argument("--templates", nargs="*", default=list(get_args(Templates)))
    parser.add_argument("--tasks", nargs="*", default=sorted({name for name, _ in cells()}))
    parser.add_argument("--windows", type=int, default=_WINDOWS, help="windows of text, 0 for none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args(argv)
    wanted = [(n, t) for n, t in cells() if n in options.tasks and t in options.templates]
    jobs = [
        (str(options.folder), n, t, length, options.count) for length in options.lengths for n, t in wanted
    ]
    pool = multiprocessing.get_context("fork").Pool(options.workers) if options.workers else None
    built = pool.imap(_cell, jobs) if pool else map(_cell, jobs)
    model: Any = AutoModelForCausalLM.from_pretrained(str(options.folder), dtype=torch.float32)
    model.to(options.device)
    cuda = options.device.startswith("cuda")
    forward = FusedLlama(model, dtype=torch.bfloat16 if cuda else torch.float32)
    table: dict[str, Any] = {}
    result: dict[str, Any] = {
        "conditions": {
            "items_per_cell": options.count,
            "dtype": str(forward.dtype),
            "device": torch.cuda.get_device_name() if cuda else options.device,
            "torch": torch.__version__,
            "command": sys.argv[1:],
        },
        "exact_match": table,
    }
    if options.windows:
        tokenizer = AutoTokenizer.from_pretrained(str(options.folder))
        windows = text_windows(tokenizer, model.config.max_position_embeddings, options.windows)
        result["perplexity"] = _perplexities(forward, windows, options.device)
        result["attention"] = {"held_out_text": attention_figures(forward, windows[:4], options.device)}
        _write(options.output, result)
    for _, name, templates, length, _, items in built:
        if items is None:
            continue
        share = exact_share(forward, items[0], items[1], options.device)
        table.setdefault(templates, {}).setdefault(name, {})[str(length)] = round(share, 4)
        print(length, name, templates, share, flush=True)
        _write(options.output, result)
    if pool:
        pool.terminate()


if __name__ == "__main__":
    main()
