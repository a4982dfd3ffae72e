"""Gathered and masked attention against a loop over heads and sets, with holes full of NaN."""

from __future__ import annotations

import pytest
import torch

from prhs_kernels.ops.sparse_decode.reference import attend, grouped_scores, kept_indices, sparse_decode

LENGTHS = [1, 15, 17, 63, 111, 1000]
HEADS = [(4, 4), (4, 2), (8, 1)]  # query, KV


def inputs(
    length: int, heads: tuple[int, int], dtype: torch.dtype = torch.float64, steps: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(length)

    def draw(count: int, rows: int) -> torch.Tensor:
        return torch.randn(2, count, rows, 16, generator=generator, dtype=torch.float64).to(dtype)

    return draw(heads[0], steps), draw(heads[1], length), draw(heads[1], length), generator


def kept_sets(length: int, num_kv_heads: int, generator: torch.Generator) -> torch.Tensor:
    """Sets of every size: nothing, one, some, all."""
    kept = torch.rand(2, num_kv_heads, length, generator=generator) < 0.4
    kept[0, 0] = False
    kept[1, 0] = True
    if num_kv_heads > 1:
        kept[0, 1] = torch.arange(length) == length - 1
    return kept


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("heads", HEADS)
def test_against_a_loop_over_heads(length: int, heads: tuple[int, int]) -> None:
    query, keys, values, generator = inputs(length, heads)
    kept = kept_sets(length, heads[1], generator)
    poison = ~kept[..., None]
    indices, count = kept_indices(kept)
    output, lse = sparse_decode(
        query, keys.masked_fill(poison, torch.nan), values.masked_fill(poison, torch.nan), indices, 0.3
    )
    assert torch.equal(count, kept.sum(-1))
    for batch in range(2):
        for head in range(heads[0]):
            kv_head = head // (heads[0] // heads[1])
            rows = kept[batch, kv_head].nonzero().flatten()
            logits = keys[batch, kv_head, rows] @ query[batch, head, 0] * 0.3
            expected = logits.softmax(-1) @ values[batch, kv_head, rows]
            torch.testing.assert_close(output[batch, head, 0], expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(lse[batch, head, 0], logits.logsumexp(-1), rtol=1e-12, atol=1e-12)
    if not kept[0, 0].any():
        assert (output[0, : heads[0] // heads[1]] == 0).all() and (lse[0, 0] == -torch.inf).all()


def test_nothing_kept_anywhere() -> None:
    query, keys, values, _ = inputs(7, (4, 2))
    indices, count = kept_indices(torch.zeros(2, 2, 7, dtype=torch.bool))
    assert indices.shape == (2, 2, 0) and not count.any()
    output, lse = sparse_decode(query, keys, values, indices, 1.0)
    assert output.shape == query.shape and not output.any() and (lse == -torch.inf).all()


def test_indices_are_ascending_and_padded_at_the_end() -> None:
    kept = torch.tensor([[[True, False, True, True], [False, False, False, True]]])
    indices, count = kept_indices(kept)
    assert indices.tolist() == [[[0, 2, 3], [3, -1, -1]]]
    assert indices.dtype == torch.int64 and count.tolist() == [[3, 1]]


def test_padding_may_stand_anywhere() -> None:
    query, keys, values, _ = inputs(9, (4, 2))
    tidy = torch.tensor([2, 5, 8]).expand(2, 2, -1)
    holes = torch.tensor([-1, 2, -1, 5, 8, -1]).expand(2, 2, -1)
    for one, other in zip(
        sparse_decode(query, keys, values, tidy, 1.0),
        sparse_decode(query, keys, values, holes, 1.0),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_two_halves_merge_to_the_whole_by_their_lse() -> None:
    """The attention state (output, lse) is what split sets are merged by."""
    query, keys, values, generator = inputs(111, (4, 2))
    kept = torch.rand(2, 2, 111, generator=generator) < 0.5
    whole, lse = sparse_decode(query, keys, values, kept_indices(kept)[0], 0.25)
    old = kept & (torch.arange(111) < 40)
    parts = [sparse_decode(query, keys, values, kept_indices(p)[0], 0.25) for p in (old, kept & ~old)]
    weights = torch.stack([part[1] for part in parts]).softmax(0).unsqueeze(-1)
    torch.testing.assert_close(weights[0] * parts[0][0] + weights[1] * parts[1][0], whole)
    torch.testing.assert_close(torch.logaddexp(parts[0][1], parts[1][1]), lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_torch_in_the_same_precision(dtype: torch.dtype) -> None:
    """Error against float64, judged by the error torch's own attention makes on the same inputs."""
    query, keys, values, _ = inputs(1000, (4, 2), dtype)
    kept = torch.ones(2, 2, 1000, dtype=torch.bool)
    output, lse = sparse_decode(query, keys, values, kept_indices(kept)[0], 0.25)
    assert output.dtype == dtype and lse.dtype == torch.float32
    double = (t.double() for t in (query, keys, values))
    exact = torch.nn.functional.scaled_dot_product_attention(*double, scale=0.25, enable_gqa=True)
    stock = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, scale=0.25, enable_gqa=True
    ).double()
    assert 0 < (output.double() - exact).norm() <= 2 * (stock - exact).norm()


@pytest.mark.parametrize("heads", HEADS)
def test_masked_run_equals_gathered_steps(heads: tuple[int, int]) -> None:
    """`grouped_scores` and `attend`, which score a run of steps, against one gathered step at a time."""
    query, keys, values, generator = inputs(63, heads, steps=5)
    kept = torch.rand(2, heads[1], 5, 63, generator=generator) < 0.3
    kept[..., 0] = True
    scores = grouped_scores(query, keys, 0.2)
    assert scores.shape == (2, heads[1], heads[0] // heads[1], 5, 63)
    run = attend(scores.masked_fill(~kept.unsqueeze(2), -torch.inf).softmax(-1), values)
    for step in range(5):
        indices, _ = kept_indices(kept[:, :, step])
        single, _ = sparse_decode(query[:, :, step : step + 1], keys, values, indices, 0.2)
        torch.testing.assert_close(run[:, :, step : step + 1], single, rtol=1e-12, atol=1e-12)
