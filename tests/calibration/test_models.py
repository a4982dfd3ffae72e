"""Loading models: every supported architecture, and one line for everything that can be wrong."""

from __future__ import annotations

import json
import pathlib
import shutil
import types
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from prhs_calibration import devices, fingerprint, hub, memory, models
from prhs_kernels.errors import InputError, PrhsError, ResourceError, UnsupportedModelError, UsageError
from prhs_kernels.runtime.memory import RunShape, engine_bytes
from prhs_kernels.testing.inputs import selector_params
from prhs_kernels.testing.models import tiny_checkpoint, tiny_config, tiny_model, tiny_tokenizer

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {}),
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3", {"sliding_window": 8, "max_window_layers": 2}),
]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tiny_checkpoint(tmp_path / "tiny-llama", "llama")


def one_line(kind: type[PrhsError], function: Any, *words: str) -> str:
    with pytest.raises(kind) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert word in message, message
    return message


def edit_config(folder: pathlib.Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what loads ---


@pytest.mark.parametrize(("model_type", "overrides"), KINDS)
def test_supported_models_load_with_their_own_logits(
    tmp_path: pathlib.Path, model_type: str, overrides: dict[str, Any]
) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny", model_type, **overrides)
    loaded = models.load(str(folder), device="cpu")
    ids = loaded.tokenizer("A stitch in time saves nine", return_tensors="pt")["input_ids"]
    expected = tiny_model(model_type, **overrides)(ids).logits
    assert torch.equal(loaded.model(ids).logits, expected)
    assert not loaded.model.training
    assert (loaded.model_id, loaded.revision, loaded.context_length) == ("tiny", "local", 512)
    assert loaded.fingerprint == fingerprint.fingerprint_of(tiny_config(model_type, **overrides))
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.dtype == torch.float32 == next(loaded.model.parameters()).dtype


def test_fingerprint_fields() -> None:
    assert fingerprint.fingerprint_of(tiny_config("llama")) == {
        "model_type": "llama",
        "num_layers": 4,
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "hidden_size": 64,
        "vocab_size": 128,
        "rope": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": None,
        "sliding_layers": [],
    }
    windows = {
        ("mistral", 8, None): (8, [0, 1, 2, 3]),
        ("qwen2", 8, 3): (8, [3]),
        ("qwen3", 8, 4): (None, []),  # a window that no layer uses
    }
    for (model_type, window, first), expected in windows.items():
        overrides = {"sliding_window": window} | ({} if first is None else {"max_window_layers": first})
        found = fingerprint.fingerprint_of(tiny_config(model_type, **overrides))
        assert (found["sliding_window"], found["sliding_layers"]) == expected
    # what a config says and the modelling code ignores makes no difference
    config = tiny_config("llama")
    config.sliding_window = 8
    assert fingerprint.fingerprint_of(config) == fingerprint.fingerprint_of(tiny_config("llama"))


def test_fingerprint_is_json_and_survives_saving(tmp_path: pathlib.Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    config = tiny_config("llama", rope_parameters=rope)
    before = fingerprint.fingerprint_of(config)
    assert before["rope"]["factor"] == 8.0
    assert json.loads(json.dumps(before)) == before
    config.save_pretrained(tmp_path)
    assert fingerprint.fingerprint_of(transformers.AutoConfig.from_pretrained(tmp_path)) == before


def test_first_difference() -> None:
    left = fingerprint.fingerprint_of(tiny_config("llama"))
    assert fingerprint.first_difference(left, dict(left)) is None
    assert fingerprint.first_difference(left, left | {"vocab_size": 1, "head_dim": 2}) == ("head_dim", 16, 2)
    assert fingerprint.first_difference(left, left | {"new": 1}) == ("new", "absent", 1)
    assert fingerprint.first_difference(left, {k: v for k, v in left.items() if k != "rope"}) == (
        "rope",
        left["rope"],
        "absent",
    )


def test_dtype_and_device_options() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert devices.resolve_dtype(None, cpu) == torch.float32
    assert devices.resolve_dtype(None, cuda) == torch.bfloat16
    assert devices.resolve_dtype("bf16", cpu) == devices.resolve_dtype(torch.bfloat16, cpu) == torch.bfloat16
    one_line(UsageError, lambda: devices.resolve_dtype("int3", cpu), "int3", "float32")
    one_line(UsageError, lambda: devices.resolve_dtype(torch.int8, cpu))
    one_line(UsageError, lambda: devices.resolve_device("toaster"), "toaster")
    one_line(UsageError, lambda: devices.resolve_device("mps"), "mps")
    assert devices.resolve_device("cpu") == cpu


def test_bf16_on_request(folder: pathlib.Path) -> None:
    loaded = models.load(str(folder), device="cpu", dtype="bf16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_cuda_asked_but_absent(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one_line(ResourceError, lambda: models.load(str(folder), device="cuda"), "cuda", "--device cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    one_line(ResourceError, lambda: devices.resolve_device("cuda:2"), "cuda:2", "cuda:0 to cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    one_line(ResourceError, lambda: devices.resolve_device("cuda:2"), "cuda:2", "there is only cuda:0")


def test_loading_keeps_the_settings_of_transformers(folder: pathlib.Path) -> None:
    logging = transformers.utils.logging
    logging.set_verbosity_warning()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    models.load(str(folder), device="cpu")
    with pytest.raises(InputError):
        edit_config(folder, num_hidden_layers=0)
        models.load(str(folder), device="cpu")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_missing_padding_token_is_replaced(folder: pathlib.Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    loaded = models.load(str(folder), device="cpu")
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id == 2


# --- hashes ---


def test_hashes_follow_content_not_place(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first = models.load(str(folder), device="cpu")
    copy = models.load(str(shutil.copytree(folder, tmp_path / "copy")), device="cpu")
    assert (first.weights_hash, first.tokenizer_hash) == (copy.weights_hash, copy.tokenizer_hash)
    assert first.weights_hash.startswith("sha256:")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][-1] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    second = models.load(str(folder), device="cpu")
    assert second.weights_hash != first.weights_hash
    assert second.tokenizer_hash != first.tokenizer_hash


def test_large_files_are_sampled_and_say_so(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_FULL_HASH_LIMIT", 1000)
    monkeypatch.setattr(fingerprint, "_SAMPLE", 16)
    monkeypatch.setattr(fingerprint, "_NUM_SAMPLES", 8)
    path = tmp_path / "model.safetensors"
    weights = torch.arange(2000, dtype=torch.float32)
    save_file({"w": weights}, path)
    first = fingerprint.hash_weights([path])
    assert first.startswith("sampled-sha256:") and first == fingerprint.hash_weights([path])
    for changed in (
        weights + 1,
        weights.flip(0),
        weights.reshape(2, 1000),
        torch.cat((weights, weights[:1])),
    ):
        save_file({"w": changed.contiguous()}, path)
        assert fingerprint.hash_weights([path]) != first
    for position in (0, -1):  # both ends of the data are among the samples
        edge = weights.clone()
        edge[position] += 1
        save_file({"w": edge}, path)
        assert fingerprint.hash_weights([path]) != first


# --- folders that cannot be used ---


def test_not_a_model_folder(tmp_path: pathlib.Path) -> None:
    one_line(InputError, lambda: models.load(str(tmp_path / "absent")), "absent", "config.json")
    one_line(InputError, lambda: models.load(str(tmp_path)), "no config.json")
    one_line(UsageError, lambda: models.load(str(tmp_path), revision="v1"), "v1", "hub")


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_broken_config(folder: pathlib.Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    one_line(InputError, lambda: models.load(str(folder)), "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": "four"},
        {"hidden_size": 65},
        {"num_key_value_heads": 0},
        {"max_position_embeddings": 0},
        {"num_key_value_heads": 3},
    ],
)
def test_impossible_config(folder: pathlib.Path, changes: dict[str, object]) -> None:
    edit_config(folder, **changes)
    one_line(InputError, lambda: models.load(str(folder)))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma2", "logit softcapping"),
        ("gpt_oss", "learned attention sinks"),
        ("mixtral", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("phi3", "partial rotary"),
        ("deepseek_v3", "latent attention"),
        ("gpt2", "not been checked"),
        ("made-up-by-its-repository", "not been checked"),
        (None, "None"),
    ],
)
def test_unsupported_architectures_by_name(folder: pathlib.Path, model_type: str | None, reason: str) -> None:
    edit_config(folder, model_type=model_type, auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("raise SystemExit('code of the repository was run')")
    one_line(UnsupportedModelError, lambda: models.load(str(folder)), repr(model_type), reason, "llama")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attn_logit_softcapping": 50.0}, "softcapping"),
        ({"final_logit_softcapping": 30.0}, "softcapping"),
        ({"num_experts": 8}, "mixture of experts"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"attention_sinks": True}, "attention sinks"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rotary scaling 'dynamic'",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    ],
)
def test_unsupported_settings_of_supported_architectures(
    folder: pathlib.Path, changes: dict[str, object], reason: str
) -> None:
    edit_config(folder, **changes)
    one_line(UnsupportedModelError, lambda: models.load(str(folder)), "tiny-llama", reason)


def test_corrupt_weights(folder: pathlib.Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:100], b"", b"not weights", whole + b"\0"):
        path.write_bytes(content)
        one_line(InputError, lambda: models.load(str(folder)), "model.safetensors")
    path.unlink()
    one_line(InputError, lambda: models.load(str(folder)), "model.safetensors", "missing")


def test_pickled_weights_are_not_opened(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    one_line(InputError, lambda: models.load(str(folder)), "pickled", "safetensors")


def test_missing_shard(folder: pathlib.Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )
    one_line(InputError, lambda: models.load(str(folder)), "model-00002-of-00002.safetensors")
    index.write_text("{}")
    one_line(InputError, lambda: models.load(str(folder)), "model.safetensors.index.json")


def test_weights_that_do_not_cover_the_model(folder: pathlib.Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.1.self_attn.k_proj.weight"
    save_file({name: t for name, t in tensors.items() if name != key}, path, metadata={"format": "pt"})
    one_line(InputError, lambda: models.load(str(folder)), "missing", key)
    save_file(tensors | {key: torch.zeros(8, 64)}, path, metadata={"format": "pt"})
    one_line(InputError, lambda: models.load(str(folder)))
    extra = {"model.layers.9.self_attn.k_proj.weight": torch.zeros(32, 64)}
    save_file(tensors | extra, path, metadata={"format": "pt"})
    one_line(InputError, lambda: models.load(str(folder)), "unknown", "layers.9")
    # this one is in old Llama checkpoints and means nothing
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save_file(tensors | old, path, metadata={"format": "pt"})
    models.load(str(folder), device="cpu")


def test_missing_and_broken_tokenizer(folder: pathlib.Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    one_line(InputError, lambda: models.load(str(folder)), "tokenizer")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    one_line(InputError, lambda: models.load(str(folder)), "no tokenizer")


# --- memory ---


def test_weight_bytes_are_exact() -> None:
    for model_type in ("llama", "qwen2"):
        for tied in (False, True):
            overrides: dict[str, Any] = {"tie_word_embeddings": tied}
            expected = sum(p.numel() for p in tiny_model(model_type, **overrides).parameters())
            config = tiny_config(model_type, **overrides)
            assert models.weight_bytes(config, torch.float32) == 4 * expected
            assert models.weight_bytes(config, torch.bfloat16) == 2 * expected


def test_too_little_memory_is_noticed_before_the_weights_are_read(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(folder, hidden_size=8192, intermediate_size=2**20, num_hidden_layers=40)
    (folder / "model.safetensors").write_bytes(b"")
    message = one_line(ResourceError, lambda: models.load(str(folder), device="cpu"), "tiny-llama", "GiB")
    assert "4224.3 GiB needed" in message  # 40 x 3 MLP matrices of 2^33 fp32 are 3,840 GiB before headroom
    monkeypatch.setattr(memory, "available", lambda device: 0)
    one_line(
        ResourceError, lambda: memory.check_memory(2**30, torch.device("cpu"), "x"), "1.0 GiB needed, 0.0 GiB"
    )


def test_what_fits_fits_the_decode_engine_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is chosen for a GPU is not refused by the engine's own check."""
    config, params = tiny_config("llama"), selector_params(tiny_config("llama"), time={"budget_tokens": 4})
    shape = RunShape.of(config, params, [None] * 4, torch.bfloat16)
    monkeypatch.setattr(memory, "available", lambda device: 2**29)
    plain = memory.Room(config, torch.bfloat16, torch.device("cpu"))
    room = memory.Room(config, torch.bfloat16, torch.device("cpu"), engine=shape)
    for tokens in (300, 40_000):
        fits = room.batch(tokens)
        assert 0 < fits < plain.batch(tokens)
        assert engine_bytes(shape, fits, tokens, tokens - 10).most <= 2**29
        assert engine_bytes(shape, fits + 1, tokens, tokens).most > 2**29
    longest = room.tokens()
    assert engine_bytes(shape, 1, longest, longest).most <= 2**29
    assert memory.Room.of(tiny_model("llama"), params).engine is None, "no engine on a CPU"


def test_available_memory_is_sane(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.available(torch.device("cpu"))
    assert 2**20 < free < 2**50
    group = tmp_path / "cgroup"
    group.mkdir()
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 300000\n")
    monkeypatch.setattr(memory, "_CGROUP", group)
    assert memory.available(torch.device("cpu")) == 400_000
    (group / "memory.max").write_text("max\n")
    assert memory.available(torch.device("cpu")) > 2**20
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "absent")
    assert memory.available(torch.device("cpu")) > 2**20


# --- names and the hub ---


class Hub:
    """Stands for the hub: what it answers, and what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: pathlib.Path) -> None:
        self.answer: Exception | str = ConnectionError("no route to host")
        self.timeouts: list[float | None] = []
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)

    def model_info(self, model_id: str, *, revision: str | None, timeout: float | None) -> Any:
        self.timeouts.append(timeout)
        if isinstance(self.answer, Exception):
            raise self.answer
        return types.SimpleNamespace(sha=self.answer)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Hub:
    return Hub(monkeypatch, tmp_path / "hub")


def put_in_cache(stub_cache: pathlib.Path, model_id: str) -> pathlib.Path:
    """A tiny model where the hub library would have downloaded it."""
    repository = stub_cache / f"models--{model_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return tiny_checkpoint(repository / "snapshots" / COMMIT, "llama")


def http_error(kind: type, status: int) -> Exception:
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    error: Exception = kind("Several lines\nof advice", response=response)
    return error


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("lama-2-7b", "llama-2-7b"),
        ("Mistral-7B", "mistral-7b"),
        ("qwen3_8b", "qwen3-8b"),
        ("refrence", "reference"),
    ],
)
def test_unknown_alias_suggests_close_ones(stub: Hub, name: str, suggested: str) -> None:
    one_line(InputError, lambda: models.load(name), repr(name), f"did you mean {suggested}")
    assert stub.timeouts == []


@pytest.mark.parametrize("name", ["", "zzzz", "a/b/c", "org/", "http://huggingface.co/a/b"])
def test_names_that_are_no_names(stub: Hub, name: str) -> None:
    one_line(InputError, lambda: models.load(name), repr(name), "prhs models")


def test_no_network_and_not_on_disk(stub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    one_line(InputError, lambda: models.load("llama-3-8b"), "Meta-Llama-3-8B", "cannot be reached")
    assert stub.timeouts == [5.0]
    stub.answer = http_error(errors.HfHubHTTPError, 503)
    one_line(InputError, lambda: models.load("llama-3-8b"), "cannot be reached")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    one_line(InputError, lambda: models.load("llama-3-8b", revision="v2"), "HF_HUB_OFFLINE", "revision v2")
    assert len(stub.timeouts) == 2  # offline: nobody is asked


@pytest.mark.parametrize("offline", [False, True])
def test_a_model_on_disk_needs_no_network(
    stub: Hub, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("the hub was asked again, with retries of its own")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", no_network)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    folder = put_in_cache(tmp_path / "hub", "Qwen/Qwen3-8B")
    loaded = models.load("qwen3-8b", device="cpu")
    assert (loaded.model_id, loaded.revision) == ("Qwen/Qwen3-8B", COMMIT)
    assert models.load("Qwen/Qwen3-8B", revision=COMMIT, device="cpu").weights_hash == loaded.weights_hash
    assert [
        known.alias for known in models.list_models() if known.on_disk and known.alias not in hub.EMBEDDED
    ] == ["qwen3-8b"]
    (folder / "model.safetensors").unlink()
    one_line(InputError, lambda: models.load("qwen3-8b", device="cpu"), "Qwen/Qwen3-8B")
    assert not any(known.on_disk for known in models.list_models() if known.alias not in hub.EMBEDDED)


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        (
            errors.GatedRepoError,
            403,
            ("gated", "https://huggingface.co/meta-llama/Llama-2-7b-hf", "hf auth login"),
        ),
        (errors.HfHubHTTPError, 401, ("gated",)),
        (errors.HfHubHTTPError, 403, ("gated",)),
        (errors.RepositoryNotFoundError, 401, ("not on the hub, or private", "did you mean")),
        (errors.RepositoryNotFoundError, 404, ("not on the hub, or private",)),
        (errors.RevisionNotFoundError, 404, ("no revision 'v9'",)),
    ],
)
def test_answers_of_the_hub(stub: Hub, kind: type, status: int, words: tuple[str, ...]) -> None:
    stub.answer = http_error(kind, status)
    one_line(InputError, lambda: models.load("llama-2-7b", revision="v9"), "meta-llama/Llama-2-7b-hf", *words)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (http_error(errors.GatedRepoError, 403), InputError, "gated"),
        (OSError(28, "No space left on device"), ResourceError, "no space left"),
        (PermissionError(13, "Permission denied", "/cache"), InputError, "/cache: permission denied"),
        (errors.LocalEntryNotFoundError("gone\naway"), InputError, "cannot be reached"),
        (TimeoutError(), InputError, "cannot be reached"),
    ],
)
def test_failing_downloads(
    stub: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[PrhsError], words: str
) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    stub.answer = COMMIT
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    one_line(kind, lambda: models.load("llama-2-7b"), words)


def test_download_is_pinned_and_small_files_come_first(
    stub: Hub, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, list[str]]] = []

    def download(model_id: str, *, revision: str, allow_patterns: list[str], **kwargs: Any) -> str:
        assert kwargs["local_files_only"] is False
        calls.append((revision, allow_patterns))
        return str(folder)

    stub.answer = COMMIT
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert models.load("llama-2-7b", device="cpu").revision == COMMIT
    assert [revision for revision, _ in calls] == [COMMIT, COMMIT]
    assert "config.json" in calls[0][1] and "model*.safetensors" not in calls[0][1]
    assert calls[1][1] == ["model*.safetensors"]
    edit_config(folder, model_type="gemma2")
    one_line(UnsupportedModelError, lambda: models.load("llama-2-7b"))
    assert len(calls) == 3  # refused before its weights were fetched


def test_programming_errors_are_not_hidden(stub: Hub) -> None:
    stub.answer = AttributeError("a bug")
    with pytest.raises(AttributeError):
        models.load("llama-2-7b")


def test_alias_wins_over_a_folder_of_that_name(
    stub: Hub, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.rename(folder.parent / "qwen3-8b")
    monkeypatch.chdir(folder.parent)
    one_line(InputError, lambda: models.load("qwen3-8b"), "Qwen/Qwen3-8B")
    assert hub.locate("./qwen3-8b").revision == "local"


def test_embedded_model_missing_or_there(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "reference_folder", lambda name="reference": tmp_path / "absent")
    one_line(InputError, lambda: models.load("reference"), "embedded model is missing", "install")
    monkeypatch.setattr(hub, "reference_folder", lambda name="reference": folder)
    loaded = models.load("reference", device="cpu")
    assert (loaded.model_id, loaded.revision) == ("reference", "embedded")


# --- the tiny models themselves ---


@pytest.mark.parametrize(("model_type", "overrides"), KINDS)
def test_tiny_models_are_reproducible_and_attend_unevenly(model_type: str, overrides: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    first, second = tiny_model(model_type, **overrides), tiny_model(model_type, **overrides)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = tiny_model(model_type, seed=1, **overrides)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)  # type: ignore[union-attr,arg-type]
    first.set_attn_implementation("eager")
    ids = torch.arange(4, 44)[None]
    rows = torch.stack(first(ids, output_attentions=True).attentions)[:, 0, :, -1]
    window = overrides.get("sliding_window")
    assert (rows[-1] > 0).sum(-1).unique().tolist() == [window or 40]
    assert rows.max() > 2 / (window or 40)


def test_tiny_tokenizer_is_reversible_on_ascii() -> None:
    tokenizer = tiny_tokenizer()
    text = "Line 1\n\tcode(); 'quotes' ~ 42"
    ids = tokenizer(text)["input_ids"]
    assert ids == [ord(character) for character in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer("é")["input_ids"] == [3, 3]
    assert len(tokenizer) == tiny_config("llama").vocab_size == 128
