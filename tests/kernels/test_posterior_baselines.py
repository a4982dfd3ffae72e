"""Methods that remember: each against its rule written down again, step by step, and against broken rules."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prhs_kernels.errors import InputError, UsageError
from prhs_kernels.runtime.attach import dense_params, sparse_attention
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines import (
    H2O,
    AtBudget,
    Baseline,
    DecodeRows,
    DoubleSparse,
    HShare,
    Kascade,
    Quest,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    Twilight,
)
from prhs_kernels.selectors.memory import Memory, PromptRows
from prhs_kernels.testing.inputs import exact_model, random_tokens
from prhs_kernels.testing.runs import VARIANTS, feed

PROMPT, STEPS, LAYERS = 30, 12, 4
HEADS, GROUP, DIM = 2, 2, 8


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


def naive_double_sparse(model: Model, size: int, four_bits: bool = False) -> Sets:
    """Labels are 2 of 8 channels, found on two other sequences; 4 bits are the whole numbers from -7 to 7."""
    found: Sets = []
    for layer in range(LAYERS):
        found.append([])
        for head in range(HEADS):
            weight = dict.fromkeys(range(DIM), 0.0)
            for other in FIT:
                keys = other.keys[layer, head]
                for position in range(PROMPT, PROMPT + STEPS):
                    for query in other.query[layer, head * GROUP : (head + 1) * GROUP, position]:
                        for c in range(DIM):
                            weight[c] += float((query[c] * keys[: position + 1, c]).abs().mean())
            labels = sorted(best(weight, 2))
            steps = []
            for position in range(PROMPT, PROMPT + STEPS):
                seen = visible_at(model, position)
                keys = model.keys[layer, head, seen][:, labels]
                if four_bits:
                    step_of = keys.float().abs().amax(-1, keepdim=True) / 7
                    keys = ((keys.float() / step_of).round() * step_of).double()
                queries = model.query[layer, head * GROUP : (head + 1) * GROUP, position][:, labels]
                mass = (queries @ keys.T).softmax(-1).mean(0).tolist()
                steps.append(best(dict(zip(seen, mass, strict=True)), size))
            found[-1].append(steps)
    return found


def naive_twilight(model: Model, size: int) -> Sets:
    """p is 0.7; 4 bits are the whole numbers from -7 to 7, half to even."""
    found: Sets = []
    for layer in range(LAYERS):
        found.append([])
        for head in range(HEADS):
            keys = model.keys[layer, head].float()
            step_of = keys.abs().amax(-1, keepdim=True) / 7
            rough = ((keys / step_of).round() * step_of).double()
            steps = []
            for position in range(PROMPT, PROMPT + STEPS):
                seen = visible_at(model, position)
                queries = model.query[layer, head * GROUP : (head + 1) * GROUP, position]
                mass = (queries @ rough[seen].T).softmax(-1).mean(0).tolist()
                kept: set[int] = set()
                weight = dict(zip(seen, mass, strict=True))
                for i in sorted(weight, key=lambda i: -weight[i])[:size]:
                    if sum(weight[j] for j in kept) >= 0.7:
                        break
                    kept.add(i)
                steps.append(kept)
            found[-1].append(steps)
    return found


def naive_served() -> dict[tuple[int, int, int, int], float]:
    """(anchor, layer, head, anchor's head) -> mean share of the best possible mass, on `FIT`."""
    table: dict[tuple[int, int, int, int], list[float]] = {}
    for model, position in itertools.product(FIT, range(PROMPT, PROMPT + STEPS)):
        count = -(-(position + 1) // 10)
        mass = {
            (layer, head): dict(enumerate(group_mean(model.probs(layer), head)[position].float().tolist()))
            for layer, head in itertools.product(range(LAYERS), range(HEADS))
        }
        for (layer, head), (anchor, other) in itertools.product(mass, mass):
            own, lent = best(mass[layer, head], count), best(mass[anchor, other], count)
            part = sum(mass[layer, head][i] for i in lent) / sum(mass[layer, head][i] for i in own)
            table.setdefault((anchor, layer, head, other), []).append(part)
    return {key: sum(parts) / len(parts) for key, parts in table.items()}


def reuse(model: Model, size: int, anchors: set[int], heads: dict[tuple[int, int], int]) -> Sets:
    found: Sets = []
    for layer, head in itertools.product(range(LAYERS), range(HEADS)):
        anchor = max(one for one in anchors if one <= layer)
        mean = group_mean(model.probs(anchor), heads.get((layer, head), head)).float()
        if not head:
            found.append([])
        steps = range(PROMPT, PROMPT + STEPS)
        found[-1].append([best({i: float(mean[t, i]) for i in visible_at(model, t)}, size) for t in steps])
    return found


def naive_kascade(model: Model, size: int) -> Sets:
    """Two anchors of four layers, by trying all pairs; a head takes the anchor's head that serves it best."""
    served = naive_served()

    def taken(anchor: int, layer: int, head: int) -> int:
        return max(range(HEADS), key=lambda other: served[anchor, layer, head, other])

    def score(second: int) -> float:
        return sum(
            served[anchor, layer, head, taken(anchor, layer, head)]
            for layer, head in itertools.product(range(LAYERS), range(HEADS))
            for anchor in [second if layer >= second else 0]
        )

    second = max(range(1, LAYERS), key=score)
    heads = {
        (layer, head): taken(second if layer >= second else 0, layer, head)
        for layer, head in itertools.product(range(LAYERS), range(HEADS))
        if layer not in (0, second)
    }
    return reuse(model, size, {0, second}, heads)


def naive_tidal(model: Model, size: int) -> Sets:
    """Layer 0 selects, and once more the layer for which the rest is served best, head by head."""
    served = naive_served()

    def score(again: int) -> float:
        return sum(
            served[again if layer >= again else 0, layer, head, head]
            for layer, head in itertools.product(range(LAYERS), range(HEADS))
        )

    return reuse(model, size, {0, max(range(1, LAYERS), key=score)}, {})


def naive_hshare(model: Model, size: int) -> Sets:
    """Half of the layers and heads share, every other step."""
    scale = min(size / 128, (size / 128) ** 0.5)
    local = max(round(32 * scale), 1)
    sinks = min(round(8 * scale), size - local)

    def heavy(mean: torch.Tensor, position: int, count: int) -> set[int]:
        middle = [i for i in visible_at(model, position) if sinks <= i <= position - local]
        return best({i: float(mean[position, i]) for i in middle}, count)

    def pairs(sets: list[Any], count: int) -> list[int]:
        """The same rule with a list of pairs in the place of a matrix."""
        left = [(i, j) for i in range(len(sets)) for j in range(i)]
        source = list(range(len(sets)))
        for _ in range(count):
            common = {(i, j): sum(map(len, map(set.__and__, sets[i], sets[j]))) for i, j in left}
            i, j = max(left, key=lambda pair: common[pair])
            left = [pair for pair in left if i not in pair]
            source = [j if one == i else one for one in source]
        return source

    probs = [model.probs(layer).float() for layer in range(LAYERS)]
    means = [[group_mean(one, head) for head in range(HEADS)] for one in probs]
    critical = [
        [[heavy(mean, t, size - sinks - local) for t in range(PROMPT // 2, PROMPT)] for mean in of_layer]
        for of_layer in means
    ]
    layers = pairs([[one for head in of_layer for one in head] for of_layer in critical], LAYERS // 2)
    found: Sets = []
    for layer in range(LAYERS):
        source = layers[layer]
        heads = pairs(critical[source], HEADS // 2)
        found.append([])
        for head in range(HEADS):
            steps = []
            for t in range(PROMPT, PROMPT + STEPS):
                at = t - (t - PROMPT) % 2
                always = [i for i in visible_at(model, at) if i < sinks or i > at - local]
                kept = heavy(means[source][heads[head]], at, size - len(always)) | set(always)
                steps.append((kept | set(range(at, t + 1))) & set(visible_at(model, t)))
            found[-1].append(steps)
    return found


FIT = [Model.random(seed) for seed in (11, 12)]
SAMPLES = [[one.rows(layer, 0, STEPS, Memory()) for layer in range(LAYERS)] for one in FIT]
METHODS: dict[str, Baseline] = {
    "h2o": H2O(),
    "snapkv": SnapKV(window=4, kernel=3),
    "double-sparse": DoubleSparse().fitted(SAMPLES),
    "double-sparse in 4 bits": DoubleSparse(four_bits=True).fitted(SAMPLES),
    "twilight": Twilight(p=0.7),
    "kascade": Kascade().fitted(SAMPLES),
    "tidal-decode": TidalDecode(full=0).fitted(SAMPLES),
    "hshare": HShare(),
}
NAIVE: dict[str, Callable[[Model, int], Sets]] = {
    "h2o": naive_h2o,
    "snapkv": naive_snapkv,
    "double-sparse": naive_double_sparse,
    "double-sparse in 4 bits": functools.partial(naive_double_sparse, four_bits=True),
    "twilight": naive_twilight,
    "kascade": naive_kascade,
    "tidal-decode": naive_tidal,
    "hshare": naive_hshare,
}


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


class TwilightOnExactKeys(Twilight):
    @staticmethod
    def estimate(rows: DecodeRows) -> torch.Tensor:
        return rows.group_mass


class HShareWithFrozenWindow(HShare):
    """Steps between retrievals do not see what came since."""

    def select(self, rows: DecodeRows, size: torch.Tensor) -> Choice:
        choice = super().select(rows, size)
        shared = (rows.positions - PROMPT) % 2 == 1
        newest = torch.arange(rows.keys.shape[1]) == rows.positions[:, None]
        return dataclasses.replace(choice, kept=choice.kept & ~(newest & shared[:, None]))


def fitted(name: str) -> Any:
    return METHODS[name]


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
        ("double-sparse", DoubleSparse().fitted([SAMPLES[0][::-1]])),
        ("double-sparse", dataclasses.replace(fitted("double-sparse"), share=3 / 8)),
        ("double-sparse in 4 bits", fitted("double-sparse")),
        ("twilight", Twilight(p=0.72)),
        ("twilight", TwilightOnExactKeys(p=0.7)),
        ("kascade", dataclasses.replace(fitted("kascade"), heads=((0, 1),) * LAYERS)),
        ("kascade", dataclasses.replace(fitted("kascade"), anchors=(0,))),
        ("tidal-decode", dataclasses.replace(fitted("tidal-decode"), again=0)),
        ("hshare", HShare(block=3)),
        ("hshare", HShare(layer_share=0.25)),
        ("hshare", HShare(head_share=0)),
        ("hshare", HShareWithFrozenWindow()),
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


def test_bytes_of_methods_that_score() -> None:
    model, seen = Model.random(1), torch.arange(PROMPT + 1, PROMPT + STEPS + 1)
    # of a row of 16 bytes: 2 of 8 channels; 2 times 4 bits and a scale of 4 bytes; 8 times 4 bits and a scale
    for name, per_key in (
        ("double-sparse", 4 / 16),
        ("double-sparse in 4 bits", 5 / 16),
        ("twilight", 8 / 16),
    ):
        for choice in model.run(METHODS[name], 10):
            assert torch.equal(choice.rows_read, 2 * choice.kept.sum(-1) + torch.ceil(seen * per_key).long())
            assert choice.retrieved.all() and choice.contested.all()
    for name in ("kascade", "tidal-decode"):
        choices = model.run(METHODS[name], 10)
        assert sorted(bool(choice.retrieved.any()) for choice in choices) == [False, False, True, True]
        for choice in choices:
            assert torch.equal(choice.rows_read, 20 + seen * choice.retrieved)


def test_one_retrieval_of_hshare_in_eight() -> None:
    choices = Model.random(1).run(METHODS["hshare"], 10)
    retrieved = torch.stack([choice.retrieved for choice in choices])
    assert float(retrieved.double().mean()) == 1 / 8
    seen = torch.arange(PROMPT + 1, PROMPT + STEPS + 1)
    for choice in choices:
        assert torch.equal(choice.rows_read, 2 * choice.kept.sum(-1) + seen * choice.retrieved)
        assert choice.kept.sum(-1).tolist() == [[10, 11] * (STEPS // 2)] * HEADS


@pytest.mark.parametrize(("size", "parts"), [(128, (8, 88, 32)), (512, (16, 432, 64)), (1, (0, 0, 1))])
def test_hshare_splits_both_published_budgets(size: int, parts: tuple[int, ...]) -> None:
    assert tuple(int(part) for part in HShare.split(torch.tensor(size))) == parts


def test_double_sparse_finds_planted_channels() -> None:
    one = Model.random(0)
    one.keys[:, 0, :, 5] *= 30
    one.keys[:, 1, :, 2] *= 30
    order = DoubleSparse().fitted([[one.rows(layer, 0, STEPS, Memory()) for layer in range(LAYERS)]]).order
    assert order is not None and order[:, :, 0].tolist() == [[5, 2]] * LAYERS


def test_layers_that_a_publication_exempts() -> None:
    """Dense layers choose nothing; TidalDecode's selecting layers attend to everything and score."""
    model, memory = Model.random(2), Memory()
    tidal = dataclasses.replace(fitted("tidal-decode"), full=1, again=3)
    exempt = (
        (Quest(), (0, 1), ()),
        (fitted("double-sparse"), (0, 1), ()),
        (Twilight(), (0, 1), ()),
        (tidal, (0,), (1, 3)),
        (fitted("kascade"), (), (0,)),
    )
    for method, dense, full in exempt:
        own = method.published[0]
        assert own.dense_layers == dense and own.full_layers == full
        for layer in range(LAYERS):
            rows = model.rows(layer, 0, STEPS, memory)
            choice = dataclasses.replace(own, tokens=8, fraction=0).choose(rows)
            whole = layer in (*dense, *full)
            assert bool((choice.kept == rows.visible).all()) == whole
            if whole:
                assert torch.equal(choice.rows_read, 2 * rows.num_visible.expand(HEADS, -1))
            if layer in dense:
                assert not choice.contested.any() and not choice.retrieved.any()
            elif layer in full:
                assert choice.contested.all() and choice.retrieved.all()


@pytest.mark.parametrize("method", [DoubleSparse(), TidalDecode(), Kascade()])
def test_what_was_not_fitted_says_so(method: Baseline) -> None:
    rows = Model.random().rows(0, 0, STEPS, Memory())
    with pytest.raises(InputError, match=f"{method.name}: .*; fit it first"):
        method.select(rows, torch.ones(HEADS, STEPS, dtype=torch.long))
    with pytest.raises(InputError, match=f"{method.name}: no prompts"):
        method.fitted([])


def test_what_is_asked_for_in_words() -> None:
    methods = [StreamingLLM(), H2O(), DoubleSparse(), Kascade(), Twilight()]
    words = [[str(own) for own in method.published] for method in methods]
    labels = ["1/16, d/4 in 4 bits"]
    assert words == [["1024"], ["20 % of the prompt"], labels, ["10 % or 128"], ["p = 0.85", "p = 0.95"]]


def test_h2o_keeps_a_fifth_of_the_prompt_however_much_follows() -> None:
    model, (own,) = Model.random(1), H2O().published
    memory = model.memory()
    kept = [own.choose(model.rows(0, step, step + 1, memory)).kept.sum(-1) for step in range(STEPS)]
    assert {int(count) for of_step in kept for count in of_step} == {round(PROMPT / 5)}


# --- in a model ---


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3"])
def test_one_pass_equals_step_by_step(variant: str, name: str) -> None:
    model_type, settings = VARIANTS[variant]
    model = exact_model(model_type, **settings)
    tokens, prefill = random_tokens(60, seed=5), 44
    selector = METHODS[name].at(0.5 if name == "twilight" else 0.3)
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
