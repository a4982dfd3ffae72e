"""Long-context tasks: seeded, of exact length in any tokenizer, answerable from the context alone."""

import re
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from prhs_calibration.corpus import built_in_text
from prhs_calibration.evaluation.tasks import TASKS, entities, forms, people, structures
from prhs_calibration.evaluation.tasks.assemble import continuation
from prhs_calibration.evaluation.tasks.episodes import forms_of
from prhs_calibration.reference_model import data, reference_path
from prhs_calibration.reference_model.task_rows import TaskRows
from prhs_calibration.reference_model.tokenizer import tokenize
from prhs_calibration.reference_model.wordings import all_forms, wordings
from prhs_kernels.errors import UsageError

EXACT = sorted(name for name, task in TASKS.items() if task.metric == "exact")
NAMES = (
    "single_needle multi_key_needle lookup_64 variable_tracking multi_value common_word paragraph_question "
    "copy_span perplexity"
).split()


class Bytes:
    """A tokenizer of bytes that puts two special tokens in front."""

    def __call__(self, text, *, add_special_tokens=True, verbose=True):
        ids = [byte + 2 for byte in text.encode()]
        return SimpleNamespace(input_ids=[0, 1, *ids] if add_special_tokens else ids)

    def decode(self, ids):
        return bytes(i - 2 for i in ids if i > 1).decode(errors="replace")


@lru_cache
def metaspace():
    """A tokenizer that, like Llama 2's, adds a space of its own in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>"], show_progress=False)
    letters = "".join(map(chr, range(32, 127))) + "\n"
    inner.train_from_iterator([built_in_text()[:60_000], letters], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


@lru_cache
def reference():
    return AutoTokenizer.from_pretrained(str(reference_path()))


TOKENIZERS = {"reference": reference, "bytes": Bytes, "metaspace": metaspace}


def texts(tokenizer, example):
    return tuple(
        tokenizer.decode(list(ids)) for ids in (example.context_ids, example.question_ids, example.answer_ids)
    )


def test_the_registry_holds_the_promised_tasks():
    assert sorted(TASKS) == sorted(NAMES)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_length_is_exact_and_items_are_seeded_in_any_tokenizer(name, kind):
    tokenizer = TOKENIZERS[kind]()
    for length in (5000, 5003):
        for templates in ("seen", "unseen"):
            one = TASKS[name].build(tokenizer, length=length, seed=1, templates=templates)
            assert len(one.context_ids) + len(one.question_ids) + len(one.answer_ids) == length
            assert one.answer_ids and one.context_ids
            assert one == TASKS[name].build(tokenizer, length=length, seed=1, templates=templates)
            other = TASKS[name].build(tokenizer, length=length, seed=2, templates=templates)
            assert one.input_ids != other.input_ids


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", EXACT)
def test_answer_tokens_spell_the_answer_and_continue_the_question(name, kind):
    tokenizer = TOKENIZERS[kind]()
    for seed in range(3):
        for templates in ("seen", "unseen"):
            example = TASKS[name].build(tokenizer, length=5000, seed=seed, templates=templates)
            _, question, answer = texts(tokenizer, example)
            for part in example.answers:
                assert part in answer
                assert part not in question
            whole = tokenizer.decode(example.question_ids + example.answer_ids)
            assert continuation(tokenizer, whole) == example.question_ids + example.answer_ids


@pytest.mark.parametrize("templates", ["seen", "unseen"])
@pytest.mark.parametrize("name", EXACT)
def test_answers_follow_from_the_context_alone(name, templates):
    """A solver that knows nothing of the generator's draw finds the answer, and nothing else fits."""
    tokenizer = reference()
    for seed in range(12):
        example = TASKS[name].build(tokenizer, length=3000, seed=seed, templates=templates)
        context, question, answer = texts(tokenizer, example)
        assert SOLVERS[name](context, question + answer, example.answers), (seed, question, example.answers)


def lines_with(context, word):
    return [
        line
        for line in context.split("\n")
        if re.search(rf"(?<![A-Za-z_]){re.escape(word)}(?![A-Za-z_])", line)
    ]


def asked_name(question):
    """The made-up name in a question."""
    known = set(entities.names("seen")) | set(entities.names("unseen"))
    found = [word for word in re.findall(r"[A-Z][a-z]+", question) if word in known]
    assert found and len(set(found)) == 1
    return found[0]


def solve_fact(context, asked, answers):
    lines = lines_with(context, asked_name(asked))
    return len(lines) == 1 and re.findall(r"\d{5}", lines[0]) == list(answers)


def solve_chain(context, asked, answers):
    known = set(entities.identifiers("seen")) | set(entities.identifiers("unseen"))
    prompt = asked.split("->")[-3]
    other = [word for word in re.findall(r"[a-z]+_[a-z]+", prompt) if word in known][0]
    (line,) = lines_with(context, other)
    (base,) = {word for word in re.findall(r"[a-z]+_[a-z]+", line) if word in known} - {other}
    values = [m for line in lines_with(context, base) for m in re.findall(r"\d{5}", line)]
    return [base, *values] == list(answers)


def solve_values(context, asked, answers):
    name = asked_name(asked)
    found = {}
    for line in lines_with(context, name):
        place, value = re.search(rf"{name} (\d)\D+(\d{{5}})", line).groups()
        found[int(place)] = value
    return [found[i] for i in sorted(found)] == list(answers) and sorted(found) == [1, 2, 3, 4]


def solve_common(context, asked, answers):
    heads = [head for rows in structures.WORD_LISTS.values() for head, _ in rows]
    words = [
        w for line in context.split("\n") for h in heads if line.startswith(h + " ") for w in line.split()
    ]
    counts = {word: words.count(word) for word in set(words) & set(entities.WORDS)}
    best = sorted(counts.values())
    return counts[answers[0]] == best[-1] and best[-1] > 2 * best[-2]


def solve_paragraph(context, asked, answers):
    lines = lines_with(context, asked_name(asked))
    return len(lines) == 4 and sum(bool(lines_with(line, answers[0])) for line in lines) == 1


def solve_copy(context, asked, answers):
    (line,) = lines_with(context, asked_name(asked))
    return line.endswith(answers[0]) and len(answers[0].split()) == 24


SOLVERS = {
    "single_needle": solve_fact,
    "multi_key_needle": solve_fact,
    "lookup_64": solve_fact,
    "variable_tracking": solve_chain,
    "multi_value": solve_values,
    "common_word": solve_common,
    "paragraph_question": solve_paragraph,
    "copy_span": solve_copy,
}


def test_lookup_has_64_pairs_and_multi_key_many_needles():
    tokenizer = reference()
    known = set(entities.names("seen"))
    for name, at_least in (("lookup_64", 64), ("multi_key_needle", 60)):
        context, _, _ = texts(tokenizer, TASKS[name].build(tokenizer, length=5000, seed=0, templates="seen"))
        assert len(known & set(re.findall(r"[A-Z][a-z]+", context))) >= at_least


def test_too_short_is_refused_in_one_line():
    with pytest.raises(UsageError, match="too short.*at least"):
        TASKS["lookup_64"].build(reference(), length=300, seed=0, templates="seen")
    with pytest.raises(UsageError, match="templates 'both'"):
        TASKS["single_needle"].build(reference(), length=300, seed=0, templates="both")
    with pytest.raises(UsageError, match="length 1"):
        TASKS["perplexity"].build(reference(), length=1, seed=0, templates="seen")


def test_held_out_names_and_forms_are_disjoint_from_those_trained_with():
    for pool in (entities.names, entities.identifiers):
        seen, unseen = set(pool("seen")), set(pool("unseen"))
        assert len(seen) > 5000 and len(unseen) > 1500 and not seen & unseen
    assert not set(entities.attributes("seen")) & set(entities.attributes("unseen"))
    tables = (forms.STATEMENTS, forms.QUESTIONS, structures.PAIRS, structures.ASSIGNMENTS, structures.ALIASES)
    tables += (structures.TRACES, structures.LISTED, structures.LISTED_QUESTIONS, structures.PASSAGES)
    for table in (*tables, structures.WORD_LISTS):
        assert table["seen"] and table["unseen"] and not set(table["seen"]) & set(table["unseen"])
    for fact, seen_forms in people.PEOPLE["seen"].items():
        assert not set(seen_forms) & set(people.PEOPLE["unseen"][fact])


def words_and_signs(form):
    return re.findall(r"\{\w\}|[a-z0-9_]+|[^a-z0-9_\s]", form.lower())


def test_no_wording_trained_with_holds_a_held_out_form_or_four_words_of_one():
    """Full surface forms are disjoint, and so is every run of four words, signs or slots."""
    trained = {form for form in all_forms(wordings()) if form}
    held_out = {form for form in all_forms(forms_of("unseen")) if form}
    assert len(trained) > 40_000 and not trained & held_out
    of_trained = {f" {' '.join(words_and_signs(form))} " for form in trained}
    runs = {
        tuple(words[i : i + 4])
        for words in map(words_and_signs, held_out)
        for i in range(max(1, len(words) - 3))
    }
    assert len(runs) > 100
    text = "\n".join(of_trained)
    assert [run for run in runs if f" {' '.join(run)} " in text] == []
    assert not set(wordings().attributes) & set(entities.UNSEEN_ATTRIBUTES)


def test_wordings_are_many_and_hold_their_slots():
    made = wordings()
    for name, slots in {
        "statements": "nv",
        "questions": "nv",
        "assignments": "nv",
        "aliases": "nv",
        "traces": "n",
        "listed": "niv",
        "listed_questions": "n",
    }.items():
        table = getattr(made, name)
        assert len(set(table)) > 1500, name
        for form in table:
            assert all(f"{{{slot}}}" in form for slot in slots), form
    assert all(form.endswith("{n} ->") for form in made.traces)
    for pairs in (made.pairs, made.passages, made.word_lists, *made.people.values()):
        assert len(set(pairs)) > 1500
    assert all("{n}" in row and "{v}" in row and len(asked) == 3 for _, row, _, asked in made.pairs)
    assert all("{n}" in head and "{n}" in asked for head, asked in made.passages)
    for form in all_forms(made):
        assert not re.search(r"NOUN|SEP|\w\|\w|  ", form), form


def test_unseen_items_use_only_what_training_never_uses():
    tokenizer = reference()
    seen = set(entities.names("seen")) | set(entities.identifiers("seen"))
    for name in EXACT:
        example = TASKS[name].build(tokenizer, length=3000, seed=3, templates="unseen")
        words = set(re.findall(r"[A-Z][a-z]+|[a-z]+_[a-z]+", texts(tokenizer, example)[0]))
        assert not words & seen


def test_text_around_is_held_out_text():
    tokenizer = reference()
    example = TASKS["perplexity"].build(tokenizer, length=1500, seed=0, templates="seen")
    context, _, end = texts(tokenizer, example)
    assert (context + end).removeprefix("<s>") in built_in_text()
    assert not set(data.held_out_files()) & set(data.training_files())


@pytest.fixture(scope="module", params=[0.0, 0.8])
def rows(request):
    files = dict(list(data.held_out_files().items())[:20])
    return TaskRows(reference(), tokenize(reference(), files), seed=5, wide=request.param)


def test_training_rows_state_every_answer_before_they_ask_for_it(rows):
    for length in (256, 2048):
        batch = rows.batch(3, length, 16384 // length)
        flat = batch.ids.flatten()
        known = batch.planted >= 0
        assert known.mean() > 0.9 and len(batch.kinds) > 20
        assert (flat[batch.planted[known]] == flat[batch.answers[known]]).all()
        assert (batch.planted[known] < batch.answers[known]).all()
        assert (batch.planted[known] // length == batch.answers[known] // length).all()
        assert not batch.text_mask.flatten()[batch.answers].any()
        assert np.array_equal(batch.ids, rows.batch(3, length, 16384 // length).ids)


def test_training_rows_hold_no_held_out_name_and_are_what_the_tokenizer_makes_of_their_text(rows):
    batch = rows.batch(1, 2048, 24)
    unseen = set(entities.names("unseen")) | set(entities.identifiers("unseen"))
    used = set(entities.names("seen")) | set(entities.identifiers("seen"))
    differing = 0
    found = set()
    for ids in batch.ids:
        text = reference().decode(ids[1:])
        found |= set(re.findall(r"[A-Z][a-z]+|[a-z]+_[a-z]+", text))
        differing += reference()(text, add_special_tokens=False).input_ids != ids[1:].tolist()
    assert not found & unseen and len(found & used) > 100
    assert differing <= 4  # rows of random tokens are no text
