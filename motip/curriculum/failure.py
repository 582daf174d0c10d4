"""What is still done when something has failed; none of it may hide why."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from motip.errors import MotipError
from motip.lineage import Lineage

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def beside_a_failure(what: str) -> Iterator[None]:
    """Log what goes wrong in here instead of raising it: the error that is on its way is the one to be seen.

    Args:
        what: could not be done, for the log.
    """
    try:
        yield
    except Exception as error:
        told = error.what if isinstance(error, MotipError) else f"{type(error).__name__}: {error}"
        _log.warning("%s: %s", what, told)


def tell_failure(lineage: Lineage, run_id: str, error: BaseException) -> None:
    """End a run as FAILED, or as interrupted where ``error`` is no failure but somebody's wish; raises nothing."""
    with beside_a_failure(f"MLflow could not be told how run {run_id} ended"):
        if isinstance(error, Exception):
            lineage.finish(run_id, "FAILED")
        else:
            lineage.mark_interrupted(run_id)
