"""The embedded model: tokenizer, split by file, batches, resumable training, recall as shipped."""

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from prhs_calibration.reference_model import data, reference_path
from prhs_calibration.reference_model.attention_loss import row_loss
from prhs_calibration.reference_model.batches import BatchSource
from prhs_calibration.reference_model.checkpoint import load_state
from prhs_calibration.reference_model.evaluate import recall_by_length, recall_item
from prhs_calibration.reference_model.options import TrainingOptions
from prhs_calibration.reference_model.recall import NAMES, draw_facts
from prhs_calibration.reference_model.schedule import attention_loss_weight, learning_rate, stage_at
from prhs_calibration.reference_model.tokenizer import tokenize
from prhs_calibration.reference_model.train import train
from prhs_kernels.errors import InputError


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(reference_path()))


@pytest.fixture(scope="module")
def source(tokenizer):
    files = dict(list(data.held_out_files().items())[:12])
    return BatchSource(tokenizer, tokenize(tokenizer, files), seed=7)


def test_every_digit_is_a_token_and_text_survives(tokenizer):
    text = "def f(x=48213):\n    return 'é' + x  # The room key of Oslo is 00917.\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text
    digits = [token for token in tokenizer.convert_ids_to_tokens(ids) if any(map(str.isdigit, token))]
    assert digits == list("4821300917")
    assert not any(any(map(str.isdigit, t)) and len(t) > 1 for t in tokenizer.get_vocab())
    assert len(tokenizer) == 2048 and tokenizer.chat_template is None and tokenizer.pad_token_id is not None


def test_config_is_a_gqa_llama_of_the_promised_size():
    config = json.loads((reference_path() / "config.json").read_text())
    assert (
        config["model_type"] == "llama" and config["num_hidden_layers"] >= 8 and config["vocab_size"] == 2048
    )
    assert config["num_attention_heads"] > config["num_key_value_heads"] >= 2
    assert sum(path.stat().st_size for path in reference_path().iterdir()) < 14 * 2**20
    with safe_open(reference_path() / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}


def test_held_out_files_are_never_trained_on():
    held_out = data.held_out_files()
    assert not set(held_out) & set(data.training_files())
    assert sum(map(len, held_out.values())) > 3_000_000
    assert not any("Copyright" in text for text in held_out.values())


def test_split_is_by_file_and_packing_is_deterministic():
    sources = {f"module_{i}.py": f"word = {i}\n" * 100 for i in range(50)} | {
        "test/test_a.py": "x",
        "b.py": "Licence",
    }
    training, held_out = data.split(sources, held_out_chars=10_000)
    assert held_out and set(training) | set(held_out) == set(sources) and not set(training) & set(held_out)
    assert {"test/test_a.py", "b.py"} <= set(training)
    packed = data.pack(held_out)
    assert packed == data.pack(dict(reversed(held_out.items()))) and data.unpack(packed) == held_out


@pytest.mark.parametrize("length", [128, 1024])
def test_batches_point_from_answers_to_planted_digits(tokenizer, source, length):
    source.length, source.batch_size = length, 40
    batch = source[3]
    assert batch.ids.shape == batch.text_mask.shape == (40, length)
    asked = batch.answers >= 0
    assert 0.3 < asked.any(1).mean() < 0.9
    rows = np.nonzero(asked)[0]
    answers, planted = batch.answers[asked], batch.planted[asked]
    assert (planted < answers).all() and (batch.ids[rows, answers] == batch.ids[rows, planted]).all()
    assert not batch.text_mask[rows, answers].any() and not batch.text_mask[rows, planted].any()
    assert all(
        token.isdigit() for token in tokenizer.convert_ids_to_tokens(batch.ids[rows, answers].tolist())
    )
    again = source[3]
    assert (again.ids == batch.ids).all() and (source[4].ids != batch.ids).any()


def test_planted_lines_tokenise_as_in_running_text(tokenizer, source):
    source.length, source.batch_size = 512, 30
    batch = source[0]
    recall = batch.ids[(batch.answers >= 0).any(1)][:, 1:]
    same = [
        tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids[8:-8] == ids[8:-8].tolist()
        for ids in recall
    ]
    assert np.mean(same) > 0.9  # the cut at a span's ends may fall inside a word


def test_facts_have_different_names_and_fresh_numbers():
    facts = draw_facts(Random(0), 12)
    assert len({fact.name for fact in facts}) == 12 and len(set(NAMES)) == len(NAMES)
    assert len({fact.number for fact in facts}) > 10 and all(fact.name in fact.sentence for fact in facts)


def test_attention_loss_scores_the_target_column():
    query, key = torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)
    query[0, 3, 0] = key[0, 1, 0] = 10.0
    hit = row_loss(query, key, torch.tensor([[3, -1]]), torch.tensor([[1, -1]]))
    miss = row_loss(query, key, torch.tensor([[3, -1]]), torch.tensor([[2, -1]]))
    uniform = row_loss(torch.zeros(1, 4, 8), key, torch.tensor([[2]]), torch.tensor([[0]]))
    assert hit < 1e-3 < 10 < miss
    assert uniform.item() == pytest.approx(np.log(3))  # columns after the row do not count


def test_schedule_grows_lengths_and_ends_the_attention_loss():
    lengths = [stage_at(p, 2048)[0] for p in (0, 0.1, 0.25, 0.4, 0.7, 1.0)]
    assert lengths == [128, 256, 512, 1024, 2048, 2048] and stage_at(0.9, 512) == (512, 1.0)
    assert [attention_loss_weight(p) for p in (0, 0.4, 0.5, 1)] == pytest.approx([1, 1, 0, 0])
    assert learning_rate(0.02) == pytest.approx(2e-3) and learning_rate(1) == pytest.approx(4e-5)


def test_interrupted_training_resumes_to_the_same_bits(tokenizer, tmp_path):
    text = tmp_path / "text.xz"
    text.write_bytes(data.pack(dict(list(data.held_out_files().items())[:8])))
    options = TrainingOptions(
        out=tmp_path / "whole", text=text, tokens=8 * 512, tokens_per_step=512, hidden=64, layers=4, ffn=64,
        context_length=256, log_every=3, save_every=100,
    )  # fmt: skip
    for name in ("whole", "halves"):
        tokenizer.save_pretrained(str(tmp_path / name))
    whole = train(options)
    halves = replace(options, out=tmp_path / "halves")
    train(replace(halves, stop_after=5))
    resumed = train(replace(halves, resume=True))
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    figures = [
        json.loads((tmp_path / name / "curves.json").read_text())["curves"] for name in ("whole", "halves")
    ]
    assert [row["held_out_text"] for row in figures[0]] == [row["held_out_text"] for row in figures[1]]
    saved = AutoModelForCausalLM.from_pretrained(str(tmp_path / "whole"), dtype=torch.float32)
    assert torch.equal(saved.lm_head.weight, whole.lm_head.weight.bfloat16().float())


def test_a_broken_state_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"not a state")
    with pytest.raises(InputError, match="not a training state"):
        load_state(path, torch.nn.Linear(2, 2), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]))


@pytest.mark.parametrize("length", [256, 2048])
def test_recall_items_have_the_length_and_the_fact(tokenizer, length):
    for index in range(5):
        ids = recall_item(tokenizer, length, Random(index))
        text = tokenizer.decode(ids)
        assert len(ids) == length and text.count(text[-5:]) >= 2


def test_shipped_weights_recall_planted_facts(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(str(reference_path()), dtype=torch.float32).eval()
    # At the measured 99 % or more, fewer than 10 of 12 right has probability below 0.001.
    shares = recall_by_length(model, tokenizer, lengths=(512, 2048), count=12, seed=1)
    assert min(shares.values()) >= 10 / 12
