"""The model and the bundle that a command works with; the choice is printed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prhs_cli.output import Output
from prhs_kernels.errors import UsageError
from prhs_kernels.runtime.distributed import join, launched

if TYPE_CHECKING:
    from prhs_calibration.bundle import Bundle
    from prhs_calibration.models import LoadedModel

Spread = Literal["heads", "prompts"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Which model and bundle the user asked for, as typed; under torchrun see `load_model`."""

    model: str = "reference"
    bundle: Path | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    spread: Spread | None = None

    def open(self, out: Output) -> tuple[LoadedModel, Bundle]:
        """Load both; the bundle is checked against the model."""
        loaded = load_model(
            out, self.model, revision=self.revision, device=self.device, dtype=self.dtype, spread=self.spread
        )
        return loaded, choose_bundle(out, loaded, self.bundle)


def conditions(loaded: LoadedModel, bundle: Bundle | None, seed: int) -> dict[str, Any]:
    """What a result file says about how it was made."""
    from prhs_calibration import results

    return results.conditions(
        model=loaded.model_id,
        revision=loaded.revision,
        bundle=None if bundle is None else bundle.path,
        device=str(loaded.model.device),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        seeds={"corpus": seed},
    )


def load_model(
    out: Output, name: str, *, revision: str | None, device: str, dtype: str, spread: Spread | None = None
) -> LoadedModel:
    """Load a model by alias, hub id, folder or `reference`; errors are one line each (see `models.load`).

    Under torchrun a command spreads the heads of one model over the ranks, or its prompts over one model
    each; UsageError for a command that does neither.
    """
    from prhs_calibration import devices, models

    ranks = launched().size
    if ranks > 1 and spread is None:
        raise UsageError(
            "this command does not run under torchrun; start it by itself, or see docs/distributed.md"
        )
    if ranks > 1 and spread == "prompts":
        place: Any = devices.rank_device(device)
        loaded = models.load(name, revision=revision, device=place, dtype=dtype)
        join()
    else:
        loaded = models.load(name, revision=revision, device=device, dtype=dtype, ranks=ranks)
    where = str(loaded.device) if ranks == 1 else f"{ranks} ranks ({loaded.device.type})"
    out.note(f"model {loaded.model_id} on {where}, {str(loaded.dtype).removeprefix('torch.')}")
    return loaded


def choose_bundle(out: Output, loaded: LoadedModel, path: Path | None) -> Bundle:
    """The given bundle, else this user's newest for the model, else the embedded one; checked to fit."""
    from prhs_calibration import bundle_store

    bundle = bundle_store.choose(path, loaded.fingerprint, loaded.weights_hash)
    out.note(f"bundle {bundle.path}, calibrated for δ = {bundle.metadata.delta:g}")
    return bundle
