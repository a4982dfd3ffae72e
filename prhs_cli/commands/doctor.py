"""`prhs doctor`: what is installed, what would run where, what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

from prhs_cli import options
from prhs_cli.output import Output, pairs, table

EPILOG = """\b
Examples:
  prhs doctor
  prhs doctor --json > report.json       to attach to a bug report"""

LIBRARIES = (
    "prhs",
    "torch",
    "transformers",
    "triton",
    "accelerate",
    "lm_eval",
    "numpy",
    "scipy",
    "matplotlib",
    "safetensors",
    "typer",
)


def command(as_json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Show versions, devices, what runs where, what is missing."""
    data = examine()
    versions = {"python": data["python"]} | {
        name: found or "not installed" for name, found in data["libraries"].items()
    }
    parts = [
        pairs(versions, title="versions"),
        table(["device", "name", "memory [GiB]", "free [GiB]"], data["devices"], title="devices"),
        pairs(data["runs"], title="what would run"),
        pairs(data["places"], title="places"),
        "nothing is missing"
        if not data["missing"]
        else "\n".join(f"missing: {line}" for line in data["missing"]),
    ]
    Output(as_json=as_json, quiet=quiet).result(data, *parts)


def examine() -> dict[str, Any]:
    """Everything that the command prints, as plain values."""
    import torch

    from prhs_calibration import bundle_store, results
    from prhs_calibration.reference_model import reference_path
    from prhs_kernels.ops.backend import explain_backend

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    embedded = reference_path()
    return {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "libraries": {name: _version(name) for name in LIBRARIES},
        "devices": _devices(),
        "runs": {
            "default device": "cuda" if cuda else "cpu",
            "generate --backend auto": explain_backend(device),
            "default dtype": "bfloat16" if cuda else "float32",
            "threads": torch.get_num_threads(),
        },
        "places": {
            "bundles": str(bundle_store.user_bundle_dir()),
            "results": str(results.results_dir()),
            "embedded model": str(embedded),
            "hub": "offline"
            if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
            else "downloads allowed",
        },
        "missing": _missing(cuda, (embedded / "config.json").is_file()),
    }


def _devices() -> list[list[Any]]:
    import torch

    gib = 2**30
    pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")}
    page = os.sysconf("SC_PAGE_SIZE")
    rows: list[list[Any]] = [
        [
            "cpu",
            f"{os.cpu_count()} CPUs",
            pages["SC_PHYS_PAGES"] * page / gib,
            pages["SC_AVPHYS_PAGES"] * page / gib,
        ]
    ]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        rows.append([f"cuda:{index}", torch.cuda.get_device_name(index), total / gib, free / gib])
    return rows


def _missing(cuda: bool, embedded: bool) -> list[str]:
    import torch

    lines = []
    if not embedded:
        lines.append("the embedded model; install prhs again")
    if _version("prhs") is None:
        lines.append("the installation (this is a bare checkout); run pip install -c constraints.txt -e .")
    if not cuda:
        lines.append("a CUDA device; everything runs on the CPU, large models slowly")
    elif importlib.util.find_spec("triton") is None:
        lines.append("triton; install the CUDA build of torch, which brings it")
    if torch.cuda.device_count() > 1 and _version("accelerate") is None:
        lines.append("accelerate, to split a model over the GPUs; pip install 'prhs[distributed]'")
    return lines


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
