"""Methods that remember: each against its rule written down again, step by step, and against broken rules."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.runtime.attach import dense_params, sparse_attention
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines import H2O, AtBudget, Baseline, DecodeRows, SnapKV
from prhs_kernels.selectors.memory import Memory, PromptRows
from prhs_kernels.testing.inputs import exact_model, random_tokens
from prhs_kernels.testing.runs import VARIANTS, feed

PROMPT, STEPS, LAYERS = 30, 12, 4
HEADS, GROUP, DIM = 2, 2, 8
METHODS: dict[str, Baseline] = {
    "h2o": H2O(),
    "snapkv": SnapKV(window=4, kernel=3),
}


@dataclasses.dataclass
class Model:
    """Random queries and keys of some layers of one sequence, with their exact attention."""

    query: torch.Tensor  # [layers, num_qo_heads, positions, head_dim]
    keys: torch.Tensor  # [layers, num_kv_heads, positions, head_dim]
    window: int | None = None

    @classmethod
    def random(cls, seed: int = 0, *, window: int | None = None) -> Model:
        """Flat attention in the prompt and sharp in decode steps, so that what these do matters."""
        generator = torch.Generator().manual_seed(seed)
        shape = (LAYERS, HEADS * GROUP, PROMPT + STEPS, DIM)
        query = torch.randn(*shape, generator=generator, dtype=torch.double)
        query *= torch.where(torch.arange(shape[2]) < PROMPT, 0.5, 2.0)[:, None]
        keys = torch.randn(LAYERS, HEADS, *shape[2:], generator=generator, dtype=torch.double)
        return cls(query, keys, window)

    def probs(self, layer: int) -> torch.Tensor:
        """`[num_qo_heads, positions, positions]`, dense attention of every position."""
        logits = self.query[layer] @ self.keys[layer].repeat_interleave(GROUP, 0).mT
        at = torch.arange(logits.shape[-1])
        hidden = at > at[:, None]
        if self.window is not None:
            hidden |= at <= at[:, None] - self.window
        return logits.masked_fill(hidden, -torch.inf).softmax(-1)

    def memory(self) -> Memory:
        prompts = {
            layer: PromptRows(self.query[layer, :, :PROMPT], self.keys[layer, :, :PROMPT], 1.0, self.window)
            for layer in range(LAYERS)
        }
        return Memory(prompts)

    def rows(self, layer: int, first: int, last: int, memory: Memory) -> DecodeRows:
        """Decode steps `first .. last - 1`, counted from the prompt's end."""
        at = torch.arange(PROMPT + first, PROMPT + last)
        end = PROMPT + last
        start = None if self.window is None else at - self.window + 1
        probs = self.probs(layer)[:, at, :end].float()
        keys = self.keys[layer, :, :end]
        return DecodeRows(self.query[layer, :, at], keys, probs, at, start, layer, 1.0, memory)

    def run(self, method: Baseline, size: int, cuts: tuple[int, ...] = ()) -> list[Choice]:
        """All steps of all layers, in runs that end at `cuts`; one choice per layer."""
        memory, found = self.memory(), []
        for first, last in itertools.pairwise((0, *cuts, STEPS)):
            found.append(
                [
                    method.select(rows, torch.full((HEADS, last - first), size))
                    for rows in (self.rows(layer, first, last, memory) for layer in range(LAYERS))
                ]
            )
        return [join([part[layer] for part in found]) for layer in range(LAYERS)]


def join(parts: list[Choice]) -> Choice:
    """Runs after one another, padded to the longest keys."""
    width = parts[-1].kept.shape[-1]
    kept = [torch.nn.functional.pad(part.kept, (0, width - part.kept.shape[-1])) for part in parts]
    others = ("retrieved", "contested", "rows_read")
    return Choice(torch.cat(kept, 1), *(torch.cat([getattr(p, name) for p in parts], 1) for name in others))


Sets = list[list[list[set[int]]]]  # layer, head, step


def sets_of(choices: list[Choice]) -> Sets:
    return [
        [[set(row.nonzero().flatten().tolist()) for row in head] for head in choice.kept]
        for choice in choices
    ]


def best(weight: dict[int, float], count: int) -> set[int]:
    return set(sorted(weight, key=lambda i: (-weight[i], i))[: max(count, 0)])


def visible_at(model: Model, position: int) -> list[int]:
    return list(range(0 if model.window is None else max(position - model.window + 1, 0), position + 1))


def group_mean(probs: torch.Tensor, head: int) -> torch.Tensor:
    return probs[head * GROUP : (head + 1) * GROUP].mean(0)


# --- the rules, written down again ---


def naive_h2o(model: Model, size: int) -> Sets:
    found: Sets = []
    for layer in range(LAYERS):
        probs = model.probs(layer)
        found.append([])
        for head in range(HEADS):
            own = probs[head * GROUP : (head + 1) * GROUP]
            gathered = {i: float(own[:, :PROMPT, i].mean(0).sum()) for i in range(PROMPT)}
            attends: list[list[list[float]]] = own.tolist()
            alive, steps = set(range(PROMPT)), []
            for position in range(PROMPT, PROMPT + STEPS):
                alive = (alive | {position}) & set(visible_at(model, position))
                gathered[position] = 0.0
                recent = {i for i in alive if i > position - -(-size // 2)}
                alive = recent | best({i: gathered[i] for i in alive - recent}, size - len(recent))
                for row in attends:
                    whole = sum(row[position][j] for j in alive)
                    for i in alive:
                        gathered[i] += row[position][i] / whole / GROUP
                steps.append(alive)
            found[-1].append(steps)
    return found


def naive_snapkv(model: Model, size: int) -> Sets:
    found: Sets = []
    for layer in range(LAYERS):
        found.append([])
        for head in range(HEADS):
            mean = group_mean(model.probs(layer), head)
            votes = [float(mean[PROMPT - 4 : PROMPT, i].sum()) for i in range(PROMPT - 4)]
            pooled = {i: max(votes[max(i - 1, 0) : i + 2]) for i in range(PROMPT - 4)}
            window = list(range(PROMPT - min(4, size), PROMPT))
            stays = set(window) | best(pooled, size - len(window))
            found[-1].append(
                [
                    (stays | set(range(PROMPT, position + 1))) & set(visible_at(model, position))
                    for position in range(PROMPT, PROMPT + STEPS)
                ]
            )
    return found


NAIVE: dict[str, Callable[[Model, int], Sets]] = {"h2o": naive_h2o, "snapkv": naive_snapkv}


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("size", [1, 3, 10, 31, 60])
@pytest.mark.parametrize("name", NAIVE)
def test_the_rule(name: str, size: int, window: int | None) -> None:
    for seed in range(2):
        model = Model.random(seed, window=window)
        assert sets_of(model.run(METHODS[name], size)) == NAIVE[name](model, size)


@pytest.mark.parametrize("name", METHODS)
def test_runs_may_be_cut_anywhere(name: str) -> None:
    model = Model.random(3)
    whole = model.run(METHODS[name], 9)
    for cuts in ((1,), (5, 6), tuple(range(1, STEPS))):
        for one, other in zip(whole, model.run(METHODS[name], 9, cuts), strict=True):
            for field in dataclasses.fields(Choice):
                assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


@pytest.mark.parametrize("name", METHODS)
def test_later_tokens_change_nothing_earlier(name: str) -> None:
    model = Model.random(4)
    changed = Model(model.query.clone(), model.keys.clone())
    changed.query[:, :, PROMPT + 6 :], changed.keys[:, :, PROMPT + 6 :] = 9.0, -9.0
    for one, other in zip(model.run(METHODS[name], 9), changed.run(METHODS[name], 9), strict=True):
        assert torch.equal(one.kept[:, :6], other.kept[:, :6])
        assert torch.equal(one.rows_read[:, :6], other.rows_read[:, :6])
    # and earlier ones do matter
    changed.query[:, :, :PROMPT], changed.keys[:, :, :PROMPT] = model.query.flip(2)[:, :, :PROMPT], 0.5
    assert sets_of(model.run(METHODS[name], 9)) != sets_of(changed.run(METHODS[name], 9))


# --- broken rules are noticed ---


class H2OWithoutGathering(H2O):
    """Ranks by the prompt alone."""

    def select(self, rows: DecodeRows, size: torch.Tensor) -> Choice:
        choice = super().select(rows, size)
        alive, score = rows.memory.notes[rows.layer]
        fresh = torch.nn.functional.pad(rows.prompt.received, (0, score.shape[-1] - PROMPT))
        rows.memory.notes[rows.layer] = alive, fresh
        return choice


class H2OWithResurrection(H2O):
    """What was evicted competes again."""

    def select(self, rows: DecodeRows, size: torch.Tensor) -> Choice:
        choice = super().select(rows, size)
        alive, score = rows.memory.notes[rows.layer]
        rows.memory.notes[rows.layer] = torch.ones_like(alive), score
        return choice


class SnapKVWithoutPooling(SnapKV):
    def __init__(self) -> None:
        super().__init__(window=4, kernel=1)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("h2o", H2OWithoutGathering()),
        ("h2o", H2OWithResurrection()),
        ("h2o", H2O(local_share=0.1)),
        ("snapkv", SnapKVWithoutPooling()),
        ("snapkv", SnapKV(window=8, kernel=3)),
    ],
)
def test_a_broken_rule_is_noticed(name: str, broken: Baseline) -> None:
    """On cases of `test_the_rule`, which the method itself passes."""
    models = [Model.random(seed, window=window) for seed in range(2) for window in (None, 17)]
    steps = tuple(range(1, STEPS))
    assert any(sets_of(model.run(broken, 10, steps)) != NAIVE[name](model, 10) for model in models)


# --- what it costs ---


def test_bytes_of_methods_that_score_nothing() -> None:
    model = Model.random(1)
    for name in ("h2o", "snapkv"):
        for choice in model.run(METHODS[name], 10):
            kept = choice.kept.sum(-1)
            # H2O also reads one accumulated score per kept position, `DIM` of them are a row
            scores = torch.ceil(kept / DIM).long() if name == "h2o" else 0
            assert torch.equal(choice.rows_read, 2 * kept + scores)
            assert not choice.retrieved.any() and choice.contested.all()
            if name == "h2o":
                assert bool((kept == 10).all())
            else:
                assert kept.tolist() == [list(range(11, 11 + STEPS))] * HEADS


# --- in a model ---


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3"])
def test_one_pass_equals_step_by_step(variant: str, name: str) -> None:
    model_type, settings = VARIANTS[variant]
    model = exact_model(model_type, **settings)
    tokens, prefill = random_tokens(60, seed=5), 44
    selector = AtBudget(METHODS[name], 0.3)
    dense = dense_params(model.config)
    result = Scorer(model, tokens, prefill, keep_queries=True).run(dense, None, selector)
    with sparse_attention(model, dense, selector=selector) as cache:
        steps = feed(model, cache, [tokens[:prefill]], [tokens[prefill:]])[0]
    torch.testing.assert_close(result.logits, steps[1:], rtol=1e-9, atol=1e-9)
    assert result.stats.to_dict() == pytest.approx(cache.stats.to_dict(), rel=1e-12)
    assert result.stats.attended_fraction < 0.7


def test_a_second_run_starts_with_an_empty_memory() -> None:
    model = exact_model("llama")
    tokens, dense = random_tokens(50, seed=2), dense_params(model.config)
    with Scorer(model, tokens, 40, keep_queries=True).prepared(dense) as prepared:
        first, other, again = (
            prepared.run(dense, None, AtBudget(METHODS[name], 0.3)).logits
            for name in ("h2o", "snapkv", "h2o")
        )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_prompt_prefilled_in_parts_is_the_same_prompt() -> None:
    model = exact_model("llama")
    ids = torch.tensor([random_tokens(40, seed=1)])
    found: list[Any] = []
    for parts in ([40], [25, 15]):
        with torch.no_grad(), sparse_attention(model, dense_params(model.config), keep_queries=True) as cache:
            for part in ids.split(parts, dim=1):
                model(input_ids=part, past_key_values=cache)
            found.append([cache.memory.prompts[layer].received for layer in range(4)])
    for whole, cut in zip(*found, strict=True):
        torch.testing.assert_close(whole, cut, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(whole.sum(-1), torch.full_like(whole.sum(-1), 40))


def test_without_the_prompts_queries_it_says_so() -> None:
    model = exact_model("llama")
    with pytest.raises(UsageError, match="prompt's queries, which were not kept"):
        Scorer(model, random_tokens(30), 20).run(dense_params(model.config), None, AtBudget(H2O(), 0.5))
