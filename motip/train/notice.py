"""A machine that will be taken away: SIGTERM in the process that trains, or Ray's word for it."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_log = logging.getLogger(__name__)

GRACE_S = 60.0
"""Within this time of a notice a checkpoint is committed, or the log says what kept it."""


class Stopped(KeyboardInterrupt):
    """Training ended on request, after its position was saved; the same command goes on from there."""


class Notice:
    """Remembers a SIGTERM until the next optimiser step is taken; used as a context manager around the training.

    Only the main thread of a process may listen for signals. Elsewhere (Ray's training workers) Ray's own preemption
    information takes its place, and whoever reads it calls `heard`.

    Args:
        where: says what training is doing, for the message when the time runs out.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        self._where = where
        self._before: Any = None
        self._alarm: threading.Timer | None = None
        self._heard = 0.0
        self.given = False

    def __enter__(self) -> Notice:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *exc: object) -> None:
        self._silence()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def heard(self) -> None:
        """Start the clock of a notice, where it does not run yet."""
        if self._alarm is not None:
            return
        self._heard = time.monotonic()
        self._alarm = threading.Timer(GRACE_S, self._too_late)
        self._alarm.daemon = True
        self._alarm.start()

    def committed(self) -> str:
        """Stop the clock; returns how long it took."""
        self._silence()
        return f"{time.monotonic() - self._heard:.1f} s after the notice"

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self.given:
            self.given = True
            self.heard()

    def _too_late(self) -> None:
        _log.error(
            "no checkpoint within %.0f s of the notice to stop: %s; it is written between two optimiser steps",
            GRACE_S,
            self._where(),
        )

    def _silence(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
