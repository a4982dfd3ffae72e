"""How much memory there is, asked before it is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from prhs_kernels.errors import ResourceError
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.runtime.distributed import num_ranks
from prhs_kernels.runtime.memory import (
    RunShape,
    activation_bytes,
    engine_bytes,
    free_bytes,
    largest_fitting,
    ran_out,
)
from prhs_kernels.runtime.support import sliding_windows

GIB = 2**30  # bytes
MOST = 2**24  # sequences or tokens that are asked about
_CGROUP = pathlib.Path("/sys/fs/cgroup")
_MEMINFO = pathlib.Path("/proc/meminfo")


def available(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now: free CUDA memory and what torch keeps of it for later, or
    available host memory.

    On the host that is the kernel's estimate (page cache counts as available), capped by the memory limit of
    the container.
    """
    on_device = free_bytes(device)
    return on_device if on_device is not None else min(_host_available(), _container_available())


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """ResourceError with both sizes unless `needed` bytes for `what` are available on `device`."""
    free = available(device)
    if needed > free:
        raise ResourceError(
            f"not enough memory on {device} for {what}: {needed / GIB:.1f} GiB needed, {free / GIB:.1f} GiB "
            "available; free some, or choose a smaller model, another device or bf16"
        )


def run_bytes(
    config: PreTrainedConfig,
    tokens: int,
    dtype: torch.dtype,
    steps: int = 1,
    *,
    batch: int = 1,
    ranks: int = 1,
) -> int:
    """Bytes that a pass over `batch` sequences of `tokens` needs beyond the weights: KV cache, activations
    (`activation_bytes`), score rows.

    `steps` decode steps are scored at a time (1 when generating). Five fp32 tables of one layer's rows cover
    scores, dense and sparse attention and what statistics keep of them. With tensor parallelism over `ranks`
    it is what one of them needs.
    """
    shape = dense_params(config)
    cache = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * tokens // ranks
    activations = activation_bytes(config, shape, dtype.itemsize, batch * tokens, ranks)
    rows = 5 * shape.num_qo_heads * steps * tokens // ranks + 2 * steps * config.vocab_size
    return activations + batch * int(dtype.itemsize * cache + 4 * rows)


@dataclasses.dataclass(frozen=True)
class Room:
    """What a run of `batch` sequences of `tokens` needs beside the weights of a loaded model, and what fits.

    The sizes are those of `run_bytes`, and where the decode engine may run at least its own.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    device: torch.device
    ranks: int = 1
    engine: RunShape | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, params: SelectorParams) -> Room:
        """Beside the weights of a loaded model."""
        engine, ranks = None, num_ranks(model)
        if model.device.type == "cuda" and ranks == 1:
            engine = RunShape.of(model.config, params, sliding_windows(model), model.dtype)
        return cls(model.config, model.dtype, model.device, ranks, engine)

    def batch(self, tokens: int) -> int:
        """How many sequences of `tokens` fit together now; 0 when not even one does."""
        return largest_fitting(lambda size: self._bytes(tokens, size), MOST, available(self.device))

    def tokens(self) -> int:
        """The longest single sequence that fits now, prompt and new tokens together."""
        return largest_fitting(lambda length: self._bytes(length, 1), MOST, available(self.device))

    def check(self, tokens: int, batch: int) -> None:
        """ResourceError with what is needed, what there is and what fits."""
        needed, free = self._bytes(tokens, batch), available(self.device)
        if needed > free:
            raise ResourceError(
                f"not enough memory on {self.device} for {_sequences(batch, tokens)}: {needed / GIB:.1f} GiB "
                f"needed, {free / GIB:.1f} GiB available; {self._remedy(tokens, batch)}"
            )

    @contextlib.contextmanager
    def explained(self, tokens: int, batch: int) -> Iterator[None]:
        """Turn an allocation that failed all the same into a ResourceError that says what may fit."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            needed, free = self._bytes(tokens, batch), available(self.device)
            raise ResourceError(
                f"out of memory on {self.device} with {_sequences(batch, tokens)}: about {needed / GIB:.1f} "
                f"GiB expected beside the weights, {free / GIB:.1f} GiB free when it failed; "
                f"{self._remedy(tokens, batch, failed=True)}"
            ) from error

    def _remedy(self, tokens: int, batch: int, failed: bool = False) -> str:
        if batch > 1 and (fits := batch // 2 if failed else self.batch(tokens)):
            return f"--batch-size {fits} {'may fit' if failed else 'fits'}"
        longest = tokens // 2 if failed else self.tokens()
        verb = "may fit" if failed else "fit"
        return (
            f"prompt and new tokens {verb} up to {longest} tokens together; shorten them, or choose a "
            "smaller model, another device or bf16"
        )

    def _bytes(self, tokens: int, batch: int) -> int:
        needed = run_bytes(self.config, tokens, self.dtype, batch=batch, ranks=self.ranks)
        if self.engine is None:
            return needed
        return max(needed, engine_bytes(self.engine, batch, tokens, tokens).most)


def _sequences(batch: int, tokens: int) -> str:
    return f"a context of {tokens} tokens" if batch == 1 else f"{batch} sequences of {tokens} tokens"


def _host_available() -> int:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    # not Linux: all physical memory is the best bound without another dependency
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_available() -> int:
    """Limit of the control group (version 2) less what it uses; reclaimable page cache is not in use."""
    unlimited = 2**63
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return unlimited
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return unlimited
