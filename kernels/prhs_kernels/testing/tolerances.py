"""How wrong a kernel may be: as wrong as plain PyTorch in the same precision, both judged against float64."""

from __future__ import annotations

import torch

# The kernel sums in another order than PyTorch. Two roundings of the same sum are each within the error of
# one, so twice that error separates a different order from a different result.
ORDER = 2.0


def assert_as_exact_as(
    found: torch.Tensor, stock: torch.Tensor, exact: torch.Tensor, what: str, terms: float = 0.0
) -> None:
    """Raise AssertionError if `found` is further from `exact` than `stock`, the same computed by PyTorch.

    Args:
        found: the kernel's result, in its own dtype.
        stock: the plain PyTorch result in the same dtype, from the same inputs.
        exact: the float64 result from the same inputs; infinities must be met exactly, NaN nowhere.
        terms: what the result is a cancelling sum of, see `tolerance`.
    """
    assert found.shape == exact.shape and found.dtype == stock.dtype, f"{what}: {found.shape}, {found.dtype}"
    assert not found.isnan().any(), f"{what}: NaN"
    finite = exact.isfinite()
    assert torch.equal(found[~finite].double(), exact[~finite]), f"{what}: infinities differ"
    if bool(finite.any()):
        bound = tolerance(stock, exact, terms)
        error = float((found.double() - exact)[finite].abs().max())
        assert error <= bound, f"{what}: error {error:.3g}, allowed {bound:.3g}"


def tolerance(stock: torch.Tensor, exact: torch.Tensor, terms: float = 0.0) -> float:
    """Largest absolute error that `assert_as_exact_as` allows.

    The largest error of `stock`, at least one rounding of the largest exact value or of `terms`: the error of
    a dot product is proportional to the sum of its terms' magnitudes, not to the result (`sum_of_terms`).
    """
    finite = exact.isfinite()
    rounding = torch.finfo(stock.dtype).eps * max(terms, float(exact[finite].abs().max()))
    return ORDER * max(float((stock.double() - exact)[finite].abs().max()), rounding)


def sum_of_terms(query: torch.Tensor, keys: torch.Tensor, scale: float) -> float:
    """Largest sum of |q_i k_i| * scale over queries `[batch, num_qo_heads, 1, head_dim]` and finite keys."""
    batch, num_kv_heads, _, head_dim = keys.shape
    packed = query.abs().double().reshape(batch, num_kv_heads, -1, head_dim)
    return scale * float((packed @ keys.abs().double().nan_to_num().transpose(-1, -2)).max())
