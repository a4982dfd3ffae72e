"""Recording a step into a CUDA graph without a trace of the rehearsal."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace of 32 MiB for every stream that it has seen."""
    return torch.cuda.Stream(device)


def capture(
    run: Callable[[], None], changing: list[torch.Tensor], device: torch.device
) -> torch.cuda.CUDAGraph:
    """The graph of `run`, which is device work only; nothing has run when this returns.

    Args:
        changing: every tensor that `run` writes and that a later run reads first; they are put back.
    """
    before = [tensor.clone() for tensor in changing]

    def put_back() -> None:
        for tensor, saved in zip(changing, before, strict=True):
            tensor.copy_(saved)

    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles kernels, lets cuBLAS choose and allocate
            run()
            put_back()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    put_back()
    return graph
