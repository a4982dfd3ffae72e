"""Low-bit copies of the keys, which a scan reads instead of the cache: one scale per position and KV head.

Symmetric rounding to nearest, ties to even: `code = round(key / scale)`, `key ~ code * scale`, with the scale
such that the largest magnitude of a row gets the largest code.

| kind | scale | codes | bytes per position |
|---|---|---|---|
| int8 | amax / 127 | -127 to 127 | head_dim + 4 |
| fp8 | amax / 448 | e4m3 | head_dim + 4 |
| int4 | amax / 7 | -7 to 7, two in a byte | head_dim / 2 + 4 |
"""

from __future__ import annotations

import dataclasses
import enum

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.backend import (
    HEAD_DIMS,
    KERNEL_DTYPES,
    Backend,
    check_like,
    check_shape,
    use_triton,
)

MAX_FP32_FP8 = 128  # head_dim up to which the kernels scan fp8 with float32 queries, which are for parity
SMALLEST = 1e-30  # a row whose keys are all smaller is stored as zeros, so that no scale is subnormal


class KeyCopyKind(enum.StrEnum):
    """What a scan reads. `exact` is no copy: the cache itself."""

    EXACT = "exact"
    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"

    @property
    def largest(self) -> float:
        """Largest code."""
        return {KeyCopyKind.INT8: 127.0, KeyCopyKind.FP8: 448.0, KeyCopyKind.INT4: 7.0}[self]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored codes; two codes of four bits are a uint8."""
        kinds = {KeyCopyKind.INT8: torch.int8, KeyCopyKind.FP8: torch.float8_e4m3fn}
        return kinds.get(self, torch.uint8)

    def width(self, head_dim: int) -> int:
        """Bytes of the codes of one key."""
        return head_dim // 2 if self == KeyCopyKind.INT4 else head_dim

    def scan_bytes(self, head_dim: int, itemsize: int) -> int:
        """Bytes that a scan reads per position and KV head, the scale included; itemsize is the cache's."""
        return head_dim * itemsize if self == KeyCopyKind.EXACT else self.width(head_dim) + 4


def quantise(keys: torch.Tensor, kind: KeyCopyKind) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of keys, in plain PyTorch.

    Args:
        keys: `[..., head_dim]`, head_dim even, float32, float16 or bfloat16.
        kind: int8, fp8 or int4.

    Returns:
        data `[..., kind.width(head_dim)]` in `kind.dtype`; in int4 byte j holds dimension j in its low and
        dimension j + head_dim / 2 in its high four bits. scale `[...]` fp32.
    """
    wide = keys.float()
    amax = wide.abs().amax(dim=-1)
    # divided by a tensor: for a number PyTorch multiplies with its reciprocal on a GPU, which rounds twice
    scale = torch.where(amax >= SMALLEST, amax / torch.full_like(amax, kind.largest), 0.0)
    ratio = wide / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
    ratio = ratio.masked_fill((scale == 0).unsqueeze(-1), 0.0).clamp(-kind.largest, kind.largest)
    if kind == KeyCopyKind.FP8:
        return ratio.to(torch.float8_e4m3fn), scale
    codes = ratio.round().to(torch.int8)
    if kind == KeyCopyKind.INT4:
        low, high = codes.chunk(2, dim=-1)
        return (low & 15 | high << 4).view(torch.uint8), scale
    return codes, scale


def dequantise(data: torch.Tensor, scale: torch.Tensor, kind: KeyCopyKind) -> torch.Tensor:
    """Keys `[..., head_dim]` in fp32 from what `quantise` gives."""
    if kind == KeyCopyKind.INT4:
        signed = data.view(torch.int8)
        data = torch.cat([signed << 4 >> 4, signed >> 4], dim=-1)
    return data.float() * scale.unsqueeze(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class KeyCopy:
    """The copy of one layer's key cache, written in place.

    data: `[batch, num_kv_heads, n, kind.width(head_dim)]` in `kind.dtype`, contiguous.
    scale: `[batch, num_kv_heads, n]` fp32.
    """

    kind: KeyCopyKind
    data: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def allocate(
        cls, kind: KeyCopyKind | str, batch: int, num_kv_heads: int, n: int, head_dim: int,
        device: torch.device | str,
    ) -> KeyCopy:  # fmt: skip
        """A copy for caches of n slots, all zeros.

        Raises:
            UsageError: the kind `exact`, which needs no copy, or an odd head_dim with int4.
        """
        kind = KeyCopyKind(kind)
        if kind == KeyCopyKind.EXACT:
            raise UsageError("key copy: 'exact' scans the cache itself and has no copy")
        if kind == KeyCopyKind.INT4 and head_dim % 2:
            raise UsageError(f"key copy: head_dim = {head_dim} must be even for int4")
        rows = (batch, num_kv_heads, n)
        return cls(
            kind=kind,
            data=torch.zeros(*rows, kind.width(head_dim), dtype=torch.uint8, device=device).view(kind.dtype),
            scale=torch.zeros(rows, dtype=torch.float32, device=device),
        )

    @property
    def head_dim(self) -> int:
        """Dimensions of a key."""
        return self.data.shape[-1] * (2 if self.kind == KeyCopyKind.INT4 else 1)

    def write(
        self, keys: torch.Tensor, slots: torch.Tensor | None = None, *, backend: Backend = "auto"
    ) -> None:
        """Store the codes of new keys; nothing is read back by the host.

        Args:
            keys: `[batch, num_kv_heads, steps, head_dim]`: one decode step, or a whole prefix.
            slots: `[batch]` int32 or int64 on the device, the slot of the first of them in each sequence, the
                others follow; None for 0. What falls outside of the copy is not stored.
            backend: `auto` is triton on CUDA, the reference elsewhere.

        Raises:
            UsageError: shapes, dtypes or devices that do not fit the copy.
        """
        batch, num_kv_heads = self.scale.shape[:2]
        check_shape("keys", keys, (batch, num_kv_heads, None, self.head_dim))
        check_like("keys", keys, self.scale, KERNEL_DTYPES)
        if slots is None:
            slots = torch.zeros(batch, dtype=torch.int32, device=keys.device)
        check_shape("slots", slots, (batch,))
        check_like("slots", slots, keys, (torch.int32, torch.int64))
        if not use_triton(backend, keys):
            self._write_reference(keys, slots)
            return
        if self.head_dim not in HEAD_DIMS or keys.stride(-1) != 1:
            raise UsageError(
                f"keys: the kernels take head_dim {', '.join(map(str, HEAD_DIMS))} with stride 1, "
                f"got {self.head_dim} with stride {keys.stride(-1)}"
            )
        from prhs_kernels.ops.retrieve.quantise.triton import write_key_copy

        write_key_copy(keys, slots, self)

    def _write_reference(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        data, scale = quantise(keys, self.kind)
        codes, new = self.data.view(torch.uint8), data.view(torch.uint8)
        for b, first in enumerate(slots.tolist()):
            begin, end = max(0, -first), max(0, min(keys.shape[2], self.scale.shape[2] - first))
            if begin < end:
                codes[b, :, first + begin : first + end] = new[b, :, begin:end]
                self.scale[b, :, first + begin : first + end] = scale[b, :, begin:end]
