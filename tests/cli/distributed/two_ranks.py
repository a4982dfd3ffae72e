"""What one rank of torchrun does in test_distributed.py; without torchrun, what a single process does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from prhs_calibration import models
from prhs_cli.app import run
from prhs_kernels.params import DepthParams, FreezeMode, LayerParams
from prhs_kernels.runtime.batches import Request, generate_batch
from prhs_kernels.runtime.decode import Generation
from prhs_kernels.runtime.distributed import launched
from prhs_kernels.selectors import cis
from prhs_kernels.testing.inputs import random_tokens, selector_params

REQUESTS = [Request(random_tokens(length, seed=length), 8) for length in (45, 9, 30)]
TIME = {"budget_tokens": [3, 5], "tau_cos": [0.1, 0.3], "gate": [1, 2], "dilation": [0, 2]}
AXES: dict[str, dict[str, Any]] = {
    "time": {"time": TIME},
    "all": {
        "time": TIME,
        "depth": DepthParams(0, 0.3),
        "layer": LayerParams(0, 0.4, 1.0, FreezeMode.PROJECT),
    },
}


def record(folder: Path) -> dict[str, Any]:
    """Tokens, figures and index sets (this rank's heads) of every checkpoint below `folder`, every axis."""
    found: dict[str, Any] = {}
    original = cis.select

    def select(*args: Any) -> Any:
        chosen = original(*args)
        found[name]["sets"].append(chosen[0].kept)
        return chosen

    cis.select = select
    try:
        for path in sorted(folder.glob("tiny-*")):
            loaded = models.load(str(path), dtype="float32", ranks=launched().size)
            for axes, settings in AXES.items():
                name, generation = f"{path.name} {axes}", Generation()
                found[name] = {"sets": []}
                params = selector_params(loaded.model.config, **settings)
                steps = generate_batch(loaded.model, REQUESTS, params, run=generation)
                found[name] |= {"tokens": list(steps), "figures": generation.to_dict()}
    finally:
        cis.select = original
    return found


if __name__ == "__main__":
    here = launched()
    output = Path(sys.argv[1])
    torch.save(record(output), output / f"rank-{here.rank}.pt")
    raise SystemExit(run(sys.argv[2:]))
