"""The embedded bundle on the embedded model: it fits, it finds planted facts, and a moved dial is caught."""

from __future__ import annotations

import pytest

from prhs_calibration import bundle_store, corpus, models
from prhs_calibration.bundle import Bundle
from prhs_calibration.models import LoadedModel
from prhs_calibration.verify import verify_bound
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.runtime.decode import Generation, generate_tokens

DELTA = 0.02


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return models.load("reference", device="cpu")


@pytest.fixture(scope="module")
def bundle(loaded: LoadedModel) -> Bundle:
    found = Bundle.load(bundle_store.reference_bundle_path())
    found.check_model(loaded.fingerprint, loaded.weights_hash)
    return found


def test_it_promises_two_percent(bundle: Bundle) -> None:
    assert bundle.metadata.delta == DELTA
    assert bundle.metadata.split_sizes["select"] == 128
    assert float(bundle.mean_loss[bundle.metadata.dial_index]) <= (129 * DELTA - 1) / 128


def test_it_finds_a_planted_fact_on_a_tenth_of_the_mass(loaded: LoadedModel, bundle: Bundle) -> None:
    params = bundle.params(bundle.dial_for(0.1))
    text, answer = corpus.recall_prompt(loaded.tokenizer, num_tokens=1200, seed=11)
    ids = loaded.tokenizer(text)["input_ids"]
    run = Generation()
    sparse = [t for (t,) in generate_tokens(loaded.model, [ids], params, max_new_tokens=8, run=run)]
    dense = [
        t
        for (t,) in generate_tokens(loaded.model, [ids], dense_params(loaded.model.config), max_new_tokens=8)
    ]
    for tokens in (sparse, dense):
        assert answer.strip() in loaded.tokenizer.decode(tokens)
    assert run.stats.attended_fraction < 0.25
    assert run.stats.kv_bytes_read < 0.5
    assert 0 < run.stats.retrieval_ratio < 1


@pytest.mark.parametrize("seed", range(5))
def test_a_dial_moved_to_three_times_the_risk_is_caught(
    loaded: LoadedModel, bundle: Bundle, seed: int
) -> None:
    moved = bundle.with_dial(int((bundle.mean_loss - 3 * DELTA).abs().argmin()))
    assert 2 * DELTA < float(bundle.mean_loss[moved.metadata.dial_index]) < 4 * DELTA
    report = verify_bound(loaded, moved, delta=DELTA, num_prompts=24, seed=seed)
    assert report.verdict == "violated" and report.decision.lower > DELTA


def test_the_honest_bundle_is_not_called_violated(loaded: LoadedModel, bundle: Bundle) -> None:
    report = verify_bound(loaded, bundle, delta=DELTA, num_prompts=16, seed=7)
    assert report.verdict == "undecided"  # 16 prompts can never hold a 2 % promise
    assert report.decision.prompts_to_decide is not None and report.decision.prompts_to_decide > 150
    assert report.violations == []
