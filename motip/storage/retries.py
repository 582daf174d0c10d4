"""Retries with exponential backoff for transient object-store errors; every retry is logged."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from motip.errors import MotipError

_log = logging.getLogger(__name__)
_jitter = random.Random()

Result = TypeVar("Result")

FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 16.0
_RETRY_FOR_S = 60.0
"""Default number of seconds after the first attempt within which another one may start."""

_TRANSIENT = re.compile(
    r"AWS Error (SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|NETWORK_CONNECTION|REQUEST_TIMEOUT)"
    r"|HTTP status (429|5\d\d)"
)
"""pyarrow's texts for throttling, server errors and lost connections, not for wrong keys, permissions or buckets."""


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    cause = error.__cause__ if isinstance(error, MotipError) else error
    return isinstance(cause, OSError) and _TRANSIENT.search(str(cause)) is not None


def with_retries(
    action: Callable[[], Result], what: str, for_s: float = _RETRY_FOR_S, log: Callable[[str], None] = _log.warning
) -> Result:
    """Run ``action``; on transient errors run it again after delays of 0.5 s doubling to 16 s.

    Args:
        action: must be safe to repeat; its last error is raised unchanged.
        what: description of the action for the log.
        for_s: seconds after which no further attempt starts; a running attempt may take longer.
        log: receives one line per failed attempt.
    """
    begin, attempt, delay = time.monotonic(), 1, FIRST_DELAY_S
    while True:
        try:
            return action()
        except (OSError, MotipError) as error:
            # Jitter, so that workers throttled together do not retry together.
            pause = delay * _jitter.uniform(0.8, 1.2)
            if not is_transient(error) or time.monotonic() - begin + pause > for_s:
                raise
            log(f"{what} failed (try {attempt}), again in {pause:.1f} s: {str(error).splitlines()[0]}")
        time.sleep(pause)
        attempt, delay = attempt + 1, min(2 * delay, _MAX_DELAY_S)
