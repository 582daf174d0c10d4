"""What an object store refuses for a moment is asked again, each time later, and each time said in the log."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from motip.errors import MotipError

_log = logging.getLogger(__name__)
_spread = random.Random()

Answer = TypeVar("Answer")

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 16.0
RETRY_FOR_S = 60.0
"""No further try later than this after the first, unless the caller has other wishes."""

_PASSING = re.compile(
    r"AWS Error (SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|NETWORK_CONNECTION|REQUEST_TIMEOUT)"
    r"|HTTP status (429|5\d\d)"
)
"""What pyarrow says of throttling, servers in trouble and lost connections; wrong keys, rights and buckets are none."""


def passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    told = error.__cause__ if isinstance(error, MotipError) else error
    return isinstance(told, OSError) and _PASSING.search(str(told)) is not None


def retried(
    action: Callable[[], Answer], what: str, for_s: float = RETRY_FOR_S, say: Callable[[str], None] = _log.warning
) -> Answer:
    """Do ``action``, again after growing waits (0.5 s doubling to 16 s) while it fails for a passing reason.

    Args:
        action: may be repeated whole; its last error is raised as it is.
        what: names it in the log.
        for_s: seconds after which no further try begins. A try itself may take longer.
        say: hears of every failed try.
    """
    begin, tries, wait = time.monotonic(), 1, FIRST_WAIT_S
    while True:
        try:
            return action()
        except (OSError, MotipError) as error:
            # Workers that were refused together do not come back together.
            pause = wait * _spread.uniform(0.8, 1.2)
            if not passing(error) or time.monotonic() - begin + pause > for_s:
                raise
            say(f"{what} failed (try {tries}), again in {pause:.1f} s: {str(error).splitlines()[0]}")
        time.sleep(pause)
        tries, wait = tries + 1, min(2 * wait, LONGEST_WAIT_S)
