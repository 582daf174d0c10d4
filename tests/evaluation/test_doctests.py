"""The example in the docstring of ``evaluate``."""

from __future__ import annotations

import doctest

from motip.evaluation import evaluation


def test_docstring_examples_run() -> None:
    results = doctest.testmod(evaluation)
    assert results.attempted > 0 and results.failed == 0
