"""The second model's training: the fast forward, the loader, resuming, checkpoints in pieces, measuring."""

import hashlib
import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prhs_calibration.reference_model import attention_figures, data, measure, prepare, reference_path
from prhs_calibration.reference_model.attention_loss import targets_by_row
from prhs_calibration.reference_model.checkpoint import apply_changes, save_changes
from prhs_calibration.reference_model.fused import FusedLlama
from prhs_calibration.reference_model.loader import Loader
from prhs_calibration.reference_model.long_run import LongRun
from prhs_calibration.reference_model.model import new_model, save_weights, started_model
from prhs_calibration.reference_model.options import TrainingOptions
from prhs_calibration.reference_model.schedule import (
    FINE_TUNE_STAGES,
    long_attention_weight,
    long_learning_rate,
    long_stage,
)
from prhs_calibration.reference_model.task_draws import DRAW, episode_weights
from prhs_calibration.reference_model.task_rows import TaskRows
from prhs_calibration.reference_model.tokenizer import tokenize
from prhs_kernels.errors import InputError, UsageError

TINY = {"hidden": 32, "layers": 3, "ffn": 48, "query_heads": 4, "kv_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def rows():
    tokenizer = AutoTokenizer.from_pretrained(str(reference_path()))
    files = dict(list(data.held_out_files().items())[:6])
    return TaskRows(tokenizer, tokenize(tokenizer, files), seed=3)


def tiny(tmp_path, **changes):
    options = TrainingOptions(
        out=tmp_path, recipe="long", context_length=256, rope_theta=5e5, tokens_per_step=512, **TINY
    )
    return replace(options, **changes)


def test_fast_forward_and_its_gradients_are_those_of_transformers(tmp_path):
    model = new_model(tiny(tmp_path))
    ids = torch.randint(3, 2048, (3, 37), generator=torch.Generator().manual_seed(0))
    fused = FusedLlama(model, dtype=torch.float32)
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(fused.logits(fused.hidden(ids)).view_as(logits), logits, rtol=1e-4, atol=1e-4)
    expected = model(input_ids=ids, labels=ids).loss
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = fused.nats(ids)
    assert not found[:, 0].any()
    (found.sum() / (ids.numel() - len(ids))).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-6)


def test_tap_sees_rotated_queries_of_every_layer(tmp_path):
    model = new_model(tiny(tmp_path))
    seen = {}
    ids = torch.full((1, 9), 5)
    FusedLlama(model, dtype=torch.float32).hidden(
        ids, lambda layer, q, k, v, x: seen.update({layer: (q, k, v, x)})
    )
    assert sorted(seen) == [0, 1, 2]
    query, key, value, x = seen[0]
    assert query.shape == (1, 4, 9, 8) and key.shape == value.shape == (1, 2, 9, 8) and x.shape == (9, 32)
    assert torch.allclose(value[0, 0, 0], value[0, 0, 5])  # the same token everywhere
    assert not torch.allclose(key[0, 0, 0], key[0, 0, 5])  # but turned by its position


def test_curriculum_reaches_the_whole_context_and_rates_fall():
    assert [long_stage(p, 8192)[0] for p in (0, 0.1, 0.2, 0.4, 0.6, 0.74, 1)] == [
        256,
        512,
        1024,
        2048,
        4096,
        8192,
        8192,
    ]
    fine_tune = [long_stage(p, 8192, FINE_TUNE_STAGES)[0] for p in (0, 0.2, 0.5, 0.85, 0.95, 1)]
    assert fine_tune == [512, 1024, 2048, 4096, 8192, 8192]
    assert [long_stage(p, 8192, FINE_TUNE_STAGES, 4096)[0] for p in (0, 0.49, 0.51)] == [4096, 4096, 8192]
    assert long_stage(0.0, 8192, FINE_TUNE_STAGES, 8192)[0] == 8192
    assert long_stage(0.0, 256, FINE_TUNE_STAGES, 512)[0] == 256
    assert long_stage(0.99, 1024)[0] == 1024 and long_stage(0.0, 128)[0] == 128
    rates = [long_learning_rate(p / 100, 1.0) for p in range(101)]
    assert rates[2] == rates[40] == 1.0 and rates[100] == pytest.approx(0.02)
    assert all(a >= b for a, b in zip(rates[2:], rates[3:], strict=False))
    assert long_attention_weight(0.1) == 1 and long_attention_weight(0.25) == 0


def test_workers_hand_out_the_steps_in_order_and_close_with_full_queues(rows):
    loader = Loader(
        rows, tokens_per_batch=512, workers=2, length=128, length_of=lambda step: 128 if step < 3 else 256
    )
    inline = Loader(rows, tokens_per_batch=512, workers=0, length=128, length_of=loader.length_of)
    for _ in range(6):
        assert np.array_equal(next(loader).ids, next(inline).ids)
    loader.close()
    assert not any(process.is_alive() for process in loader._processes)
    assert inline.step == 6 and next(inline).ids.shape == (2, 256)


def test_workers_that_are_cut_off_in_the_middle_of_a_batch_do_not_hold_up_the_end(rows):
    loader = Loader(rows, tokens_per_batch=65536, workers=1, length=256)
    next(loader)
    time.sleep(1.5)  # by now a batch larger than a pipe holds is half-way through it
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 4 and not loader._processes[0].is_alive()


def test_length_can_change_while_running(rows):
    loader = Loader(rows, tokens_per_batch=512, workers=0, length=128)
    assert next(loader).ids.shape == (4, 128)
    loader.set_length(512)
    assert next(loader).ids.shape == (1, 512)


def test_targets_of_the_auxiliary_loss_stay_in_their_rows(rows):
    batch = rows.batch(0, 256, 8)
    asked, stated = targets_by_row(batch, np.random.default_rng(0))
    assert asked.shape == stated.shape and (asked >= 0).sum() > 20
    for row in range(8):
        for a, s in zip(asked[row], stated[row], strict=True):
            assert (a < 0) == (s < 0)
            if a >= 0:
                assert s < a and batch.ids[row, a] == batch.ids[row, s]


def test_a_run_that_is_resumed_ends_like_one_that_was_not(rows, tmp_path):
    def run(folder, **changes):
        options = tiny(tmp_path / folder, tokens=512 * 8, save_seconds=1e9, **changes)
        made = LongRun(options, rows.tokenizer, rows, rows)
        made.loop()
        return made

    straight = run("one")
    run("two", stop_after=3)
    resumed = run("two", resume=True)
    assert resumed.step == straight.step and resumed.tokens_seen == straight.tokens_seen == 512 * 8
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_fine_tune_changes_the_tensors_asked_for_and_no_other_bit(rows, tmp_path):
    start = tmp_path / "start"
    save_weights(new_model(tiny(tmp_path, seed=4)), start, max_shard_size="40KB")
    rows.tokenizer.save_pretrained(start)

    def run(folder, **changes):
        options = tiny(tmp_path / folder, tokens=512 * 6, save_seconds=1e9, peak_lr=0.01, **changes)
        options = replace(options, start=start, trainable=r"layers\.1\.self_attn", wide=0.5)
        made = LongRun(options, rows.tokenizer, rows, rows)
        made.loop()
        return made

    straight = run("one")
    run("two", stop_after=2)
    resumed = run("two", resume=True)
    before = AutoModelForCausalLM.from_pretrained(start, dtype=torch.bfloat16)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.bfloat16)
    for name, parameter in before.named_parameters():
        same = torch.equal(parameter, after.get_parameter(name))
        assert same != ("layers.1.self_attn" in name), name
        assert torch.equal(straight.model.get_parameter(name), resumed.model.get_parameter(name))
    pieces = sorted(path.name for path in start.glob("*.safetensors"))
    equal = [(start / p).read_bytes() == (tmp_path / "two" / p).read_bytes() for p in pieces]
    assert len(pieces) > 2 and 0 < sum(equal) < len(pieces)
    assert (tmp_path / "two" / "config.json").read_bytes() == (start / "config.json").read_bytes()


def test_emphasis_draws_a_kind_more_often_and_knows_the_kinds():
    plain, more = episode_weights(""), episode_weights("copy,chain")
    for before, after in zip(plain, more, strict=True):
        ratios = {kind: b / a for kind, a, b in zip(DRAW, before, after, strict=True) if a}
        assert {kind for kind, ratio in ratios.items() if ratio == 4} == {"copy", "chain"}
    with pytest.raises(UsageError, match="'needles'.*multi_value"):
        episode_weights("needles")


def test_changes_that_do_not_fit_a_checkpoint_are_refused(tmp_path):
    save_weights(new_model(tiny(tmp_path)), tmp_path / "start")
    save_changes(tmp_path / "wider", new_model(tiny(tmp_path, hidden=64)))
    with pytest.raises(InputError, match="is not the bf16 tensor"):
        apply_changes(tmp_path / "start", tmp_path / "wider", tmp_path / "out")
    save_changes(tmp_path / "deeper", new_model(tiny(tmp_path, layers=4)))
    with pytest.raises(InputError, match=r"has no tensor model\.layers\.3"):
        apply_changes(tmp_path / "start", tmp_path / "deeper", tmp_path / "out")
    with pytest.raises(InputError, match="no tensor of .* matches --trainable 'layer_9'"):
        started_model(tiny(tmp_path, start=tmp_path / "start", trainable="layer_9"))


def test_a_loss_that_is_not_a_number_goes_back_to_the_saved_state(rows, tmp_path):
    run = LongRun(tiny(tmp_path, tokens=512 * 2), rows.tokenizer, rows, rows)
    run.save()
    kept = run.model.model.norm.weight.clone()
    run.model.model.norm.weight.data.fill_(float("nan"))
    run._save_or_restore({"text": float("nan")})
    assert torch.equal(run.model.model.norm.weight, kept) and run.rate_factor == 0.5


def test_published_checkpoint_comes_in_small_pieces_and_loads(rows, tmp_path):
    options = tiny(tmp_path / "out", tokens=512 * 2, publish=tmp_path / "published")
    run = LongRun(options, rows.tokenizer, rows, rows)
    run.loop()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "published", dtype=torch.bfloat16)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(torch.bfloat16))
    curves = json.loads((tmp_path / "published" / "curves.json").read_text())
    assert curves["steps"] == 2 and curves["options"]["recipe"] == "long"
    save_weights(run.model, tmp_path / "pieces", max_shard_size="100KB")
    sizes = [path.stat().st_size for path in (tmp_path / "pieces").glob("*.safetensors")]
    assert len(sizes) > 1 and (tmp_path / "pieces" / "model.safetensors.index.json").exists()


def test_exact_share_counts_whole_answers(tmp_path):
    model = new_model(tiny(tmp_path))
    forward = FusedLlama(model, dtype=torch.float32)
    ids = torch.randint(3, 2048, (4, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for _ in range(3):  # write the model's own greedy continuation into the last three places
            place = 17 + _
            logits = model(input_ids=ids[:, :place]).logits[:, -1]
            ids[:, place] = logits.argmax(-1)
    ids[3, 19] = 2047 - ids[3, 19]
    starts = np.full(4, 17)
    with torch.no_grad():
        assert measure.exact_share(forward, ids.numpy().astype(np.uint16), starts, "cpu") == 0.75


def test_attention_figures_of_known_patterns(tmp_path):
    model = new_model(tiny(tmp_path))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()  # every row uniform
        figures = attention_figures.attention_figures(
            FusedLlama(model, dtype=torch.float32), np.full((2, 64), 9, dtype=np.uint16), "cpu"
        )
    assert figures["positions_for_98_percent_mean"] == pytest.approx(0.98, abs=0.02)
    assert figures["sink_mass_first_mean"] == pytest.approx(1 / 60, abs=0.002)
    assert figures["overlap_rows_mean"] == pytest.approx(1.0, abs=1e-4)
    assert np.array(figures["adjacent_cosine"]).shape == (3, 4)


def test_collected_text_leaves_out_held_out_lines_repeats_and_other_licences(tmp_path, monkeypatch):
    held_out = max(data.held_out_files().values(), key=len)
    own = "\n".join(f"def function_number_{i}(argument): return argument + {i}" for i in range(40))
    package = tmp_path / "rich"
    (package / "_vendor").mkdir(parents=True)
    texts = {
        "good.py": own,
        "same.py": own + "\n",
        "copied.py": held_out[:20_000],
        "_vendor/other.py": own[5:],
    }
    texts["copyleft.py"] = "# GNU General Public License\n" + own.replace("function", "method")
    for name, text in texts.items():
        (package / name).write_text(text)
    monkeypatch.setattr(data, "stdlib_files", lambda: {})
    assert list(prepare.collect(tmp_path)) == ["rich/good.py"]
    facts = prepare.manifest({"rich/good.py": own})
    assert facts["rich"]["files"] == 1 and facts["rich"]["licence"] == "MIT"


def test_the_weights_are_those_that_the_manifest_and_the_card_speak_of():
    folder = reference_path("weights-8k")
    facts = json.loads((folder / "manifest.json").read_text())
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}
    assert hashes == facts["weights"] and len(hashes) == 3
    card = (folder / "MODEL_CARD.md").read_text()
    for part in facts["fine_tune"]["parts"]:
        assert f"--favoured {part['options']['favoured']}" in card and f"| {part['part']} |" in card
        pattern = part["options"]["trainable"]
    assert f"'{pattern}'" in card
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    changed = {piece for name, piece in index.items() if re.search(pattern, name)}
    assert changed == set(hashes) - {"model-00003-of-00003.safetensors"}


def test_packed_tokens_come_back():
    tokens = np.array([0, 1, 65535, 300], dtype=np.uint16)
    assert np.array_equal(data.unpack_tokens(data.pack_tokens(tokens)), tokens)
