"""How much memory a decode run needs beyond the weights, asked before any of it is taken."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import traceback
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedConfig

from prhs_kernels.errors import ResourceError
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime import attach
from prhs_kernels.runtime.index_sets import selecting_layers, set_capacity

GIB = 2**30  # bytes
SLACK = 2**28  # bytes: the workspace of the matrix library, logits, the graph's own memory


@dataclasses.dataclass(frozen=True)
class RunShape:
    """What the size of a run depends on besides batch and length."""

    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    selecting: int  # layers that choose sets
    copied: int  # bytes of a key's low-bit copy, 0 without one
    capacity: Callable[[int], int]  # indices of a set in a cache of so many slots
    activations: Callable[[int], int]  # bytes of a prefill of so many tokens

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        params: SelectorParams,
        windows: list[int | None],
        dtype: torch.dtype,
    ) -> RunShape:
        """Of a model with these parameters; windows: its own sliding window of every layer."""
        selecting = 0 if params.time is None else len(selecting_layers(params.time))
        return cls(
            params.num_layers,
            params.num_qo_heads,
            params.num_kv_heads,
            params.head_dim,
            dtype.itemsize,
            selecting,
            params.key_copy.scan_bytes(params.head_dim, 0) if selecting else 0,
            functools.partial(set_capacity, params, windows),
            functools.partial(activation_bytes, config, params, dtype.itemsize),
        )


@dataclasses.dataclass(frozen=True)
class Needed:
    """Bytes of a run at the two heights between which it moves.

    decode: cache, sets and scratch, and one layer of the prompt's cache while that is taken over.
    prefill: sets and scratch, the prompt's cache, and its activations, which are also named by themselves.
    """

    decode: int
    prefill: int
    activations: int

    @property
    def most(self) -> int:
        return max(self.decode, self.prefill)


def engine_bytes(shape: RunShape, batch: int, max_len: int, prompt_len: int = 0) -> Needed:
    """Of a decode engine, nothing released; prompt_len: slots that a prefill runs through the model."""
    rows = batch * shape.num_kv_heads
    slot = 2 * rows * shape.head_dim * shape.itemsize  # of one layer
    held = max_len * shape.head_dim * shape.itemsize + SLACK  # rotary tables
    if shape.selecting:
        group = shape.num_qo_heads // shape.num_kv_heads
        anchors = group * shape.head_dim * shape.itemsize
        held += shape.selecting * rows * (4 * shape.capacity(max_len) + anchors + max_len * shape.copied)
        held += rows * max_len * (4 * group + 4 + 1 + 2)  # scores, weights, bit masks, lists
    activations = shape.activations(batch * prompt_len)
    return Needed(
        decode=held + slot * (shape.num_layers * max_len + prompt_len),
        prefill=held + slot * shape.num_layers * prompt_len + activations,
        activations=activations,
    )


def activation_bytes(
    config: PreTrainedConfig, params: SelectorParams, itemsize: int, tokens: int, ranks: int = 1
) -> int:
    """Bytes that a forward pass holds at its highest point, beside weights and cache.

    Embeddings, the layer's input, what a block reads and the rotary tables are there at the same time. On top
    of these come, in one of the blocks: queries and keys, rotated and not; or the residual stream and the
    norm's fp32 copies; or the residual stream, the output and of one part of the tokens gate, up and their
    product. Attention itself has no workspace that grows with tokens x slots, and logits are those of the
    last token. Of a model that is split over ranks it is what one of them holds.
    """
    hidden, part = config.hidden_size, min(tokens, attach.MLP_TOKENS)
    query, key = (heads * params.head_dim // ranks for heads in (params.num_qo_heads, params.num_kv_heads))
    mlp = tokens * hidden + 3 * part * config.intermediate_size // ranks
    if tokens > part:
        mlp += (tokens + part) * hidden  # put together from parts
    blocks = max(tokens * (4 * query + 2 * key), tokens * 8 * hidden // itemsize, mlp)
    return (tokens * (3 * hidden + 2 * params.head_dim) + blocks) * itemsize


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on a CUDA device, those that torch keeps for later included."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def check_fits(needed: Callable[[int, int], Needed], batch: int, max_len: int, free: int | None) -> None:
    """Refuse a run that does not fit, and say what would.

    Args:
        needed: by a run of (batch, max_len). free: bytes, None where it is not known.

    Raises:
        ResourceError: with both sizes, the longest context and the largest batch that fit.
    """
    wanted = needed(batch, max_len)
    if free is None or wanted.most <= free:
        return
    longest = largest_fitting(lambda length: needed(batch, length).most, max_len, free)
    most = largest_fitting(lambda size: needed(size, max_len).most, batch, free)
    fits = _sizes(batch, max_len, most, longest)
    raise ResourceError(
        f"not enough device memory for batch {batch} x {max_len} positions: {_gib(wanted)} needed, "
        f"{free / GIB:.1f} GiB free; {f'what fits: {fits}' if fits else 'nothing would fit'}"
    )


def ran_out(error: BaseException) -> bool:
    """Whether an allocation failed, or an exception that came up while that one passed says otherwise.

    torch has a type of its own for CUDA only, and the end of a broken graph capture fails as well.
    """
    texts = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return any(
        isinstance(cause, MemoryError | torch.OutOfMemoryError) or any(text in str(cause) for text in texts)
        for cause in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those during which it came up."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _gib(needed: Needed) -> str:
    own = f" ({needed.activations / GIB:.1f} of them for the prefill's activations)"
    return f"{needed.most / GIB:.1f} GiB{own if needed.prefill > needed.decode else ''}"


def _sizes(batch: int, max_len: int, fewer: int, shorter: int) -> str:
    """The two ways to a smaller run; 0 for one that does not exist."""
    sizes = [f"{shorter} positions at batch {batch}"] if shorter else []
    return " or ".join([*sizes, *([f"batch {fewer} at {max_len} positions"] if fewer else [])])


@dataclasses.dataclass(frozen=True)
class RunMemory:
    """The memory of one run: `batch` sequences in `max_len` slots, prompts of `prompt_len` of them."""

    shape: RunShape
    batch: int
    max_len: int
    prompt_len: int
    device: torch.device

    def needed(self, batch: int, max_len: int) -> Needed:
        """By a run of another size, its prompts that much shorter, in audited mode."""
        prompt_len = max(0, self.prompt_len - (self.max_len - max_len)) if self.prompt_len else 0
        return engine_bytes(self.shape, batch, max_len, prompt_len)

    def check(self) -> None:
        """ResourceError if the device has too little free, with what would fit."""
        check_fits(self.needed, self.batch, self.max_len, free_bytes(self.device))

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an allocation that failed all the same into a ResourceError that says what may fit."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            for cause in _chain(error):
                traceback.clear_frames(cause.__traceback__)  # they hold activations
            free = free_bytes(self.device)
            left = "" if free is None else f", {free / GIB:.1f} GiB free after it failed"
            fits = _sizes(self.batch, self.max_len, self.batch // 2, self.max_len // 2)
            raise ResourceError(
                f"out of memory on {self.device} with batch {self.batch} x {self.max_len} positions: about "
                f"{_gib(self.needed(self.batch, self.max_len))} expected beside the weights{left}; what may "
                f"fit: {fits}"
            ) from error


def largest_fitting(needed: Callable[[int], int], most: int, free: int) -> int:
    """Largest size up to `most` of which `needed`, which grows with it, is at most `free`; 0 if none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= free else (low, middle - 1)
    return low
