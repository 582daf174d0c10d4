"""Clean-up after a failure that must not hide the original error."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from motip.errors import MotipError
from motip.lineage import Lineage

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def log_exceptions(what: str) -> Iterator[None]:
    """Log exceptions of the block as warnings instead of raising them: the original error must reach the user.

    Args:
        what: what could not be done, for the log.
    """
    try:
        yield
    except Exception as error:
        reason = error.what if isinstance(error, MotipError) else f"{type(error).__name__}: {error}"
        _log.warning("%s: %s", what, reason)


def mark_run_failed(lineage: Lineage, run_id: str, error: BaseException) -> None:
    """End a run as FAILED, or as KILLED if ``error`` is an interruption (Ctrl-C, SystemExit); never raises."""
    with log_exceptions(f"the end of run {run_id} could not be recorded in MLflow"):
        if isinstance(error, Exception):
            lineage.finish(run_id, "FAILED")
        else:
            lineage.mark_interrupted(run_id)
