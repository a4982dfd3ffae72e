"""Files written whole or not at all, and the header of safetensors files read without loading a tensor."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import secrets
import struct
from typing import Any

from prhs_kernels.errors import InputError, PrhsError, ResourceError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit


def atomic_write(path: pathlib.Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, also after a crash.

    The temporary file lies in the same folder and is removed on every exception, Ctrl-C included.
    Raises InputError when the place cannot be written to, ResourceError when the disk is full.
    """
    _check_target(path)
    temporary = _temporary(path)
    try:
        _write_synced(temporary, data)
        os.replace(temporary, path)
    except OSError as error:
        _discard(temporary)
        raise _write_error(path, error) from error
    except BaseException:
        _discard(temporary)
        raise
    _sync_folder(path.parent)


def check_writable(path: pathlib.Path) -> None:
    """Raise what `atomic_write` would, before the work whose result goes to `path` is done."""
    _check_target(path)
    temporary = _temporary(path)
    try:
        _write_synced(temporary, b"")
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        _discard(temporary)


@dataclasses.dataclass(frozen=True)
class SafetensorsHeader:
    """What stands before the tensors of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, dict[str, Any]]  # name -> dtype, shape, data_offsets
    data_start: int  # bytes
    file_size: int  # bytes


def read_header(path: pathlib.Path) -> SafetensorsHeader:
    """Header of the safetensors file `path`; InputError when it is missing, foreign, damaged or truncated."""
    try:
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            text = file.read(length) if length <= min(file_size - 8, _MAX_HEADER) else file.read(1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}; check the path") from error
    if text[:1] != b"{":
        raise InputError(f"{path} is not a safetensors file; check the path")
    if len(text) < length:
        raise InputError(f"{path} is truncated: it ends inside its header; copy or make it again")
    header = _parse_header(path, text)
    metadata = header.pop("__metadata__", {})
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if file_size != end:
        state = "truncated" if file_size < end else "damaged"
        raise InputError(
            f"{path} is {state}: {file_size} bytes where its header says {end}; copy or make it again"
        )
    return SafetensorsHeader(metadata, header, 8 + length, file_size)


def one_line(error: BaseException) -> str:
    """The text of an exception of some library, without line breaks and not longer than a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _parse_header(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
        for name, entry in header.items():
            if name == "__metadata__":
                valid = all(isinstance(value, str) for value in entry.values())
            else:
                start, end = entry["data_offsets"]
                valid = isinstance(entry["dtype"], str) and 0 <= start <= end
            if not valid:
                raise ValueError(name)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a safetensors file, or damaged; copy or make it again") from error
    return dict(header)


def _temporary(path: pathlib.Path) -> pathlib.Path:
    # not a .safetensors suffix, so that what a killed process leaves is never taken for a bundle
    return path.parent / f".prhs-{secrets.token_hex(8)}.tmp"


def _check_target(path: pathlib.Path) -> None:
    # replacing a device such as /dev/null by a regular file would be a surprise
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise InputError(f"cannot write {path}: it is {kind}; give the name of a file")


def _write_synced(path: pathlib.Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: pathlib.Path) -> None:
    # the file is complete by now; file systems that cannot sync a folder are no reason to fail
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _discard(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _write_error(path: pathlib.Path, error: OSError) -> PrhsError:
    if error.errno in _FULL:
        return ResourceError(f"cannot write {path}: {reason(error)}; free some space or choose another disk")
    return InputError(f"cannot write {path}: {reason(error)}; choose a folder you can write to")


def reason(error: OSError) -> str:
    """The system's word for what went wrong, without number and file name."""
    return (error.strerror or one_line(error)).lower()
