"""Import rules: the contracts of ``.importlinter``, and the rules that import-linter cannot express."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "motip").rglob("*.py")) + sorted((ROOT / "ray_jobs").rglob("*.py"))

RAY_LIBRARIES = {
    "ray.train": "motip/train/ray_train.py",
    "ray.data": "motip/data/stream.py",
    "ray.tune": "motip/tune/ray_tune.py",
    "ray.job_submission": "motip/cli/job_submission.py",
}
"""Library of Ray -> the only module that imports it. import-linter sees external packages by their first name only."""

ALLOWED = {"torch", "torchvision", "numpy", "scipy", "safetensors", "motip", "triton"} | set(sys.stdlib_module_names)
"""Imports of the packages that run on torch alone; triton only where one of its kernels is about to run."""


def imports(path: Path) -> list[str]:
    """Every imported module of a file, imports inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    return subprocess.run([*command, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def copy_of_the_package(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "motip", tmp_path / "motip", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    return tmp_path


def test_contracts_hold(copy_of_the_package: Path) -> None:
    result = lint_imports(copy_of_the_package)
    assert result.returncode == 0, result.stdout
    assert " 0 broken" in result.stdout


def test_two_packages_that_import_each_other_are_reported(copy_of_the_package: Path) -> None:
    training = copy_of_the_package / "motip" / "train" / "anomalies.py"
    page = copy_of_the_package / "motip" / "report" / "heatmap.py"
    training.write_text(f"{training.read_text()}\nimport motip.report.heatmap\n")
    page.write_text(f"{page.read_text()}\nimport motip.train.anomalies\n")
    result = lint_imports(copy_of_the_package)
    assert result.returncode == 1
    assert "motip.train is not allowed to import motip.report" in result.stdout


def test_type_checking_circle_is_reported(copy_of_the_package: Path) -> None:
    network = copy_of_the_package / "motip" / "model" / "motip.py"
    circle = "\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import motip.model.build\n"
    network.write_text(network.read_text() + circle)
    result = lint_imports(copy_of_the_package)
    assert result.returncode == 1 and "No cycles are allowed in motip.model" in result.stdout


@pytest.mark.parametrize("library", RAY_LIBRARIES)
def test_each_ray_library_has_one_module(library: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in FILES
        for module in imports(path)
        if module == library or module.startswith(f"{library}.")
    }
    assert users == {RAY_LIBRARIES[library]}


@pytest.mark.parametrize("package", ["model", "losses", "tracking"])
def test_network_packages_import_torch_and_numpy_only(package: str) -> None:
    modules = {(path, module) for path in (ROOT / "motip" / package).rglob("*.py") for module in imports(path)}
    assert modules
    assert {(path.name, module) for path, module in modules if module.split(".")[0] not in ALLOWED} == set()


@pytest.mark.parametrize("module", ["motip.model", "motip.losses.detection", "motip.tracking.tracker"])
def test_network_packages_load_no_engine(module: str) -> None:
    code = (
        f"import {module}, sys; "
        "print([m for m in ('ray', 'mlflow', 'cv2', 'pyarrow', 'pydantic', 'yaml') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
