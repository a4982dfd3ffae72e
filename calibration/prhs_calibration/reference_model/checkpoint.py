"""Resumable training state as safetensors (weights, optimizer moments) with its counters as JSON metadata."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prhs_kernels.errors import InputError


def save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, counters: dict[str, Any]
) -> None:
    """Write everything the next step depends on, atomically."""
    tensors = {f"model.{name}": p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"counters": json.dumps(counters, sort_keys=True)})
    os.replace(partial, path)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Restore weights and (if given) optimizer in place; returns the counters. InputError if it cannot."""
    try:
        with safe_open(path, framework="pt") as file:
            counters: dict[str, Any] = json.loads((file.metadata() or {})["counters"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is not a training state of the reference model ({error}); omit --resume"
        ) from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = tensors.get(f"model.{name}")
            if stored is None or stored.shape != parameter.shape:
                raise InputError(f"{path} holds another shape of {name}; pass the sizes it was trained with")
            parameter.copy_(stored)
    if optimizer is None:
        return counters
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            moments.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return counters
