"""Where bundles are kept: this user's data folder and the one that comes with the package."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from prhs_calibration import files, fingerprint, results
from prhs_calibration.bundle import Bundle, read_metadata
from prhs_calibration.bundle_format import BundleMetadata
from prhs_calibration.hub import EMBEDDED, REFERENCE
from prhs_kernels.errors import InputError

SUFFIX = ".safetensors"


@dataclasses.dataclass(frozen=True)
class StoredBundle:
    """A file of the user's bundle folder: its metadata, or the one line why it cannot be used."""

    path: pathlib.Path
    metadata: BundleMetadata | None
    problem: str | None = None

    @property
    def name(self) -> str:
        return self.path.stem


def user_bundle_dir() -> pathlib.Path:
    """`bundles` in this user's data folder (`$XDG_DATA_HOME/prhs`). It may not exist yet."""
    return results.data_dir() / "bundles"


def default_path(model_id: str, weights_hash: str, delta: float) -> pathlib.Path:
    """Where `calibrate` puts a bundle unless told otherwise; makes the user's folder.

    One file per weights and δ: calibrating again replaces the earlier result.
    """
    slug = re.sub(r"[^a-z0-9.]+", "-", model_id.lower()).strip("-.") or "model"
    folder = user_bundle_dir()
    results.make_folder(folder)
    return folder / f"{slug}-{weights_hash.rpartition(':')[2][:8]}-delta{delta:g}{SUFFIX}"


def reference_bundle_path(name: str = REFERENCE) -> pathlib.Path:
    """The bundle of an embedded model; InputError when this installation lacks it."""
    path = pathlib.Path(__file__).parent / "reference_model" / f"{name}.bundle.safetensors"
    if not path.is_file():
        raise InputError(f"{path} is missing: install prhs again, or make it with `prhs calibrate {name}`")
    return path


def list_bundles() -> list[StoredBundle]:
    """This user's bundles, newest first; unusable files are listed with their problem."""
    return [_stored(path) for path in sorted(_paths(), key=_age_key)]


def newest_matching(
    model_fingerprint: Mapping[str, Any], weights_hash: str | None = None
) -> pathlib.Path | None:
    """The newest of this user's bundles calibrated on this model, or None."""
    for stored in list_bundles():
        if stored.metadata is None:
            continue
        same_weights = weights_hash in (None, stored.metadata.weights_hash)
        if same_weights and not fingerprint.first_difference(stored.metadata.fingerprint, model_fingerprint):
            return stored.path
    return None


def choose(
    path: pathlib.Path | None, model_fingerprint: Mapping[str, Any], weights_hash: str | None = None
) -> Bundle:
    """The bundle to use with a model: `path` if given, else the newest matching one, else the embedded one.

    InputError when none fits the model. The result's `path` says which it is.
    """
    chosen = path or newest_matching(model_fingerprint, weights_hash)
    if chosen is None:
        return _embedded(model_fingerprint, weights_hash)
    bundle = Bundle.load(chosen)
    bundle.check_model(model_fingerprint, weights_hash)
    return bundle


def _embedded(model_fingerprint: Mapping[str, Any], weights_hash: str | None) -> Bundle:
    problem: InputError | None = None
    for name in EMBEDDED:
        try:
            bundle = Bundle.load(reference_bundle_path(name))
            bundle.check_model(model_fingerprint, weights_hash)
        except InputError as error:
            problem = error
        else:
            return bundle
    raise InputError(
        f"no bundle in {user_bundle_dir()} fits this model: run `prhs calibrate` on it, or name a bundle file"
    ) from problem


def remove(name: str) -> pathlib.Path:
    """Delete one of this user's bundles by its file name, with or without suffix, and return its path."""
    paths = {path.stem: path for path in _paths()}
    stem = name.removesuffix(SUFFIX)
    if stem not in paths:
        close = difflib.get_close_matches(stem, paths, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see `prhs models`"
        raise InputError(f"no bundle {name!r} in {user_bundle_dir()}: {hint}")
    try:
        paths[stem].unlink()
    except OSError as error:
        raise InputError(f"cannot remove {paths[stem]}: {files.reason(error)}") from error
    return paths[stem]


def _paths() -> list[pathlib.Path]:
    folder = user_bundle_dir()
    return [path for path in folder.glob(f"*{SUFFIX}") if path.is_file()] if folder.is_dir() else []


def _age_key(path: pathlib.Path) -> tuple[int, str]:
    return -path.stat().st_mtime_ns, path.name


def _stored(path: pathlib.Path) -> StoredBundle:
    try:
        return StoredBundle(path, read_metadata(path))
    except InputError as error:
        return StoredBundle(path, None, str(error))
