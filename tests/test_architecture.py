"""The shape of the project: who may import whom, what importing costs, what must not be there."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "prhs_kernels": ROOT / "kernels" / "prhs_kernels",
    "prhs_calibration": ROOT / "calibration" / "prhs_calibration",
    "prhs_cli": ROOT / "prhs_cli",
}
ALLOWED = {
    "prhs_kernels": {"prhs_kernels"},
    "prhs_calibration": {"prhs_kernels", "prhs_calibration"},
    "prhs_cli": {"prhs_kernels", "prhs_calibration", "prhs_cli"},
}
HEAVY = ("torch", "transformers", "scipy", "matplotlib", "numpy", "pandas")


def imported_modules(source: str) -> set[str]:
    """Top-level names that a file imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with the three roots on its path."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "calibration")]
    prelude = f"import sys\nsys.path[:0] = {paths!r}\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )


def test_import_scan_sees_every_form() -> None:
    source = "import a.b\nfrom c.d import e\nfrom . import f\ndef g():\n    import h as i\n"
    assert imported_modules(source) == {"a", "c", "h"}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    for path in files:
        ours = {name for name in imported_modules(path.read_text("utf-8")) if name.startswith("prhs_")}
        assert ours <= ALLOWED[package], f"{path.relative_to(ROOT)} imports {sorted(ours - ALLOWED[package])}"


def test_a_kernel_shares_no_code_with_its_reference() -> None:
    for path in (PACKAGES["prhs_kernels"] / "ops").rglob("triton.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
            module = getattr(node, "module", None) or ""
            imported = {part for name in [*names, module] for part in name.split(".")}
            assert "reference" not in imported, f"{path.relative_to(ROOT)} imports the reference"


@pytest.mark.parametrize("folder", ["kernels", "calibration", "tests"])
def test_folders_that_must_not_become_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/ would shadow another import package"


def test_every_folder_with_modules_is_a_package() -> None:
    for base in PACKAGES.values():
        for path in base.rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), (
                f"{path.parent.relative_to(ROOT)} would miss in the wheel"
            )


def test_command_line_is_light_to_import() -> None:
    done = run_python(
        f"""
        import prhs_cli.app
        heavy = [name for name in {HEAVY!r} if name in sys.modules]
        assert not heavy, heavy
        """
    )
    assert done.returncode == 0, done.stderr


def test_packages_import_without_side_effects() -> None:
    """Importing the three packages loads no model library and registers nothing with it."""
    done = run_python(
        f"""
        import prhs_kernels, prhs_calibration, prhs_cli
        heavy = [name for name in {HEAVY!r} if name in sys.modules]
        assert not heavy, heavy
        """
    )
    assert done.returncode == 0, done.stderr


BLOCK_TRITON = """
import importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""

IMPORT_EVERYTHING = """
import importlib, pkgutil
import prhs_kernels, prhs_calibration, prhs_cli
def fail(name):
    raise
for package in (prhs_kernels, prhs_calibration, prhs_cli):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=fail):
        if not found.name.endswith(("__main__", ".triton")):
            importlib.import_module(found.name)
"""


def test_every_module_imports_without_triton() -> None:
    done = run_python(BLOCK_TRITON + IMPORT_EVERYTHING + "assert 'triton' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_hugging_face_kernels_package_is_not_shadowed(tmp_path: Path) -> None:
    """With the package `kernels` installed, `import kernels` must give that one, ours on the path or not."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("WHOSE = 'hugging face'\n")
    done = run_python(
        f"""
        sys.path.append({str(tmp_path)!r})  # behind ours, as site-packages is
        import kernels
        assert getattr(kernels, "WHOSE", None) == "hugging face", kernels
        import prhs_kernels, prhs_calibration
        """
    )
    assert done.returncode == 0, done.stderr
