"""A training that shall end before its time: SIGTERM where it trains, SIGTERM where it was started, or Ray's word."""

from __future__ import annotations

import logging
import os
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

    Only the main thread of a process may listen for signals. Elsewhere (Ray's training workers) the driver's word and
    Ray's own preemption information take their place, and whoever reads them calls `give` or `heard`.

    Args:
        where: says what training is doing, for the message when the time runs out.

    Attributes:
        given: this process is to stop, once its position is saved.
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

    def give(self) -> None:
        """Stop as soon as the position is saved."""
        if not self.given:
            self.given = True
            self.heard()

    def heard(self) -> None:
        """Start the clock of a notice, where it does not run yet."""
        if self._alarm is not None:
            return
        self._heard = time.monotonic()
        self._alarm = threading.Timer(GRACE_S, self._too_late)
        self._alarm.daemon = True
        self._alarm.start()

    def committed(self) -> str:
        """Stop the clock; returns how long it took, or nothing where no clock ran."""
        if self._alarm is None:
            return ""
        self._silence()
        return f"{time.monotonic() - self._heard:.1f} s after the notice was heard"

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.give()

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


class PassedOn:
    """SIGTERM in the process that started a training and waits for it; used as a context manager around the wait.

    The first is passed on to those who train. After a second, or where the position is not saved in time, the wait
    ends with `Stopped` wherever it is.

    Args:
        pass_on: asks those who train to save and end; called in a thread of its own.
        too_late: told that the time has run out, just before the wait ends; called in a thread of its own.

    Attributes:
        given: SIGTERM has come.
    """

    def __init__(self, pass_on: Callable[[], None], too_late: Callable[[], None]) -> None:
        self._pass_on = pass_on
        self._too_late = too_late
        self._before: Any = None
        self._over = threading.Event()
        self.given = False

    def __enter__(self) -> PassedOn:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.given:
            raise Stopped
        self.given = True
        # Not here: the main thread may be anywhere, even holding a lock that asking needs.
        threading.Thread(target=self._see_to_it, name="motip-stop", daemon=True).start()

    def _see_to_it(self) -> None:
        _log.warning(
            "SIGTERM: the workers are asked to save their position, for %.0f s at most; a second one ends at once",
            GRACE_S,
        )
        begin = time.monotonic()
        try:
            self._pass_on()
            self._over.wait(GRACE_S - (time.monotonic() - begin))
            if not self._over.is_set():
                self._too_late()
        except Exception as error:
            _log.error("the workers cannot be asked to save their position: %s", error)
        if not self._over.is_set():
            # Only a signal reaches the main thread, which waits for the training.
            os.kill(os.getpid(), signal.SIGTERM)
