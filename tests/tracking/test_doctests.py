"""The examples in the docstrings of the tracking API."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from motip.tracking import api, loading, tracker


@pytest.mark.parametrize("module", [api, loading, tracker], ids=lambda module: module.__name__)
def test_docstring_examples_run(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0
