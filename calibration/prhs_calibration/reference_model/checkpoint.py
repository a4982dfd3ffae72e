"""Resumable training state as safetensors (weights, optimizer moments) with its counters as JSON metadata.

Also what a fine-tune changed: `python -m prhs_calibration.reference_model.checkpoint START CHANGED OUT` puts
the changed tensors into a copy of a checkpoint and leaves every other byte as it is.
"""

import argparse
import json
import os
import shutil
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


def save_changes(path: Path, model: nn.Module) -> None:
    """Write the tensors of `model` that are trained, as bf16, atomically."""
    tensors = {
        name: parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial)
    os.replace(partial, path)


def apply_changes(start: Path, changed: Path, out: Path) -> list[str]:
    """Copy checkpoint folder `start` to `out` with the tensors of `changed`; returns the pieces that differ.

    Pieces keep their layout, so that tensors that did not change keep their bytes. InputError if a tensor of
    `changed` has no place of its size in `start`.
    """
    out.mkdir(parents=True, exist_ok=True)
    for source in start.glob("*.json"):
        shutil.copyfile(source, out / source.name)
    with safe_open(changed, framework="pt") as file:
        left = {name: file.get_tensor(name) for name in file.keys()}
    differing = []
    for piece in sorted(start.glob("*.safetensors")):
        before = piece.read_bytes()
        content = bytearray(before)
        size = int.from_bytes(content[:8], "little")
        header: dict[str, Any] = json.loads(content[8 : 8 + size])
        for name in sorted(left.keys() & header.keys()):
            new, facts = left.pop(name), header[name]
            if facts["dtype"] != "BF16" or facts["shape"] != list(new.shape) or new.dtype != torch.bfloat16:
                raise InputError(f"{name} of {changed} is not the bf16 tensor {facts['shape']} of {piece}")
            begin, end = (8 + size + offset for offset in facts["data_offsets"])
            content[begin:end] = new.contiguous().view(torch.uint8).numpy().tobytes()
        if bytes(content) != before:
            differing.append(piece.name)
        partial = out / f"{piece.name}.partial"
        partial.write_bytes(content)
        os.replace(partial, out / piece.name)
    if left:
        raise InputError(f"{start} has no tensor {sorted(left)[0]}, which {changed} holds")
    return differing


def publish(source: Path, target: Path) -> None:
    """Copy weights and curves to `target`: complete files first, then quick renames one after another."""
    staging = source / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in sorted(source.iterdir()) if path.name.startswith("model")]
    for name in [*names, "config.json", "curves.json"]:
        shutil.copyfile(source / name, staging / name)
    for path in sorted(staging.iterdir()):
        try:
            os.replace(path, target / path.name)
        except OSError:  # another file system
            shutil.copyfile(path, target / path.name)


def main(argv: list[str] | None = None) -> None:
    """Command line of `apply_changes`."""
    parser = argparse.ArgumentParser(prog="python -m prhs_calibration.reference_model.checkpoint")
    for name in ("start", "changed", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(argv)
    differing = apply_changes(options.start, options.changed, options.out)
    print(f"{options.out}: changed {', '.join(differing) or 'nothing'}")


if __name__ == "__main__":
    main()
