"""Low-bit key copies in plain PyTorch: what a code may be wrong by, ties, packing, writing in place."""

from __future__ import annotations

import pytest
import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.retrieve.key_copy import KeyCopy, KeyCopyKind, dequantise, quantise

KINDS = [KeyCopyKind.INT8, KeyCopyKind.FP8, KeyCopyKind.INT4]


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_code_of_every_key(kind: KeyCopyKind) -> None:
    """No other code of the kind would be closer; the largest of a row gets the largest code."""
    keys = torch.randn(50, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    data, scale = quantise(keys, kind)
    found = dequantise(data, scale, kind)
    largest = 7 if kind == KeyCopyKind.INT4 else 127
    codes = torch.arange(-largest, largest + 1.0)
    if kind == KeyCopyKind.FP8:
        codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
        codes = codes[codes.isfinite()]
    every = (codes * scale[:, None, None]).double()
    nearest = (every - keys.double().unsqueeze(-1)).abs().amin(-1)
    error = (found.double() - keys.double()).abs()
    assert (error <= nearest + 1e-6 * keys.abs().amax()).all()
    torch.testing.assert_close(found.abs().amax(-1), keys.abs().amax(-1), rtol=1e-6, atol=0)


def test_ties_go_to_the_even_code() -> None:
    keys = torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.5, 3.49, 0.0, -127.0]])
    data, scale = quantise(keys, KeyCopyKind.INT8)
    assert scale.tolist() == [1.0] and data.tolist() == [[127, 0, 2, -2, -126, 3, 0, -127]]


def test_two_codes_of_four_bits_in_a_byte() -> None:
    keys = torch.tensor([[7.0, -1.0, 2.0, -7.0, 3.0, -3.0, 0.0, 5.0]])
    data, scale = quantise(keys, KeyCopyKind.INT4)
    assert data.shape == (1, 4) and scale.tolist() == [1.0]
    # dimension j below, dimension j + 4 above
    assert [(byte & 15, byte >> 4) for byte in data[0].tolist()] == [(7, 3), (15, 13), (2, 0), (9, 5)]
    assert torch.equal(dequantise(data, scale, KeyCopyKind.INT4), keys)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: KeyCopyKind) -> None:
    data, scale = quantise(torch.tensor([[0.0, 0.0], [1e-38, -1e-40]]), kind)
    assert not scale.any() and not data.float().any()
    assert not dequantise(data, scale, kind).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_then_a_step_at_its_own_slot_in_every_sequence(kind: KeyCopyKind) -> None:
    generator = torch.Generator().manual_seed(1)
    prefix, step = (torch.randn(2, 3, t, 16, generator=generator) for t in (5, 1))
    copy = KeyCopy.allocate(kind, 2, 3, 8, 16, "cpu")
    assert copy.head_dim == 16
    copy.write(prefix)
    copy.write(step, torch.tensor([5, 7]))
    copy.write(step, torch.tensor([8, -1]))  # outside: nothing happens
    keys = torch.zeros(2, 3, 8, 16)
    keys[:, :, :5] = prefix
    keys[0, :, 5], keys[1, :, 7] = step[0, :, 0], step[1, :, 0]
    data, scale = quantise(keys, kind)
    assert torch.equal(copy.data.view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(copy.scale, scale)


def test_bytes_of_a_scan() -> None:
    found = [kind.scan_bytes(128, 2) for kind in KeyCopyKind]
    assert found == [256, 132, 132, 68]


def test_what_cannot_be_copied_is_named() -> None:
    with pytest.raises(UsageError, match="'exact' scans the cache itself"):
        KeyCopy.allocate("exact", 1, 1, 4, 16, "cpu")
    with pytest.raises(UsageError, match="head_dim = 15 must be even"):
        KeyCopy.allocate("int4", 1, 1, 4, 15, "cpu")
    copy = KeyCopy.allocate("int8", 1, 1, 4, 16, "cpu")
    with pytest.raises(UsageError, match=r"keys: expected shape \[1, 1, any, 16\], got \[1, 1, 2, 8\]"):
        copy.write(torch.zeros(1, 1, 2, 8))
