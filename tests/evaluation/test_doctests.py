"""The example in the docstring of ``evaluate_videos``."""

from __future__ import annotations

import doctest

from motip.evaluation import evaluator


def test_docstring_examples_run() -> None:
    results = doctest.testmod(evaluator)
    assert results.attempted > 0 and results.failed == 0
