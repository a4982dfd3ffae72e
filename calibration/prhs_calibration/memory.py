"""How much memory there is, asked before it is needed."""

from __future__ import annotations

import os
import pathlib

import torch
from transformers import PreTrainedConfig

from prhs_kernels.errors import ResourceError
from prhs_kernels.runtime.attach import dense_params

GIB = 2**30  # bytes
_CGROUP = pathlib.Path("/sys/fs/cgroup")
_MEMINFO = pathlib.Path("/proc/meminfo")


def available(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now: free CUDA memory, or available host memory.

    On the host that is the kernel's estimate (page cache counts as available), capped by the memory limit of
    the container.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_host_available(), _container_available())


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """ResourceError with both sizes unless `needed` bytes for `what` are available on `device`."""
    free = available(device)
    if needed > free:
        raise ResourceError(
            f"not enough memory on {device} for {what}: {needed / GIB:.1f} GiB needed, {free / GIB:.1f} GiB "
            "available; free some, or choose a smaller model, another device or bf16"
        )


def run_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype, steps: int = 1) -> int:
    """Bytes that a pass over `tokens` needs beyond the weights: KV cache, one layer's activations, score
    rows.

    `steps` decode steps are scored at a time (1 when generating). Five fp32 tables of one layer's rows cover
    scores, dense and sparse attention and what statistics keep of them.
    """
    shape = dense_params(config)
    cache = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * tokens
    widths = 3 * config.intermediate_size + 4 * config.hidden_size + 3 * shape.num_qo_heads * shape.head_dim
    rows = 5 * shape.num_qo_heads * steps * tokens + 2 * steps * config.vocab_size
    return int(dtype.itemsize * (cache + widths * tokens) + 4 * rows)


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
