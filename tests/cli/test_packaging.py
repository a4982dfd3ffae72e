"""What is installed: the wheel works outside the checkout; the tested versions suit both builds of torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from .conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {_normal(requirement.name): requirement for requirement in found}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return specifier.version


def test_every_direct_dependency_is_pinned_within_its_bounds() -> None:
    pins = constraints()
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, wanted):
        pin = pins[_normal(requirement.name)]
        assert requirement.specifier.contains(_version(pin)), f"{pin} is outside {requirement}"


def test_constraints_leave_the_build_of_torch_open() -> None:
    """The CUDA build of torch asks for exact versions of CUDA's libraries itself, and for one of triton."""
    pins = constraints()
    asked_by_cuda_build = {"2.13.0": "3.7.1"}
    assert _version(pins["triton"]) == asked_by_cuda_build[_version(pins["torch"])]
    for name, pin in pins.items():
        assert not re.match(r"(nvidia-|cuda-)", name), f"{pin} belongs to one build of torch"
        assert "+" not in _version(pin), f"{pin} names a local build"


def test_torch_accepts_the_pinned_versions() -> None:
    """The installed build's own requirements, whatever they are, against the pins."""
    import importlib.metadata

    pins = constraints()
    for distribution in ("torch", "transformers", "typer"):
        for text in importlib.metadata.requires(distribution) or []:
            requirement = Requirement(text)
            pin = pins.get(_normal(requirement.name))
            if pin is not None and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                assert requirement.specifier.contains(_version(pin)), f"{distribution} needs {requirement}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, built from a copy of the sources without network or isolation."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in ("kernels", "calibration", "prhs_cli"):
        shutil.copytree(
            ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    offline = ["--no-index", "--no-deps", "--quiet"]
    wheels = folder / "wheels"
    build = [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(wheels), str(sources)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = wheels.glob("*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", *offline, "--target", str(target), str(wheel)], check=True, timeout=300)
    return target


def test_the_wheel_holds_our_packages_and_nothing_else(site: Path) -> None:
    (wheel,) = (site.parent / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {
        "prhs_cli",
        "prhs_kernels",
        "prhs_calibration",
    }
    built = site.parent / "sources"
    sources = {
        f"{base.name}/{path.relative_to(base).as_posix()}"
        for base in (
            built / "prhs_cli",
            built / "kernels/prhs_kernels",
            built / "calibration/prhs_calibration",
        )
        for path in base.rglob("*")
        if path.is_file()
    }
    assert sources <= set(names), f"missing in the wheel: {sorted(sources - set(names))}"
    assert any(name.endswith("LICENSE") for name in names)


def test_the_installed_wheel_works_outside_the_checkout(site: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site), "XDG_DATA_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(site) in run("-c", "import prhs_cli; print(prhs_cli.__file__)")
    assert run("-m", "prhs_cli", "--version") == f"prhs {PROJECT['version']}\n"
    assert (site / "bin" / "prhs").exists()
    code = "from prhs_calibration.corpus import built_in_text; print(len(built_in_text()))"
    assert int(run("-c", code)) > 1_000_000
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("import os\n" * 20)
    options = ["--prompt-file", str(prompt), "--max-new-tokens", "2", "--json", "--quiet"]
    assert '"new_tokens": 2' in run("-m", "prhs_cli", "generate", *options)
