"""Fixtures every test room shares: where the reference numbers and the real samples are."""

from __future__ import annotations

import os
from pathlib import Path

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
