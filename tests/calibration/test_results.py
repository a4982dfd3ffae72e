"""Result files: whole or absent, read back, refused when foreign."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from prhs_calibration import __version__, results
from prhs_kernels.errors import InputError


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    results.write_result(path, "bound", {"seed": 1}, {"δ": [0.02, None]})
    assert results.read_result(path, kind="bound") == {
        "kind": "bound",
        "schema": results.SCHEMA,
        "conditions": {"seed": 1},
        "data": {"δ": [0.02, None]},
    }
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_json_is_strict_and_holds_arrays() -> None:
    data = {
        "nan": float("nan"),
        "n": np.int64(3),
        "x": np.array([0.5, np.inf]),
        "rows": [(1, None)],
        "p": Path("a"),
    }
    assert json.loads(results.to_json(data)) == {
        "nan": None,
        "n": 3,
        "x": [0.5, None],
        "rows": [[1, None]],
        "p": "a",
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x00\x01", "not valid JSON"),
        (b'{"kind": "bound"', "not valid JSON"),
        (b"[1]", "needs the keys"),
        (b'{"kind": "bound", "schema": 1, "data": {}}', "needs the keys"),
        (b'{"kind": "bound", "schema": 99, "data": {}, "conditions": {}}', "schema 99"),
        (b'{"kind": "other", "schema": 1, "data": {}, "conditions": {}}', "'other'"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        results.read_result(path, kind="bound")
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent.json does not exist"):
        results.read_result(tmp_path / "absent.json")


def test_output_is_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    found = results.output_path(None, "bound")
    assert found.parent == tmp_path / "data" / "prhs" / "results" and not any(found.parent.iterdir())
    assert results.output_path(tmp_path / "r.json", "bound") == tmp_path / "r.json"
    for wrong in (tmp_path, tmp_path / "absent" / "r.json", Path("/proc/r.json")):
        with pytest.raises(InputError, match="cannot write"):
            results.output_path(wrong, "bound")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="XDG_DATA_HOME"):
        results.output_path(None, "bound")


def test_data_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert results.results_dir() == tmp_path / "prhs" / "results"
    monkeypatch.setenv("XDG_DATA_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", "/home/someone")
    assert results.results_dir() == Path("/home/someone/.local/share/prhs/results")


def test_newest_skips_damaged_and_other_kinds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert results.newest("bound") is None
    good = results.output_path(None, "bound")
    results.write_result(good, "bound", {}, {})
    later = results.default_path("bound")
    assert later != good
    later.write_text("{")
    os.utime(good, (1, 1))
    assert results.newest("bound") == good


def test_conditions_hide_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/prhs", "inspect", "/home/someone/b.safetensors"])
    found = results.conditions(bundle=Path("/home/someone/b.safetensors"), seeds={"corpus": 1})
    assert found["command"] == "prhs inspect ~/b.safetensors"
    assert found["bundle"] == "~/b.safetensors"
    assert found["seeds"] == {"corpus": 1}
    assert "/home/someone" not in json.dumps(found)
    assert found["versions"]["torch"]


def test_our_own_version_is_the_projects() -> None:
    """Known without installation: a bundle has the same bytes on a machine that only has the source."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert results.version_of("prhs") == __version__ == project["project"]["version"]
    assert results.version_of("no-such-distribution") is None
