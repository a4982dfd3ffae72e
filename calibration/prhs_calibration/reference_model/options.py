"""What a training run depends on."""

from dataclasses import dataclass
from pathlib import Path

from .tokenizer import VOCAB_SIZE


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
