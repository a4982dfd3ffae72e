"""Atomic writing and the reading of safetensors headers."""

from __future__ import annotations

import errno
import os
import pathlib
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file

from prhs_calibration import files
from prhs_kernels.errors import InputError, ResourceError


def raising(error: BaseException) -> Callable[..., None]:
    def function(*args: object, **kwargs: object) -> None:
        raise error

    return function


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "a.bin"
    files.atomic_write(target, b"old")
    files.atomic_write(target, b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace", "fdopen"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), RuntimeError("x")])
def test_interrupted_write_keeps_the_old_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, step, raising(error))
    with pytest.raises(type(error)):
        files.atomic_write(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, ResourceError),
        (errno.EDQUOT, ResourceError),
        (errno.EACCES, InputError),
        (errno.EROFS, InputError),
    ],
)
@pytest.mark.parametrize("write", [lambda path: files.atomic_write(path, b"new"), files.check_writable])
def test_system_errors_become_one_line(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type,
    write: Callable[[pathlib.Path], None],
) -> None:
    monkeypatch.setattr(os, "fsync", raising(OSError(number, os.strerror(number))))
    with pytest.raises(kind, match="a.bin") as caught:
        write(tmp_path / "a.bin")
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_file_size_limit_of_the_system_is_a_resource_error(tmp_path: pathlib.Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ResourceError, match="free some space"):
            files.atomic_write(tmp_path / "a.bin", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_targets_that_cannot_be_files(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for target in (tmp_path, tmp_path / "absent" / "a.bin", tmp_path / "file" / "a.bin"):
        with pytest.raises(InputError, match="cannot write"):
            files.check_writable(target)
    # a device must not be replaced by a file
    with pytest.raises(InputError, match="not a regular file"):
        files.atomic_write(pathlib.Path("/dev/null"), b"")
    assert not pathlib.Path("/dev/null").is_file()


def test_check_writable_leaves_an_existing_file_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    files.check_writable(tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_header_of_a_real_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2, 3), "y": torch.zeros(4, dtype=torch.int32)}, path, metadata={"k": "v"})
    header = files.read_header(path)
    assert header.metadata == {"k": "v"}
    assert header.tensors["x"]["shape"] == [2, 3]
    assert header.file_size == path.stat().st_size == header.data_start + 24 + 16


def test_every_truncation_and_any_extra_byte_is_noticed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(5.0)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.safetensors"):
            files.read_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="damaged"):
        files.read_header(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"hello, this is a text and not a model",
        b"\x80\x02}q\x00." * 10,
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{,",
        (9).to_bytes(8, "little") + b'{"x": {}}',
        (2**62).to_bytes(8, "little") + b"{}",
    ],
)
def test_foreign_content_is_refused(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.safetensors") as caught:
        files.read_header(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            files.read_header(path)
