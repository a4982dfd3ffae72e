"""The models whose sizes are measured, as plain data; weights are random, their values cost no time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

from prhs_kernels.errors import UsageError


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with grouped-query attention and a gated feed-forward layer.

    `family` is transformers' model type. Sizes as in the models' published configuration files; for a shape
    per rank, what one rank of that tensor parallelism holds (communication is not measured).
    """

    name: str
    family: str
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocabulary: int
    rope_theta: float = 10000.0
    tied: bool = False  # the output layer is the embedding

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def num_parameters(self) -> int:
        """Weights, norms and biases left out (below 0.1 %)."""
        attention = 2 * self.hidden * self.head_dim * (self.num_qo_heads + self.num_kv_heads)
        layers = self.num_layers * (attention + 3 * self.hidden * self.ffn)
        return layers + (1 if self.tied else 2) * self.vocabulary * self.hidden

    @property
    def parameters_read(self) -> int:
        """Weights that one decode step reads: all but the embedding, of which it reads a row per sequence."""
        return self.num_parameters - (0 if self.tied else self.vocabulary * self.hidden)

    def kv_bytes(self, batch: int, positions: int, item: int) -> int:
        """Keys and values of all layers; `item` bytes per number."""
        return 2 * self.num_layers * batch * self.num_kv_heads * positions * self.head_dim * item


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("llama-2-7b", "llama", 32, 32, 32, 128, 4096, 11008, 32000),
        ModelShape("llama-3-8b", "llama", 32, 32, 8, 128, 4096, 14336, 128256, 500000.0),
        ModelShape("llama-3-70b-tp8", "llama", 80, 8, 1, 128, 8192, 3584, 16032, 500000.0),
        ModelShape("mistral-7b", "mistral", 32, 32, 8, 128, 4096, 14336, 32768, 1e6),
        ModelShape("qwen2.5-7b", "qwen2", 28, 28, 4, 128, 3584, 18944, 152064, 1e6),
        ModelShape("qwen3-8b", "qwen3", 36, 32, 8, 128, 4096, 12288, 151936, 1e6),
    )
}
TOY = ModelShape("toy", "llama", 2, 4, 2, 64, 64, 96, 256)  # for the interpreter; no model's


def find(name: str) -> ModelShape:
    """The shape of this name; UsageError with the known ones."""
    if name == TOY.name:
        return TOY
    if name not in SHAPES:
        raise UsageError(f"shape {name!r} is not known; choose from {', '.join(SHAPES)}")
    return SHAPES[name]


SMALLEST = 40  # kept positions: sinks, local ones and a few chosen ones


@dataclasses.dataclass(frozen=True)
class Point:
    """What a benchmark is run at: `kept` of `context` positions per KV head."""

    shape: ModelShape
    batch: int
    context: int
    kept: int


def grid(
    shapes: Iterable[str], batches: Iterable[int], contexts: Iterable[int], kept: Iterable[int | float]
) -> tuple[Point, ...]:
    """Every combination. `kept` below 1 is a fraction of the context, else positions.

    Raises:
        UsageError: an unknown shape, a size below 1, or nothing to choose from.
    """
    points = []
    found = [find(name) for name in shapes]
    for shape, batch, context, keep in itertools.product(found, batches, contexts, kept):
        if batch < 1 or context < 1:
            raise UsageError(f"batch {batch} and context {context} must be at least 1")
        positions = round(keep * context) if keep < 1 else int(keep)
        if not SMALLEST <= positions < context:
            raise UsageError(
                f"kept {keep:g} means {positions} of {context} positions; it must be at least {SMALLEST} "
                "and less than the context"
            )
        points.append(Point(shape, batch, context, positions))
    return tuple(points)


def check_ratios(ratios: Iterable[float]) -> None:
    """UsageError for a retrieval ratio that is no fraction."""
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            raise UsageError(f"retrieval ratio {ratio:g} is not between 0 and 1")
