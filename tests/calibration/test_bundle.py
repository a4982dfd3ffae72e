"""Bundles: same inputs give the same bytes, and nothing that calibration cannot have written is accepted."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import safetensors.torch
import torch

from prhs_calibration import bundle_store, files, risk
from prhs_calibration.bundle import Bundle, BundleMetadata, read_metadata
from prhs_calibration.fingerprint import fingerprint_of
from prhs_kernels.errors import InputError, ResourceError, UsageError
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.params import FreezeMode
from prhs_kernels.testing.models import tiny_config

ROOT = pathlib.Path(__file__).parents[2]
DIAL = [0.125, 0.25, 0.5, 1.0]
NUM_PROMPTS = 60


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dial = torch.tensor(DIAL)
    spread = torch.rand(4, 2, generator=generator) * 0.5 + 0.5
    ratio = dial[:, None, None] * spread
    ratio[-1] = 1.0
    heads = torch.ones(4, 2)
    # the mean loss falls from 0.08 to 0 along the dial, each prompt differs
    loss = torch.tensor([0.08, 0.03, 0.002, 0.0]) * (0.5 + torch.rand(NUM_PROMPTS, 1, generator=generator))
    return {
        "time/lambda": dial,
        "time/budget_ratio": ratio,
        "time/budget_tokens": torch.tensor([1, 2, 4, 0], dtype=torch.int32)[:, None, None].expand(4, 4, 2),
        "time/gate": heads.to(torch.uint8),
        "time/tau_cos": heads * 0.8,
        "time/block": (heads * 8).int(),
        "time/dilation": heads.int(),
        "depth/schedule": torch.tensor([1.0, 0.75, 1.0]),
        "layer/schedule": torch.tensor([2.0, 0.5, 1.0]),
        "risk/loss": loss,
        "profile/window_mass": torch.rand(3, generator=generator),
    }


def make_metadata(**changes: Any) -> BundleMetadata:
    metadata = BundleMetadata(
        model_id="tiny-llama",
        revision="local",
        fingerprint=fingerprint_of(tiny_config("llama")),
        weights_hash="sha256:" + "ab" * 32,
        tokenizer_hash="sha256:12",
        corpus_hash="sha256:34",
        seeds={"corpus": 0},
        split_sizes={"fit": 8, "select": NUM_PROMPTS, "verify": 0},
        context_length=512,
        delta=0.02,
        dial_index=2,
        library_versions={"torch": "2"},
        report={"misfit": 0.125, "nested": [1, None, "δ"]},
    )
    return dataclasses.replace(metadata, **changes)


def make_bundle(**changes: Any) -> Bundle:
    return Bundle(make_metadata(**changes), make_tensors())


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    target = tmp_path / "b.safetensors"
    make_bundle().save(target)
    return target


@pytest.fixture
def user_dir(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "prhs" / "bundles"


def write_raw(path: pathlib.Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """A safetensors file as a bundle would be written, without any check."""
    payload = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(payload, path, metadata={"prhs": json.dumps(metadata)})


def refused(path: pathlib.Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        Bundle.load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


# --- saving and loading ---


def test_round_trip(path: pathlib.Path) -> None:
    loaded, original = Bundle.load(path), make_bundle()
    assert loaded.metadata == original.metadata == read_metadata(path)
    assert loaded.path == path
    assert loaded.tensors.keys() == original.tensors.keys()
    for name, tensor in original.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor) and loaded.tensors[name].dtype == tensor.dtype
    assert torch.allclose(loaded.mean_loss, original.tensors["risk/loss"].double().mean(0))


def test_loaded_tensors_survive_the_file(path: pathlib.Path) -> None:
    loaded = Bundle.load(path)
    path.write_bytes(bytes(path.stat().st_size))  # in place: a view of the file would change, or crash
    assert loaded.dial.tolist() == DIAL


def test_same_inputs_give_the_same_bytes_in_other_processes(
    path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    script = (
        "import dataclasses, importlib.util, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('t', {str(pathlib.Path(__file__))!r})\n"
        "t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)\n"
        "names, metadata = t.make_tensors(), t.make_metadata()\n"
        "names = dict(sorted(names.items(), reverse=True))\n"
        "turned = dict(reversed(list(metadata.fingerprint.items())))\n"
        "metadata = dataclasses.replace(metadata, fingerprint=turned)\n"
        "t.Bundle(metadata, names).save(pathlib.Path(sys.argv[1]))\n"
    )
    roots = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "calibration"))
    for hash_seed in ("1", "2"):
        other = tmp_path / f"other{hash_seed}.safetensors"
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": roots}
        subprocess.run([sys.executable, "-c", script, str(other)], check=True, env=environment, timeout=120)
        assert other.read_bytes() == path.read_bytes()


def test_any_changed_input_changes_the_bytes(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = tmp_path / "other.safetensors"
    make_bundle(seeds={"corpus": 1}).save(other)
    assert other.read_bytes() != path.read_bytes()


def test_file_holds_one_metadata_key_without_time(path: pathlib.Path) -> None:
    header = files.read_header(path)
    assert header.metadata.keys() == {"prhs"}
    text = header.metadata["prhs"]
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


def test_interrupted_save_leaves_the_old_bundle(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_bundle(delta=0.5).save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_full_disk(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="no space left"):
        make_bundle().save(path)


def test_an_invalid_bundle_is_not_written(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "b.safetensors"
    for bundle in (
        make_bundle(dial_index=4),
        Bundle(make_metadata(), make_tensors() | {"surprise": torch.zeros(1)}),
    ):
        with pytest.raises(InputError, match=r"b\.safetensors"):
            bundle.save(target)
    assert not target.exists()


# --- files that are not (sound) bundles ---


def test_missing_and_foreign_files(tmp_path: pathlib.Path) -> None:
    refused(tmp_path / "absent.safetensors", "no such file")
    refused(tmp_path, "cannot read")
    text = tmp_path / "text.safetensors"
    text.write_text("not tensors at all")
    refused(text, "not a safetensors file")
    model = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, model, metadata={"format": "pt"})
    refused(model, "not a bundle")


@pytest.mark.parametrize("keep", [0, 5, 9, 200, 0.5, -1])
def test_truncated(path: pathlib.Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    refused(path)


def test_future_version_is_named_before_its_new_fields(path: pathlib.Path) -> None:
    metadata = json.loads(make_metadata().to_json()) | {"schema_version": 2, "something_new": 1}
    write_raw(path, make_tensors(), metadata)
    refused(path, "newer prhs", "schema 2")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("delta", 0.0),
        ("delta", 1.0),
        ("delta", "0.02"),
        ("delta", float("nan")),
        ("confidence", 1.0),
        ("dial_index", 4),
        ("dial_index", -1),
        ("dial_index", 1.0),
        ("dial_index", True),
        ("target", "certain"),
        ("freeze_mode", "melt"),
        ("key_copy", "fp64"),
        ("key_copy", "int2"),
        ("num_local", 0),
        ("num_sinks", -1),
        ("context_length", 0),
        ("reanchor", 1),
        ("seeds", {"corpus": "0"}),
        ("split_sizes", {"fit": 8, "select": NUM_PROMPTS}),
        ("split_sizes", {"fit": 8, "select": NUM_PROMPTS + 1, "verify": 0}),
        ("split_sizes", {"fit": 8, "select": 0, "verify": 0}),
        ("fingerprint", {}),
        ("fingerprint", {"num_layers": "4", "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16}),
        ("schema_version", 0),
        ("schema_version", None),
        ("model_id", None),
    ],
)
def test_bad_metadata(path: pathlib.Path, field: str, value: object) -> None:
    write_raw(path, make_tensors(), json.loads(make_metadata().to_json()) | {field: value})
    refused(path, "damaged")


def test_unknown_and_missing_metadata(path: pathlib.Path) -> None:
    metadata = json.loads(make_metadata().to_json())
    write_raw(path, make_tensors(), metadata | {"colour": 1})
    refused(path, "'colour' is unknown")
    del metadata["corpus_hash"]
    write_raw(path, make_tensors(), metadata)
    refused(path, "'corpus_hash' is missing")
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata={"prhs": "{"})
    refused(path, "not JSON")
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata={"prhs": "[1]"})
    refused(path, "schema_version")


@pytest.mark.parametrize("name", sorted(set(make_tensors()) - {"profile/window_mass"}))
def test_missing_tensor_wrong_dtype_wrong_shape_nan(path: pathlib.Path, name: str) -> None:
    metadata, tensors = json.loads(make_metadata().to_json()), make_tensors()
    write_raw(path, {key: tensor for key, tensor in tensors.items() if key != name}, metadata)
    if name.startswith(("depth", "layer")):
        Bundle.load(path)  # an axis that is off
    else:
        refused(path, repr(name), "missing")
    write_raw(path, tensors | {name: tensors[name].to(torch.float64)}, metadata)
    refused(path, repr(name), "float64")
    write_raw(path, tensors | {name: tensors[name][..., :-1]}, metadata)
    refused(path, "shape")
    write_raw(path, tensors | {name: tensors[name][None]}, metadata)
    refused(path, "shape")
    if tensors[name].is_floating_point():
        broken = tensors[name].clone()
        broken.view(-1)[0] = float("nan")
        write_raw(path, tensors | {name: broken}, metadata)
        refused(path, repr(name), "out of range")


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("time/lambda", 0, -0.1),
        ("time/lambda", 1, 0.125),  # not strictly increasing
        ("time/lambda", 3, 0.9),  # the dial must end in dense
        ("time/budget_ratio", (0, 0, 0), 0.9),  # above the next dial point
        ("time/budget_ratio", (0, 0, 0), -0.1),
        ("time/budget_ratio", (3, 0, 0), 0.99),  # the last row is dense
        ("time/budget_ratio", (2, 0, 0), float("inf")),
        ("time/budget_tokens", (0, 0, 0), 3),
        ("time/budget_tokens", (0, 0, 0), -1),
        ("time/gate", (0, 0), 3),
        ("time/tau_cos", (0, 0), 1.5),
        ("time/block", (0, 0), 0),
        ("time/dilation", (0, 0), -1),
        ("depth/schedule", 0, 4.0),
        ("depth/schedule", 0, 1.5),
        ("depth/schedule", 1, 1.0),
        ("depth/schedule", 2, float("inf")),
        ("layer/schedule", 1, 0.0),
        ("layer/schedule", 2, -1.0),
        ("risk/loss", (5, 1), 1.01),
        ("risk/loss", (5, 1), -0.01),
    ],
)
def test_values_out_of_range(path: pathlib.Path, name: str, index: Any, value: float) -> None:
    tensors = make_tensors()
    tensors[name] = tensors[name].clone()
    tensors[name][index] = value
    write_raw(path, tensors, json.loads(make_metadata().to_json()))
    refused(path, repr(name), "out of range")


def test_extra_tensor_and_empty_dial(path: pathlib.Path) -> None:
    metadata = json.loads(make_metadata().to_json())
    write_raw(path, make_tensors() | {"time/extra": torch.zeros(1)}, metadata)
    refused(path, "'time/extra'", "does not belong")
    empty = {
        name: tensor[:0] if tensor.ndim in (1, 3) and name.startswith("time") else tensor
        for name, tensor in make_tensors().items()
    }
    empty["risk/loss"] = torch.zeros(NUM_PROMPTS, 0)
    write_raw(path, empty, metadata)
    refused(path, "dial_index")


# --- using a bundle ---


def test_model_mismatch_names_the_first_field_and_both_values(path: pathlib.Path) -> None:
    bundle = Bundle.load(path)
    bundle.check_model(fingerprint_of(tiny_config("llama")), bundle.metadata.weights_hash)
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"num_hidden_layers": 6, "num_key_value_heads": 4},
            "num_layers is 4 in the bundle and 6 in the model",
        ),
        ({"num_key_value_heads": 1}, "num_kv_heads is 2 in the bundle and 1 in the model"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope.rope_theta is 10000.0 in the bundle and 500000.0 in the model",
        ),
    ]
    for overrides, words in cases:
        with pytest.raises(InputError, match=r"b\.safetensors") as caught:
            bundle.check_model(fingerprint_of(tiny_config("llama", **overrides)))
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="model_type is llama in the bundle and qwen3 in the model"):
        bundle.check_model(fingerprint_of(tiny_config("qwen3")))
    with pytest.raises(InputError, match="weights_hash"):
        bundle.check_model(fingerprint_of(tiny_config("llama")), "sha256:cd")


def test_params_of_a_dial_point() -> None:
    bundle = make_bundle()
    params = bundle.params()
    assert params.time is not None and params.depth is not None and params.layer is not None
    assert torch.equal(params.time.budget_ratio, bundle.tensors["time/budget_ratio"][2])
    assert torch.equal(params.time.budget_tokens, bundle.tensors["time/budget_tokens"][2])
    assert (params.depth.start_layer, params.depth.phi, params.depth.alpha) == (1, 0.75, 1.0)
    assert (params.layer.start_layer, params.layer.psi, params.layer.gamma) == (2, 0.5, 1.0)
    assert params.layer.mode is FreezeMode.SHARE
    assert make_bundle(freeze_mode="project").params().layer.mode is FreezeMode.PROJECT  # type: ignore[union-attr]
    assert (params.num_layers, params.num_qo_heads, params.num_kv_heads, params.head_dim) == (4, 4, 2, 16)
    assert params.time.reanchor and not make_bundle(reanchor=False).params().time.reanchor  # type: ignore[union-attr]


def test_the_end_of_the_dial_is_dense() -> None:
    bundle = make_bundle()
    assert bundle.params(3).is_dense and bundle.params_at(1.0).is_dense
    assert not bundle.params(2).is_dense and not bundle.params_at(0.999).is_dense


def test_axes_that_are_off() -> None:
    tensors = {k: v for k, v in make_tensors().items() if not k.startswith(("depth", "layer"))}
    params = Bundle(make_metadata(), tensors).params()
    assert params.time is not None and params.depth is None and params.layer is None


def test_params_between_dial_points() -> None:
    bundle = make_bundle()
    ratio, tokens = bundle.tensors["time/budget_ratio"], bundle.tensors["time/budget_tokens"]
    for index, lam in enumerate(DIAL[:-1]):
        time = bundle.params_at(lam).time
        assert time is not None and torch.equal(time.budget_ratio, ratio[index])
    time = bundle.params_at(0.3125).time  # a quarter of the way from 0.25 to 0.5
    assert time is not None
    assert torch.allclose(time.budget_ratio, 0.75 * ratio[1] + 0.25 * ratio[2])
    assert time.budget_tokens.dtype == torch.int32 and (time.budget_tokens == 2).all()  # 2.5, to even
    assert (tokens[2] == 4).all()
    for lam in (0.1, -1.0, 1.01, float("nan")):
        with pytest.raises(UsageError, match="dial"):
            bundle.params_at(lam)
    with pytest.raises(UsageError):
        bundle.params(4)
    with pytest.raises(UsageError):
        bundle.with_dial(-1)


def test_budgets_grow_with_lambda() -> None:
    bundle = make_bundle()
    previous = torch.zeros(4, 2)
    for step in range(125, 1000, 25):
        time = bundle.params_at(step / 1000).time
        assert time is not None and (time.budget_ratio >= previous).all()
        previous = time.budget_ratio


def test_with_dial_moves_the_operating_point_only(tmp_path: pathlib.Path) -> None:
    bundle = make_bundle()
    moved = bundle.with_dial(0)
    assert moved.metadata.dial_index == 0 and bundle.metadata.dial_index == 2
    assert dataclasses.replace(moved.metadata, dial_index=2) == bundle.metadata
    assert moved.dial_for(0.02) == 0  # the stored choice is believed: verification is there to refute it
    moved.save(tmp_path / "moved.safetensors")
    assert Bundle.load(tmp_path / "moved.safetensors").metadata.dial_index == 0


def test_dial_for_another_delta() -> None:
    bundle = make_bundle()
    assert bundle.dial_for(0.02) == 2
    loss = bundle.tensors["risk/loss"].double().numpy()
    for delta in (0.05, 0.1, 0.5):
        expected = risk.choose_dial(loss, delta).index
        assert bundle.dial_for(delta) == expected < 2
    assert bundle.dial_for(0.5) == 0
    for delta in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(UsageError, match="delta"):
            bundle.dial_for(delta)


def test_dial_for_uses_the_bundles_target() -> None:
    bundle = make_bundle(target="high-probability", confidence=0.9)
    loss = bundle.tensors["risk/loss"].double().numpy()
    assert bundle.dial_for(0.1) == risk.choose_dial(loss, 0.1, "high-probability", 0.9).index


def test_a_delta_that_too_few_prompts_cannot_promise(path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="at least 99 are needed") as caught:
        Bundle.load(path).dial_for(0.01)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# --- the user's folder ---


def test_user_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert bundle_store.user_bundle_dir() == tmp_path / "prhs" / "bundles"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_DATA_HOME", value)
        assert bundle_store.user_bundle_dir() == tmp_path / "home" / ".local" / "share" / "prhs" / "bundles"


def test_default_path_is_a_safe_name(user_dir: pathlib.Path) -> None:
    path = bundle_store.default_path("meta-llama/Llama 2/..", "sha256:0123456789", 0.02)
    assert path == user_dir / "meta-llama-llama-2-01234567-delta0.02.safetensors"
    assert user_dir.is_dir()


def test_list_newest_remove(user_dir: pathlib.Path) -> None:
    assert bundle_store.list_bundles() == []
    fingerprint = make_metadata().fingerprint
    assert bundle_store.newest_matching(fingerprint) is None
    user_dir.mkdir(parents=True)
    other = make_bundle(fingerprint=fingerprint | {"num_qo_heads": 8})
    for age, (name, bundle) in enumerate([("new", other), ("mid", make_bundle()), ("old", make_bundle())]):
        bundle.save(user_dir / f"{name}.safetensors")
        os.utime(user_dir / f"{name}.safetensors", (1000 - age, 1000 - age))
    (user_dir / "broken.safetensors").write_text("x")
    os.utime(user_dir / "broken.safetensors", (1, 1))
    (user_dir / ".prhs-left-over.tmp").write_text("x")

    stored = bundle_store.list_bundles()
    assert [entry.name for entry in stored] == ["new", "mid", "old", "broken"]
    assert stored[0].metadata == other.metadata and stored[0].problem is None
    assert stored[3].metadata is None and "not a safetensors file" in (stored[3].problem or "")

    assert bundle_store.newest_matching(fingerprint) == user_dir / "mid.safetensors"
    assert (
        bundle_store.newest_matching(fingerprint, make_metadata().weights_hash)
        == user_dir / "mid.safetensors"
    )
    assert bundle_store.newest_matching(fingerprint, "sha256:00") is None
    assert bundle_store.choose(None, fingerprint).path == user_dir / "mid.safetensors"
    assert bundle_store.choose(user_dir / "old.safetensors", fingerprint).path == user_dir / "old.safetensors"
    with pytest.raises(InputError, match="num_qo_heads"):
        bundle_store.choose(user_dir / "new.safetensors", fingerprint)

    assert bundle_store.remove("mid.safetensors") == user_dir / "mid.safetensors"
    assert bundle_store.newest_matching(fingerprint) == user_dir / "old.safetensors"
    with pytest.raises(InputError, match="did you mean old"):
        bundle_store.remove("olt")
    outside = user_dir.parent / "outside.safetensors"
    outside.write_text("x")
    with pytest.raises(InputError, match="no bundle"):
        bundle_store.remove("../outside")
    assert outside.exists()


def test_without_any_bundle_the_embedded_one_is_taken(
    user_dir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = tmp_path / "reference.safetensors"
    make_bundle().save(embedded)
    monkeypatch.setattr(bundle_store, "reference_bundle_path", lambda name="reference": embedded)
    assert bundle_store.choose(None, make_metadata().fingerprint).path == embedded
    with pytest.raises(InputError, match="prhs calibrate"):
        bundle_store.choose(None, fingerprint_of(tiny_config("qwen3")))


def test_missing_embedded_bundle(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_store, "__file__", str(tmp_path / "bundle_store.py"))
    with pytest.raises(InputError, match="install prhs again"):
        bundle_store.reference_bundle_path()


def test_bundles_from_before_key_copies_scan_exactly(path: pathlib.Path) -> None:
    write_raw(path, make_tensors(), json.loads(make_metadata().to_json()) | {"key_copy": "bf16"})
    old = Bundle.load(path)
    assert old.metadata.key_copy == "exact" and old.params(0).key_copy == KeyCopyKind.EXACT


def test_the_key_copy_reaches_the_selectors(path: pathlib.Path) -> None:
    for kind in KeyCopyKind:
        Bundle(make_metadata(key_copy=kind.value), make_tensors()).save(path)
        assert Bundle.load(path).params(0).key_copy == kind
