"""What makes a model the one a bundle was calibrated on: attention shape, weights, tokenizer."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from prhs_calibration import files
from prhs_kernels.errors import InputError, UnsupportedModelError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
SIZES = ("num_layers", "num_qo_heads", "num_kv_heads", "head_dim")
FIELDS = ("model_type", *SIZES, "hidden_size", "vocab_size", "rope", "sliding_window", "sliding_layers")

# Rotary embeddings whose frequencies depend on the length of the sequence would rotate cached keys wrongly.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_REASONS = {
    "mixtral": "mixture of experts",
    "qwen2_moe": "mixture of experts",
    "qwen3_moe": "mixture of experts",
    "qwen3_next": "linear attention layers",
    "gpt_oss": "learned attention sinks",
    "gemma2": "logit softcapping",
    "phi": "partial rotary embedding",
    "phi3": "fused projections and partial rotary embedding",
    "stablelm": "partial rotary embedding",
    "glm": "partial rotary embedding",
    "glm4": "partial rotary embedding",
    "gpt_neox": "partial rotary embedding",
    "deepseek_v2": "latent attention",
    "deepseek_v3": "latent attention",
}
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_FULL_HASH_LIMIT = 64 * 2**20  # bytes of tensor data up to which all of them are hashed
_SAMPLE, _NUM_SAMPLES = 64 * 2**10, 128  # bytes per sample, samples per larger file


def check_type(model_type: object, name: str) -> None:
    """UnsupportedModelError naming architecture and reason unless `model_type` is supported."""
    if model_type in SUPPORTED:
        return
    reason = _REASONS.get(str(model_type), "its attention has not been checked against ours")
    raise UnsupportedModelError(
        f"{name}: architecture {model_type!r} is not supported ({reason}); use one of {', '.join(SUPPORTED)}"
    )


def check_supported(config: Any, name: str) -> None:
    """UnsupportedModelError when the transformers config asks for attention that ours does not compute."""
    check_type(config.model_type, name)
    rope = _rope(config)
    refused = None
    if any(getattr(config, key, None) is not None for key in _SOFTCAPS):
        refused = "logit softcapping"
    elif any((getattr(config, key, None) or 0) > 1 for key in _EXPERTS):
        refused = "a mixture of experts"
    elif getattr(config, "attention_sinks", None) or getattr(config, "use_attention_sinks", None):
        refused = "learned attention sinks"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        refused = f"partial rotary embedding (factor {rope['partial_rotary_factor']:g})"
    elif rope.get("rope_type") not in _ROPE_TYPES:
        refused = f"rotary scaling {rope.get('rope_type')!r}, which changes with the length of the text"
    elif getattr(config, "quantization_config", None) is not None:
        refused = "quantised weights"
    elif config.num_attention_heads % config.num_key_value_heads:
        refused = f"{config.num_attention_heads} query heads on {config.num_key_value_heads} KV heads"
    elif not getattr(config, "is_causal", True):
        refused = "attention that is not causal"
    if refused:
        raise UnsupportedModelError(
            f"{name}: {refused} is not supported; use a plain {config.model_type} checkpoint"
        )


def fingerprint_of(config: Any) -> dict[str, Any]:
    """The fields of a transformers config that selector parameters depend on, as plain JSON values.

    Equal for equal models whatever the transformers version that wrote the config: defaults that may or
    may not be spelled out are dropped. Keys in the order of `FIELDS`.
    """
    layers = _sliding_layers(config)
    return {
        "model_type": config.model_type,
        "num_layers": config.num_hidden_layers,
        "num_qo_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "rope": _rope(config),
        "sliding_window": config.sliding_window if layers else None,
        "sliding_layers": layers,
    }


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Name and both values of the first field in which two fingerprints differ; None when they are equal."""
    names = [*FIELDS, *sorted((ours.keys() | theirs.keys()) - set(FIELDS))]
    for name in names:
        left, right = ours.get(name, "absent"), theirs.get(name, "absent")
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            for key in sorted(left.keys() | right.keys()):
                if left.get(key, "absent") != right.get(key, "absent"):
                    return f"{name}.{key}", left.get(key, "absent"), right.get(key, "absent")
        elif left != right:
            return name, left, right
    return None


def hash_weights(paths: list[pathlib.Path]) -> str:
    """Hash of a model's safetensors files, wherever they lie: `sha256:...` or `sampled-sha256:...`.

    Headers (names, shapes, dtypes, offsets) and sizes are hashed whole. So are the tensor data of files up
    to 64 MiB; of larger ones 128 evenly spaced blocks of 64 KiB, which notices other weights (a fine-tune
    changes nearly every block) in milliseconds, but not one edited value: the prefix tells the two apart.
    """
    digest, sampled = hashlib.sha256(), False
    for path in sorted(paths, key=lambda path: path.name):
        header = files.read_header(path)
        data_size = header.file_size - header.data_start
        sampled = sampled or data_size > _FULL_HASH_LIMIT
        digest.update(header.file_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(header.data_start))
            if data_size <= _FULL_HASH_LIMIT:
                digest.update(file.read())
                continue
            for index in range(_NUM_SAMPLES):
                file.seek(header.data_start + (data_size - _SAMPLE) * index // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return ("sampled-sha256:" if sampled else "sha256:") + digest.hexdigest()


def hash_files(paths: list[pathlib.Path]) -> str:
    """`sha256:...` of the names and whole contents of files, for tokenizers."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {files.reason(error)}; check the path") from error
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return "sha256:" + digest.hexdigest()


def _rope(config: Any) -> dict[str, Any]:
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if "partial_rotary_factor" not in parameters and hasattr(config, "partial_rotary_factor"):
        parameters["partial_rotary_factor"] = config.partial_rotary_factor
    if parameters.get("partial_rotary_factor") == 1.0:
        del parameters["partial_rotary_factor"]
    parameters.setdefault("rope_type", "default")
    return {key: _plain(parameters[key]) for key in sorted(parameters) if parameters[key] is not None}


def _plain(value: Any) -> Any:
    # 500000 and 500000.0 are the same model but not the same bytes
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _sliding_layers(config: Any) -> list[int]:
    # Llama's modelling code has no window, whatever an edited config says; Mistral's is that of every layer
    if config.model_type == "llama" or getattr(config, "sliding_window", None) is None:
        return []
    if config.model_type == "mistral":
        return list(range(config.num_hidden_layers))
    return [layer for layer, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
