"""Dockerfile, checked without an engine: instructions, pins, build context and wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from pathspec import PathSpec

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest with continued lines joined)."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def of(kind: str) -> list[str]:
    return [rest for name, rest in instructions() if name == kind]


def copied() -> list[str]:
    """Files copied from the build context, not from the first stage."""
    return [source for rest in of("COPY") if "--from=" not in rest for source in rest.split()[:-1]]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, `FROM` first."""
    found: list[list[tuple[str, str]]] = []
    for each in instructions():
        if each[0] == "FROM":
            found.append([])
        found[-1].append(each)
    return found


def test_instructions_are_known_and_start_with_the_base() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= KNOWN and names[0] == "FROM" and names[-1] == "CMD"


def test_base_is_pinned_with_a_supported_python() -> None:
    (base,) = {rest.partition(" AS ")[0] for rest in of("FROM")}
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base), base
    assert "latest" not in (ROOT / "Dockerfile").read_text()
    python = re.findall(r"\d+\.\d+\.\d+", base)[0]
    from packaging.specifiers import SpecifierSet

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert SpecifierSet(wanted).contains(python)


def test_packages_come_from_the_lock_files_only() -> None:
    build, image = [
        [part.strip() for name, rest in stage if name == "RUN" for part in rest.split("&&") if "pip" in part]
        for stage in stages()
    ]
    assert build == [
        "python -m pip install --no-cache-dir --require-hashes --requirement requirements-build.lock",
        "python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist .",
    ]
    assert image == [
        "python -m pip install --no-cache-dir --require-hashes --requirement requirements.lock",
        "python -m pip install --no-cache-dir --no-deps --no-index dist/*.whl",
    ]
    assert "==" not in (ROOT / "Dockerfile").read_text(), "a second place for pins would drift from the lock file"
    # The lock file comes before the code, so that a change of code fetches no package anew.
    for stage in stages():
        first = next(rest for name, rest in stage if name == "COPY")
        assert re.fullmatch(r"requirements(-build)?\.lock \./", first), first


def test_build_tools_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["build-system"]["requires"]) <= set(project["dependency-groups"]["build"])
    pins = (ROOT / "requirements-build.lock").read_text()
    names = [re.split(r"[<>=]", each)[0] for each in project["dependency-groups"]["build"]]
    assert [name for name in names if not re.search(rf"^{name}==", pins, re.MULTILINE)] == []


def test_image_runs_as_user_with_read_only_code() -> None:
    (user,) = of("USER")
    assert user not in ("root", "0")
    assert any(f"useradd --create-home --uid 1000 {user}" in rest for rest in of("RUN"))
    after = [name for name, _ in instructions()][[name for name, _ in instructions()].index("USER") :]
    assert "RUN" not in after and "COPY" not in after
    assert not any("--chown" in rest for rest in of("COPY"))


def test_environment_equals_the_cluster_and_has_no_secret() -> None:
    settings = dict(pair.split("=", 1) for rest in of("ENV") for pair in rest.split())
    lines = yaml.safe_load((ROOT / "cluster.yaml").read_text())["setup_commands"]
    (exported,) = [line for line in lines if "motip-settings" in line]
    for name, value in re.findall(r"((?:RAY|MLFLOW)_\w+)=(\w+)", exported):
        assert settings[name] == value
    from motip.storage.redaction import redact

    assert redact(settings) == settings
    assert not [name for name, _ in instructions() if name == "ARG"]


def ignored() -> PathSpec:
    return PathSpec.from_lines("gitignore", (ROOT / ".dockerignore").read_text().splitlines())


def test_build_context_is_what_is_copied() -> None:
    spec = ignored()
    for source in copied():
        if source == ".":
            pytest.fail("COPY . takes whatever lies in the folder")
        assert (ROOT / source).exists() and not spec.match_file(source)
        if (ROOT / source).is_dir():
            assert not spec.match_file(f"{source}/x.py")
    stays = (".git/config", ".env", ".venv/bin/python", "outputs/x", "cluster.yaml", "key.pem", "tests/x.py")
    assert [path for path in stays if not spec.match_file(path)] == []


def test_copied_files_suffice_to_build_the_package(tmp_path: Path) -> None:
    """The wheel of the first stage, without an engine: only the copied files, locked build tools, no network."""
    context = tmp_path / "context"
    context.mkdir()
    for source in copied():
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, context / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, context / source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--wheel-dir", str(tmp_path), "."]  # fmt: skip
    done = subprocess.run(command, cwd=context, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "motip/py.typed" in names, "type checkers read the annotations of packages that have it only"
    assert "motip/cli/main.py" in names and any(name.endswith("entry_points.txt") for name in names)
    assert (context / "configs" / "curriculum.yaml").is_file() and (context / "ray_jobs" / "curriculum.py").is_file()
