"""Shared fixtures: reference numbers, real samples, the `motip` command, another running process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from motip.storage.paths import Location, location

if TYPE_CHECKING:
    from tests.helpers.object_store import ObjectStore

ROOT = Path(__file__).resolve().parents[1]


def _directory(variable: str, default: str, what: str) -> Path:
    path = Path(os.environ.get(variable, ROOT / default)).resolve()
    if not path.is_dir():
        pytest.skip(f"no {what} at {path}; set {variable} to its folder")
    return path


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    return _directory("MOTIP_REFERENCE_DIR", "../shared/reference", "reference numbers")


@pytest.fixture(scope="session")
def samples_dir() -> Path:
    return _directory("MOTIP_SAMPLES_DIR", "../shared/samples", "real samples")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


class CommandResult(NamedTuple):
    """Exit status and output of a command."""

    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.out.strip().splitlines()[-1]


Motip = Callable[..., CommandResult]


@pytest.fixture
def motip(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Motip:
    """Runs `motip ARGUMENTS` in this process."""
    from motip.cli.main import main

    def run(*arguments: object) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["motip", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return CommandResult(int(end.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def other_driver() -> Iterator[str]:
    """Driver name of another live process."""
    code = "from motip.storage.driver_process import this_driver; print(this_driver(), flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """An S3-compatible object store on loopback."""
    from tests.helpers.object_store import object_store

    with object_store() as running:
        yield running


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """The folder of a stage, on a disk and in an object store."""
    if request.param == "disk":
        return tmp_path / "stage"
    return location(f"{request.getfixturevalue('store').uri}/{request.node.name.split('[')[0]}/stage")
