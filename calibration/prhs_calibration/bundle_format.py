"""What a bundle file may contain: metadata fields, tensors, their shapes, dtypes and ranges.

G dial points, L layers, H KV heads, n prompts of the selection split. The tensors:

| name | shape | dtype | values |
|---|---|---|---|
| `time/lambda` | `[G]` | float32 | strictly increasing in [0, 1], the last is 1 (dense) |
| `time/budget_ratio` | `[G, L, H]` | float32 | >= 0, nondecreasing along G, the last row all 1 |
| `time/budget_tokens` | `[G, L, H]` | int32 | >= 0, nondecreasing along G (the dense row apart) |
| `time/gate` | `[L, H]` | uint8 | a `Gate` |
| `time/tau_cos` | `[L, H]` | float32 | [-1, 1] |
| `time/block` | `[L, H]` | int32 | >= 1 |
| `time/dilation` | `[L, H]` | int32 | >= 0 |
| `depth/schedule` | `[3]` | float32 | start layer, φ in (0, 1), α >= 0; absent when the axis is off |
| `layer/schedule` | `[3]` | float32 | start layer, ψ in (0, 1), γ >= 0; absent when the axis is off |
| `risk/loss` | `[n, G]` | float32 | [0, 1]: closed-loop loss of a prompt at a dial point |
| `profile/...` | any | any | statistics kept for plots and reports; `profile/tail` `[G]`: closed-loop tail |
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

import torch

from prhs_calibration.fingerprint import SIZES
from prhs_kernels.errors import InputError
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.params import Gate

SCHEMA_VERSION = 1
METADATA_KEY = "prhs"
TARGETS = ("expected", "high-probability")
FREEZE_MODES = ("share", "project")
OLD_EXACT = "bf16"  # what bundles called the exact scan before there were key copies
SPLITS = ("fit", "select", "verify")

_DTYPES = {
    "time/lambda": torch.float32,
    "time/budget_ratio": torch.float32,
    "time/budget_tokens": torch.int32,
    "time/gate": torch.uint8,
    "time/tau_cos": torch.float32,
    "time/block": torch.int32,
    "time/dilation": torch.int32,
    "risk/loss": torch.float32,
    "depth/schedule": torch.float32,
    "layer/schedule": torch.float32,
}
_OPTIONAL = {"depth/schedule", "layer/schedule"}


@dataclasses.dataclass(frozen=True)
class BundleMetadata:
    """Where a bundle comes from and what it promises. Plain JSON values, no timestamps, no paths."""

    model_id: str
    revision: str  # commit of the hub repository, "local" or "embedded"
    fingerprint: dict[str, Any]  # as fingerprint.fingerprint_of
    weights_hash: str
    tokenizer_hash: str
    corpus_hash: str
    seeds: dict[str, int]
    split_sizes: dict[str, int]  # prompts in "fit", "select" and "verify"
    context_length: int  # tokens, the longest calibration prompt
    delta: float  # the asked bound on the mean dropped mass
    dial_index: int  # operating point chosen for delta
    target: str = "expected"  # one of TARGETS
    confidence: float = 0.95  # of the high-probability target
    num_sinks: int = 4  # positions
    num_local: int = 32  # positions
    reanchor: bool = True
    freeze_mode: str = "share"  # one of FREEZE_MODES
    key_copy: str = "exact"  # a `KeyCopyKind`
    library_versions: dict[str, str] = dataclasses.field(default_factory=dict)
    report: dict[str, Any] = dataclasses.field(default_factory=dict)  # more facts of the run, for inspection
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, no NaN; equal metadata gives equal text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str) -> BundleMetadata:
        """Parse what `to_json` wrote; InputError naming the file `where` for anything else."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise damaged(where, "its metadata is not JSON") from error
        if not isinstance(values, dict) or not _is_int(values.get("schema_version")):
            raise damaged(where, "its metadata has no schema_version")
        if values["schema_version"] > SCHEMA_VERSION:
            raise InputError(
                f"{where} was written by a newer prhs (schema {values['schema_version']}, this one reads "
                f"up to {SCHEMA_VERSION}): upgrade prhs or calibrate again"
            )
        fields = _typed_fields(values, where)
        if fields["key_copy"] == OLD_EXACT:
            fields["key_copy"] = KeyCopyKind.EXACT.value
        return cls(**fields)


def check(metadata: BundleMetadata, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise InputError naming the file `where` and the first value that no calibration could have written."""
    _check_metadata(metadata, where)
    _check_names_and_types(tensors, where)
    _check_shapes(metadata, tensors, where)
    _check_ranges(metadata, tensors, where)


def damaged(where: str, what: str) -> InputError:
    """The error for a bundle whose content cannot be right."""
    return InputError(f"bundle {where} is damaged: {what}; make it again with `prhs calibrate`")


def _typed_fields(values: dict[str, Any], where: str) -> dict[str, Any]:
    hints = typing.get_type_hints(BundleMetadata)
    unknown, missing = sorted(values.keys() - hints.keys()), sorted(hints.keys() - values.keys())
    if unknown or missing:
        kind, names = ("unknown", unknown) if unknown else ("missing", missing)
        raise damaged(where, f"metadata field {names[0]!r} is {kind}")
    for name, hint in hints.items():
        if hint is float and _is_int(values[name]):
            values[name] = float(values[name])
        if not _has_type(values[name], hint):
            raise damaged(where, f"metadata field {name!r} has the wrong type")
    return values


def _has_type(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is dict:
        value_type = typing.get_args(hint)[1]
        return isinstance(value, dict) and all(_has_type(item, value_type) for item in value.values())
    if hint is Any:
        return True
    return _is_int(value) if hint is int else isinstance(value, hint)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_int(value) and bool(value >= 1)


def _check_metadata(metadata: BundleMetadata, where: str) -> None:
    checks = {
        "fingerprint": all(_is_positive(metadata.fingerprint.get(name)) for name in SIZES),
        "split_sizes": sorted(metadata.split_sizes) == sorted(SPLITS)
        and all(size >= 0 for size in metadata.split_sizes.values())
        and metadata.split_sizes["select"] >= 1,
        "context_length": metadata.context_length >= 1,
        "delta": 0 < metadata.delta < 1,
        "confidence": 0 < metadata.confidence < 1,
        "target": metadata.target in TARGETS,
        "freeze_mode": metadata.freeze_mode in FREEZE_MODES,
        "key_copy": metadata.key_copy in tuple(KeyCopyKind),
        "num_sinks": metadata.num_sinks >= 0,
        "num_local": metadata.num_local >= 1,
        "schema_version": metadata.schema_version == SCHEMA_VERSION,
    }
    for name, valid in checks.items():
        if not valid:
            raise damaged(where, f"metadata field {name!r} is out of range: {getattr(metadata, name)!r}")


def _check_names_and_types(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    missing = sorted(_DTYPES.keys() - _OPTIONAL - tensors.keys())
    extra = sorted(name for name in tensors if name not in _DTYPES and not name.startswith("profile/"))
    if missing:
        raise damaged(where, f"tensor {missing[0]!r} is missing")
    if extra:
        raise damaged(where, f"tensor {extra[0]!r} does not belong in a bundle")
    for name, dtype in _DTYPES.items():
        if name in tensors and tensors[name].dtype != dtype:
            raise damaged(where, f"tensor {name!r} is {tensors[name].dtype}, not {dtype}")


def _check_shapes(metadata: BundleMetadata, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    points = tensors["time/lambda"].numel()
    heads = (int(metadata.fingerprint["num_layers"]), int(metadata.fingerprint["num_kv_heads"]))
    shapes: dict[str, tuple[int, ...]] = {name: heads for name in _DTYPES if name.startswith("time/")}
    shapes |= {
        "time/lambda": (points,),
        "time/budget_ratio": (points, *heads),
        "time/budget_tokens": (points, *heads),
        "risk/loss": (metadata.split_sizes["select"], points),
        "depth/schedule": (3,),
        "layer/schedule": (3,),
    }
    for name, shape in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise damaged(where, f"tensor {name!r} has shape {tuple(tensors[name].shape)}, not {shape}")
    # also refuses a dial without points
    if not 0 <= metadata.dial_index < points:
        raise damaged(where, f"metadata field 'dial_index' is {metadata.dial_index} of {points} dial points")


def _check_ranges(metadata: BundleMetadata, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    dial, loss = tensors["time/lambda"], tensors["risk/loss"]
    ratio, tokens = tensors["time/budget_ratio"], tensors["time/budget_tokens"]
    # every condition is written so that NaN makes it false
    checks = {
        "time/lambda": (dial >= 0).all() and dial[-1] == 1 and (dial[1:] > dial[:-1]).all(),
        "time/budget_ratio": (ratio >= 0).all()
        and (ratio[1:] >= ratio[:-1]).all()
        and (ratio[-1] == 1).all(),
        "time/budget_tokens": (tokens >= 0).all() and (tokens[1:-1] >= tokens[:-2]).all(),
        "time/gate": (tensors["time/gate"] <= max(Gate)).all(),
        "time/tau_cos": (tensors["time/tau_cos"].abs() <= 1).all(),
        "time/block": (tensors["time/block"] >= 1).all(),
        "time/dilation": (tensors["time/dilation"] >= 0).all(),
        "risk/loss": ((loss >= 0) & (loss <= 1)).all(),
    }
    for name in sorted(_OPTIONAL & tensors.keys()):
        start, base, power = tensors[name].tolist()
        num_layers = int(metadata.fingerprint["num_layers"])
        in_model = start in range(num_layers)
        checks[name] = torch.tensor(in_model and 0 < base < 1 and 0 <= power < float("inf"))
    for name, valid in checks.items():
        if not valid:
            raise damaged(where, f"tensor {name!r} holds values out of range or out of order")
