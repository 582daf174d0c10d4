"""The rooms and their doors: imports go downwards only, each engine is spoken to in one room, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "motip").rglob("*.py")) + sorted((ROOT / "ray_jobs").rglob("*.py"))

LEVELS = [
    {"errors", "files"},
    {"config"},
    {"losses", "model"},
    {"track", "data", "cluster"},
    {"train", "evaluate", "report", "lineage"},
    {"curriculum"},
    {"launch", "jobs"},
    {"cli", "commands"},
    {"ray_jobs"},
]
"""Rooms from the bottom up; a room may import its own level and those below."""

ENGINES = {
    "mlflow": {"lineage"},
    "ray.train": {"train/fit.py"},
    "ray.data": {"data/stream.py"},
    "ray.tune": {"train/search.py"},
    "ray.job_submission": {"jobs"},
    "trackeval": {"evaluate/metrics.py"},
    "yaml": {"config"},
    "triton": {"model/triton_kernels.py"},
}
"""Third-party engine to the only room (or file) that speaks to it."""

NARROW = {"torch", "torchvision", "numpy", "scipy", "motip", "triton"}
"""What the rooms that must run on a bare torch machine may import; triton, which not every such machine has, only when
one of its kernels is to run."""


def room(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "ray_jobs":
        return "ray_jobs"
    return relative.parts[1].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, only for type checking) of every import, also those inside functions."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in guarded) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [(f"{node.module}.{alias.name}", id(node) in guarded) for alias in node.names]
    return found


def level(name: str) -> int | None:
    return next((number for number, rooms in enumerate(LEVELS) if name in rooms), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    own = level(room(path))
    if room(path) == "__init__":
        return
    assert own is not None, f"{path.name} stands in no room: add it to LEVELS or move it"
    for module, only_types in imports(path):
        parts = module.split(".")
        if parts[0] not in ("motip", "ray_jobs") or only_types:
            continue
        other = "ray_jobs" if parts[0] == "ray_jobs" else (parts[1] if len(parts) > 1 else "__init__")
        target = level(other)
        if target is not None:
            assert target <= own, f"{path.relative_to(ROOT)} reaches up to {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_engine_has_one_room(path: Path) -> None:
    relative = str(path.relative_to(ROOT / "motip")) if path.is_relative_to(ROOT / "motip") else f"ray_jobs/{path.name}"
    for module, only_types in imports(path):
        for engine, rooms in ENGINES.items():
            if not only_types and (module == engine or module.startswith(f"{engine}.")):
                home = any(relative == each or relative.removesuffix(".py").split("/")[0] == each for each in rooms)
                assert home, f"{relative} speaks to {engine}; its room is {', '.join(sorted(rooms))}"


@pytest.mark.parametrize("name", ["model", "losses", "track"])
def test_narrow_rooms_need_torch_alone(name: str) -> None:
    for path in sorted((ROOT / "motip" / name).rglob("*.py")):
        for module, only_types in imports(path):
            top = module.split(".")[0]
            allowed = top in NARROW or top in sys.stdlib_module_names or top == "safetensors"
            assert allowed or only_types, f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("name", ["motip.model", "motip.losses.detection", "motip.track.tracker"])
def test_narrow_rooms_load_no_engine(name: str) -> None:
    code = (
        f"import {name}, sys; "
        "print([m for m in ('ray', 'mlflow', 'cv2', 'pyarrow', 'pydantic', 'yaml') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda p: p.name)
def test_no_file_is_over_600_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600
