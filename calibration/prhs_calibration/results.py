"""Result files: one JSON with everything needed to redraw a figure, written whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prhs_calibration import __version__
from prhs_calibration.files import atomic_write, check_writable
from prhs_kernels.errors import InputError

SCHEMA = 1
_KEYS = {"kind", "schema", "conditions", "data"}
_VERSIONS = ("prhs", "torch", "transformers", "triton", "numpy", "scipy")


def data_dir() -> Path:
    """This user's folder for bundles and results: `$XDG_DATA_HOME/prhs`, usually `~/.local/share/prhs`."""
    base = os.environ.get("XDG_DATA_HOME", "")
    # the XDG specification tells to ignore relative paths
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "share") / "prhs"


def results_dir() -> Path:
    """Where result files go when no `--output` is given; not created here."""
    return data_dir() / "results"


def default_path(kind: str) -> Path:
    """A fresh file name for a result of `kind`, with the local time in it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    candidate = results_dir() / f"{kind}-{stamp}.json"
    number = 1
    while candidate.exists():
        number += 1
        candidate = results_dir() / f"{kind}-{stamp}-{number}.json"
    return candidate


def output_path(asked: Path | None, kind: str) -> Path:
    """Where the result of `kind` will go: `asked`, or a new file in this user's folder.

    Checked before the work whose result it is: InputError when it cannot be written, ResourceError when
    the disk is full.
    """
    path = asked or default_path(kind)
    if asked is None:
        make_folder(path.parent)
    check_writable(path)
    return path


def make_folder(folder: Path) -> None:
    """Create one of this user's data folders; InputError when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot create {folder} ({error.strerror}); set XDG_DATA_HOME or give --output"
        ) from None


def newest(kind: str) -> Path | None:
    """The most recent readable result of `kind` in this user's folder, or None."""
    files = sorted(
        results_dir().glob(f"{kind}-*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True
    )
    for path in files:
        try:
            read_result(path, kind=kind)
        except InputError:
            continue
        return path
    return None


def conditions(**facts: Any) -> dict[str, Any]:
    """What a figure depends on: versions, machine, command line, and the caller's `facts` (device, seeds, …).

    Paths below the home folder are shown with `~`, so that a shared file does not name its user.
    """
    return {
        "versions": {"python": platform.python_version()} | {name: version_of(name) for name in _VERSIONS},
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "command": _without_home(shlex.join(["prhs", *sys.argv[1:]])),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    } | {
        key: _without_home(value) if isinstance(value, str | Path) else value for key, value in facts.items()
    }


def envelope(kind: str, conditions: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The object that a result file holds."""
    return {"kind": kind, "schema": SCHEMA, "conditions": dict(conditions), "data": dict(data)}


def write_result(path: Path, kind: str, conditions: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Write a result file atomically; raises what `prhs_calibration.files.atomic_write` does."""
    atomic_write(path, (to_json(envelope(kind, conditions, data)) + "\n").encode())


def to_json(data: Mapping[str, Any], *, indent: int | None = 1) -> str:
    """Strict JSON: NaN and infinities become null ("not measured"), paths text, array scalars numbers.

    `indent=None` is one line.
    """
    return json.dumps(_plain(data), indent=indent, ensure_ascii=False, allow_nan=False)


def read_result(path: Path, *, kind: str | None = None) -> dict[str, Any]:
    """Read a result file; InputError when it is missing, damaged, of another kind or of a newer schema."""
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"result file {path} does not exist; check the path") from None
    except OSError as error:
        raise InputError(f"result file {path} cannot be read ({error.strerror}); check the path") from None
    except ValueError:
        raise InputError(
            f"{path} is not a result file of prhs: not valid JSON; run the command again"
        ) from None
    if not isinstance(content, dict) or not _KEYS <= content.keys():
        raise InputError(
            f"{path} is not a result file of prhs: it needs the keys {', '.join(sorted(_KEYS))}; "
            "give what a command wrote with --output"
        )
    if content["schema"] != SCHEMA:
        raise InputError(
            f"{path} has schema {content['schema']}, this prhs reads {SCHEMA}; use the version that wrote it"
        )
    if kind is not None and content["kind"] != kind:
        raise InputError(
            f"{path} holds a result of kind {content['kind']!r}, needed is {kind!r}; give a file of that kind"
        )
    return content


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):  # NumPy and torch arrays and scalars
        return _plain(value.tolist())
    return str(value)


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, None without one; our own is known without installation."""
    if distribution == "prhs":
        return __version__
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _without_home(text: str | Path) -> str:
    home = str(Path.home())
    return str(text).replace(home, "~") if home not in ("", "/") else str(text)
