"""The bundle: what calibration measured and chose, in one file, and where this user's bundles are kept.

The dial λ in [0, 1] moves all layers and heads along one family of budgets; λ = 1 is dense attention.
The file is safetensors with one metadata key, byte-identical for identical inputs; see `bundle_format`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch

from prhs_calibration import bundle_format, files, fingerprint, risk
from prhs_calibration.bundle_format import METADATA_KEY, BundleMetadata
from prhs_kernels.errors import InputError, PrhsError, UsageError
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.params import DepthParams, FreezeMode, LayerParams, SelectorParams, TimeParams

__all__ = ["Bundle", "BundleMetadata", "read_metadata"]


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """Selector parameters along the dial, the risk measured at each dial point, and their origin.

    `tensors` are those of `bundle_format`, on the CPU; `path` is the file it was loaded from.
    """

    metadata: BundleMetadata
    tensors: Mapping[str, torch.Tensor]
    path: pathlib.Path | None = None

    def save(self, path: pathlib.Path) -> None:
        """Write the file atomically. Equal bundles give equal bytes, whatever the order of their tensors.

        Raises InputError for a bundle that `load` would refuse or a place that cannot be written to,
        ResourceError when the disk is full.
        """
        bundle_format.check(self.metadata, self.tensors, str(path))
        # clones, since safetensors refuses tensors that share memory
        names = sorted(self.tensors)
        tensors = {name: self.tensors[name].detach().cpu().contiguous().clone() for name in names}
        # one key only: several are written in an order that changes from run to run
        metadata = {METADATA_KEY: self.metadata.to_json()}
        files.atomic_write(path, safetensors.torch.save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: pathlib.Path) -> Bundle:
        """Read and check a bundle; InputError of one line when it is not a bundle, damaged or too new."""
        metadata = read_metadata(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                # clones, since the originals are views of a file that may be replaced
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise bundle_format.damaged(str(path), files.one_line(error)) from error
        bundle_format.check(metadata, tensors, str(path))
        return cls(metadata, tensors, path)

    @property
    def dial(self) -> torch.Tensor:
        """Dial values λ, `[G]` float32, increasing to 1."""
        return self.tensors["time/lambda"]

    @property
    def mean_loss(self) -> torch.Tensor:
        """Mean closed-loop loss over the selection split at each dial point, `[G]` float64."""
        return self.tensors["risk/loss"].double().mean(dim=0)

    def check_model(self, model_fingerprint: Mapping[str, Any], weights_hash: str | None = None) -> None:
        """InputError naming the first field in which the model differs from the one calibrated on.

        With `weights_hash`, other weights of the same shape are refused too: the promise was measured on
        these weights and says nothing about others.
        """
        difference = fingerprint.first_difference(self.metadata.fingerprint, model_fingerprint)
        if difference is None and weights_hash is not None and weights_hash != self.metadata.weights_hash:
            difference = ("weights_hash", self.metadata.weights_hash, weights_hash)
        if difference is not None:
            field, ours, theirs = difference
            raise InputError(
                f"bundle {self._where} was calibrated on another model ({self.metadata.model_id}): "
                f"{field} is {ours} in the bundle and {theirs} in the model; choose that model or "
                "calibrate this one"
            )

    def dial_for(self, delta: float) -> int:
        """Dial index whose promise is `delta`: the stored one, else chosen on the stored risk curve.

        Looking up another δ is valid for a δ fixed before seeing the curve. UsageError when δ is not in
        (0, 1), InputError when the curve has too few prompts to promise it.
        """
        if not 0 < delta < 1:
            raise UsageError(f"delta = {delta} must lie between 0 and 1, both excluded")
        if delta == self.metadata.delta:
            return self.metadata.dial_index
        try:
            choice = risk.choose_dial(
                self.tensors["risk/loss"].numpy(), delta, self.metadata.target, self.metadata.confidence
            )
        except PrhsError as error:
            raise InputError(f"bundle {self._where} cannot promise this delta: {error}") from error
        return choice.index

    def params(self, dial_index: int | None = None) -> SelectorParams:
        """Selector parameters at a dial point, the operating point by default; CPU tensors."""
        index = self.metadata.dial_index if dial_index is None else dial_index
        self._check_index(index)
        ratio, tokens = self.tensors["time/budget_ratio"], self.tensors["time/budget_tokens"]
        return self._params(ratio[index], tokens[index])

    def params_at(self, lam: float) -> SelectorParams:
        """Selector parameters at any λ from the smallest dial value to 1, budgets interpolated linearly.

        UsageError outside of that range: below the first dial point nothing was measured.
        """
        dial = self.dial.double()
        if not float(dial[0]) <= lam <= 1:
            raise UsageError(
                f"λ = {lam} is outside of bundle {self._where}, whose dial goes from {float(dial[0]):g} to 1"
            )
        upper = int(torch.searchsorted(dial, torch.tensor(lam, dtype=torch.float64)))
        if float(dial[upper]) == lam:
            return self.params(upper)
        weight = (lam - dial[upper - 1]) / (dial[upper] - dial[upper - 1])
        ratio, tokens = (
            torch.lerp(self.tensors[name][upper - 1].double(), self.tensors[name][upper].double(), weight)
            for name in ("time/budget_ratio", "time/budget_tokens")
        )
        return self._params(ratio.float(), tokens.round().int())

    def with_dial(self, dial_index: int) -> Bundle:
        """The same bundle operating at another dial point, its asked δ unchanged."""
        self._check_index(dial_index)
        metadata = dataclasses.replace(self.metadata, dial_index=dial_index)
        return dataclasses.replace(self, metadata=metadata)

    @property
    def _where(self) -> str:
        return str(self.path) if self.path is not None else f"of {self.metadata.model_id}"

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self.dial):
            raise UsageError(f"dial point {index} does not exist: bundle {self._where} has {len(self.dial)}")

    def _params(self, budget_ratio: torch.Tensor, budget_tokens: torch.Tensor) -> SelectorParams:
        layers, qo_heads, kv_heads, width = (
            int(self.metadata.fingerprint[name]) for name in fingerprint.SIZES
        )
        dense = SelectorParams(
            layers, qo_heads, kv_heads, width, self.metadata.num_sinks, self.metadata.num_local
        )
        if bool((budget_ratio >= 1).all()):
            return dense  # the end of the dial: every axis off
        heads = {name: self.tensors[f"time/{name}"] for name in ("gate", "tau_cos", "block", "dilation")}
        time = TimeParams(budget_ratio, budget_tokens, **heads, reanchor=self.metadata.reanchor)
        copy = KeyCopyKind(self.metadata.key_copy)
        return dataclasses.replace(dense, time=time, depth=self._depth(), layer=self._layer(), key_copy=copy)

    def _depth(self) -> DepthParams | None:
        if "depth/schedule" not in self.tensors:
            return None
        start, phi, alpha = self.tensors["depth/schedule"].tolist()
        return DepthParams(int(start), phi, alpha)

    def _layer(self) -> LayerParams | None:
        if "layer/schedule" not in self.tensors:
            return None
        start, psi, gamma = self.tensors["layer/schedule"].tolist()
        return LayerParams(int(start), psi, gamma, FreezeMode[self.metadata.freeze_mode.upper()])


def read_metadata(path: pathlib.Path) -> BundleMetadata:
    """Metadata of a bundle file without reading its tensors; InputError when it is not a bundle."""
    header = files.read_header(path)
    if METADATA_KEY not in header.metadata:
        raise InputError(
            f"{path} is not a bundle but some other safetensors file; give one that `prhs calibrate` wrote"
        )
    return BundleMetadata.from_json(header.metadata[METADATA_KEY], str(path))
