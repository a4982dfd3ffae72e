"""Rows so far apart that 32 bits do not address the last one."""

from __future__ import annotations

import tempfile

import torch

STRIDE = 2**30  # elements


def far_rows(device: str) -> torch.Tensor:
    """Zeros `[1, 1, 4, 64]` in fp16, a row every `STRIDE` elements.

    On a CPU only the pages that are touched are allocated; a CUDA device needs 6.5 GB.
    """
    size = 3 * STRIDE + 64
    if device == "cpu":
        with tempfile.TemporaryFile() as file:
            file.truncate(2 * size)  # a hole: takes no space
            path = f"/proc/self/fd/{file.fileno()}"
            room = torch.from_file(path, shared=True, size=size, dtype=torch.float16)
    else:
        room = torch.zeros(size, dtype=torch.float16, device=device)
    return room.as_strided((1, 1, 4, 64), (64, 64, STRIDE, 1))
