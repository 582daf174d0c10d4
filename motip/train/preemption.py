"""Graceful stop on SIGTERM (worker or driver) or on Ray's preemption notice."""

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

GRACE_PERIOD_S = 60.0
"""Deadline of the checkpoint after a stop request; after it the log reports what training was doing."""


class Stopped(KeyboardInterrupt):
    """Training ended on request, after its position was saved; the same command resumes it."""


class StopRequest:
    """Flag set by SIGTERM and polled between optimiser steps; a context manager around the training.

    Only the main thread of a process can install a signal handler. In other threads (Ray's training workers) the
    driver's stop request and Ray's preemption notice are polled instead; the poller calls `request` or
    `start_deadline`.

    Args:
        status: returns what training is doing, for the message at the deadline.

    Attributes:
        requested: this process stops once its position is saved.
    """

    def __init__(self, status: Callable[[], str]) -> None:
        self._status = status
        self._previous_handler: Any = None
        self._timer: threading.Timer | None = None
        self._requested_at = 0.0
        self.requested = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, *exc: object) -> None:
        self._cancel_timer()
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None

    def request(self) -> None:
        """Request a stop as soon as the position is saved."""
        if not self.requested:
            self.requested = True
            self.start_deadline()

    def start_deadline(self) -> None:
        """Start the deadline timer, unless it is running."""
        if self._timer is not None:
            return
        self._requested_at = time.monotonic()
        self._timer = threading.Timer(GRACE_PERIOD_S, self._on_deadline)
        self._timer.daemon = True
        self._timer.start()

    def elapsed(self) -> str:
        """Stop the deadline timer; returns the time since its start as text, "" if it was not running."""
        if self._timer is None:
            return ""
        self._cancel_timer()
        return f"{time.monotonic() - self._requested_at:.1f} s after the request"

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self.request()

    def _on_deadline(self) -> None:
        _log.error(
            "no checkpoint within %.0f s of the stop request: %s; it is written between two optimiser steps",
            GRACE_PERIOD_S,
            self._status(),
        )

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class SigtermForwarder:
    """Forwards SIGTERM of the driver to the training workers; a context manager around the driver's wait for them.

    The first SIGTERM is forwarded. After a second one, or at the end of the grace period, the wait ends with `Stopped`.

    Args:
        forward: requests the stop of the workers; called in a separate thread.
        on_timeout: called in a separate thread at the end of the grace period, before the wait ends.

    Attributes:
        received: SIGTERM was received.
    """

    def __init__(self, forward: Callable[[], None], on_timeout: Callable[[], None]) -> None:
        self._forward = forward
        self._on_timeout = on_timeout
        self._previous_handler: Any = None
        self._wait_ended = threading.Event()
        self.received = False

    def __enter__(self) -> SigtermForwarder:
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, *exc: object) -> None:
        self._wait_ended.set()
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise Stopped
        self.received = True
        # In a thread: the main thread may hold a lock that the call to the workers needs.
        threading.Thread(target=self._forward_and_wait, name="motip-stop", daemon=True).start()

    def _forward_and_wait(self) -> None:
        _log.warning(
            "SIGTERM: the workers save their position, for %.0f s at most; a second SIGTERM ends the run without "
            "waiting for them",
            GRACE_PERIOD_S,
        )
        begin = time.monotonic()
        try:
            self._forward()
            self._wait_ended.wait(GRACE_PERIOD_S - (time.monotonic() - begin))
            if not self._wait_ended.is_set():
                self._on_timeout()
        except Exception as error:
            _log.error("the stop request does not reach the workers: %s", error)
        if not self._wait_ended.is_set():
            # The main thread is blocked in its wait; only a signal interrupts it.
            os.kill(os.getpid(), signal.SIGTERM)
