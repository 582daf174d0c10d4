"""Fixtures every test room shares: reference numbers, real samples, the `motip` command, another living process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _directory(variable: str, default: str, what: str) -> Path:
    path = Path(os.environ.get(variable, ROOT / default)).resolve()
    if not path.is_dir():
        pytest.skip(f"no {what} at {path}; set {variable} to a folder that holds it")
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


class Ran(NamedTuple):
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.out.strip().splitlines()[-1]


Motip = Callable[..., Ran]


@pytest.fixture
def motip(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Motip:
    """`motip ARGUMENTS` as a user types it, in this process."""
    from motip.cli.main import main

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["motip", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return Ran(int(end.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def somebody() -> Iterator[str]:
    """The name of a process that lives, and is not this one."""
    code = "from motip.lineage.driver_process import this_driver; print(this_driver(), flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()
