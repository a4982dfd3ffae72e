"""Take the likeliest token of every sequence and count the step."""

from __future__ import annotations

import torch

from prhs_kernels.ops.backend import Backend, check_like, check_shape, use_triton
from prhs_kernels.ops.next_token import reference


def next_token(
    logits: torch.Tensor,
    token: torch.Tensor,
    alive: torch.Tensor,
    drawn: torch.Tensor,
    *,
    stop_ids: torch.Tensor,
    last_draw: int,
    slot: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """The token of the largest logit, the first of equal ones; everything is written in place.

    Args:
        logits: `[batch, vocabulary]`.
        token: `[batch]` int64, gets the tokens. alive: `[batch]` bool, False from a stop token on.
        drawn: `[1]` int64, counted up to at most `last_draw`. slot: `[1]` int64, counted up, if given.
        stop_ids: `[stops]` int64.

    Raises:
        UsageError: shapes, dtypes or devices that do not go together.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    batch = logits.shape[0]
    check_shape("logits", logits, (None, None))
    for name, tensor, shape, dtype in (
        ("token", token, (batch,), torch.int64),
        ("alive", alive, (batch,), torch.bool),
        ("drawn", drawn, (1,), torch.int64),
        ("stop_ids", stop_ids, (None,), torch.int64),
        ("slot", drawn if slot is None else slot, (1,), torch.int64),
    ):
        check_shape(name, tensor, shape)
        check_like(name, tensor, logits, (dtype,))
    if not use_triton(backend, logits):
        reference.next_token(logits, token, alive, drawn, stop_ids, last_draw, slot)
        return
    from prhs_kernels.ops.next_token import triton as kernel

    kernel.next_token(logits.contiguous(), token, alive, drawn, stop_ids, last_draw, slot)
