"""Progress watchdog.

The ranks send heartbeats to the run channel. Peers raise `WorkerLost` while they wait in `all_gather` for a rank
without progress; a background thread exits a process that stalls alone, because no exception interrupts a call that
blocks in the kernel (a dead mount).
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from motip.errors import MotipError
from motip.train.collectives import ProcessGroup
from motip.train.run_channel import Heartbeat, RunChannel

EXIT_STATUS = 70
"""Exit status of a process that ends itself because it stalls (EX_SOFTWARE of sysexits)."""

STDERR = 2
"""File descriptor to which the stacks of all threads are written before the exit."""

_POLL_S = 2.0
_REPORT_TIMEOUT_S = 10.0
"""Upper bound for a final report: a blocked storage must not prevent the exit."""
_PACKAGE = str(Path(__file__).resolve().parents[1])

_log = logging.getLogger(__name__)


class WorkerLost(RuntimeError):
    """Another rank died or stalled. Not a MotipError: Ray restarts the workers after it, which may fix it.

    Attributes:
        problem: the message for the user.
    """

    def __init__(self, problem: MotipError) -> None:
        super().__init__(problem)
        self.problem = problem


class StallTimer:
    """Seconds since a polled value last changed.

    Args:
        poll_s: usual time between two polls. A longer pause counts as twice that, because this process was suspended.
    """

    def __init__(self, poll_s: float) -> None:
        self._max_pause = 2 * poll_s
        self._value: object = None
        self._last = time.monotonic()
        self.seconds = 0.0

    def update(self, value: object) -> float:
        """Compare with the last polled value; returns the seconds since the last change."""
        now = time.monotonic()
        self.seconds = self.seconds + min(now - self._last, self._max_pause) if value == self._value else 0.0
        self._value, self._last = value, now
        return self.seconds


class Watchdog:
    """Process group that raises `WorkerLost` if another rank does not respond or makes no progress.

    `sum_` is for ranks that do the same work at the same time and has the timeout COLLECTIVE_TIMEOUT_S. `all_gather`
    waits as long as the missing ranks make progress, since they may be validating or saving: it logs at intervals which
    ranks it waits for, and raises after PROGRESS_TIMEOUT_S without progress.

    Args:
        inner: the ranks.
        channel: carries the heartbeats, and the report of a rank that stalls.
        timeout_s: COLLECTIVE_TIMEOUT_S, for the messages; the process group itself enforces it.
        progress_s: PROGRESS_TIMEOUT_S.

    Attributes:
        status: returns what training is doing: stage, epoch, step and clips, or the frame being tracked.
    """

    def __init__(self, inner: ProcessGroup, channel: RunChannel, timeout_s: float, progress_s: float) -> None:
        self._inner = inner
        self._channel = channel
        self._timeout_s = timeout_s
        self._progress_s = progress_s
        self._poll_s = min(_POLL_S, progress_s / 20)
        self.world_size = inner.world_size
        self.rank = inner.rank
        self.status: Callable[[], str] = lambda: "before the first step"
        self._thread = threading.get_ident()
        self._waits = False
        self._arrived = 0

    def sum_(self, tensor: Tensor) -> Tensor:
        with self._waiting(), self._translate_timeouts():
            return self._inner.sum_(tensor)

    def all_gather(self, value: Any) -> list[Any]:
        with self._waiting():
            if self.world_size > 1:
                self._wait_for_all()
            with self._translate_timeouts():
                return self._inner.all_gather(value)

    @contextlib.contextmanager
    def monitored(self) -> Iterator[None]:
        """Inside the block a thread sends this rank's heartbeat, and exits the process if it makes no progress.

        A `WorkerLost` that leaves the block is reported.
        """
        over = threading.Event()
        self._thread = threading.get_ident()
        thread = threading.Thread(target=self._monitor, args=(over,), name="motip-watchdog", daemon=True)
        thread.start()
        try:
            yield
        except WorkerLost as lost:
            self._channel.report_lost(lost.problem)
            raise
        finally:
            over.set()
            thread.join(timeout=_REPORT_TIMEOUT_S)

    # ------------------------------------------------------------------------------- waiting for other ranks

    def _wait_for_all(self) -> None:
        """Return once every rank has entered this `all_gather`.

        Raises:
            WorkerLost: a missing rank makes no progress.
        """
        self._arrived += 1
        self._send_heartbeat()
        timers = {rank: StallTimer(self._poll_s) for rank in range(self.world_size) if rank != self.rank}
        begin = logged = time.monotonic()
        pause = 0.001
        while missing := self._not_arrived(timers):
            timers = {rank: timers[rank] for rank in missing}
            for rank, heartbeat in missing.items():
                if timers[rank].update(heartbeat.status) >= self._progress_s:
                    raise WorkerLost(self._stall_error(rank, heartbeat, timers[rank].seconds))
            if time.monotonic() - logged >= self._timeout_s:
                logged = time.monotonic()
                _log.warning(
                    "rank %d has waited %s for %s; it keeps waiting as long as they make progress",
                    self.rank,
                    _duration(logged - begin),
                    "; ".join(f"rank {rank} ({each.status or 'no status yet'})" for rank, each in missing.items()),
                )
            time.sleep(pause)
            pause = min(1.5 * pause, self._poll_s)

    def _not_arrived(self, ranks: Iterable[int]) -> dict[int, Heartbeat]:
        heartbeats = self._channel.heartbeats()
        found = {rank: heartbeats.get(rank, Heartbeat()) for rank in ranks}
        return {rank: each for rank, each in found.items() if each.arrived < self._arrived}

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    @contextlib.contextmanager
    def _translate_timeouts(self) -> Iterator[None]:
        """Raise `WorkerLost` for an error of the process group; log shortly before the timeout."""
        # NCCL's watchdog may end the process without an exception; then this log line is the only message.
        timer = threading.Timer(0.9 * self._timeout_s, self._log_wait)
        timer.daemon = True
        if self.world_size > 1:
            timer.start()
        begin = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            problem = MotipError(
                f"rank {self.rank} of {self.world_size} got no answer from another worker",
                where=self.status(),
                found=f"{str(error).splitlines()[0][:200]} (after {time.monotonic() - begin:.0f} s)",
                expected=f"an answer within {self._timeout_s:g} s (COLLECTIVE_TIMEOUT_S)",
                fix="look for the worker that stopped or is far slower than the others (its own log, its memory); "
                "run the same command again to resume from the last checkpoint",
            )
            raise WorkerLost(problem) from error
        finally:
            timer.cancel()

    def _log_wait(self) -> None:
        _log.error(
            "rank %d has waited %.0f s for another worker: %s; training ends after %.0f s",
            self.rank,
            0.9 * self._timeout_s,
            self.status(),
            self._timeout_s,
        )

    # ----------------------------------------------------------------------------------- this rank's progress

    def _monitor(self, over: threading.Event) -> None:
        # With several ranks the waiting ones raise first: their error has more detail than an exit status.
        limit_s = self._progress_s * (1.0 if self.world_size == 1 else 1.2)
        timer = StallTimer(self._poll_s)
        while not over.wait(self._poll_s):
            # Exit without progress; waiting for other ranks counts as progress.
            status = self.status()
            if timer.update(object() if self._waits else status) >= limit_s:
                problem = self._stall_error(self.rank, Heartbeat(status, self._code_line()), timer.seconds)
                _log.error("%s", problem.render())
                faulthandler.dump_traceback(STDERR)
                report = threading.Thread(target=self._channel.report_lost, args=(problem,), daemon=True)
                report.start()
                report.join(_REPORT_TIMEOUT_S)
                if not over.is_set():
                    os._exit(EXIT_STATUS)
            if self.world_size > 1 and not over.is_set():
                self._send_heartbeat()

    def _send_heartbeat(self) -> None:
        self._channel.heartbeat(self.rank, Heartbeat(self.status(), self._code_line(), self._arrived))

    def _stall_error(self, rank: int, heartbeat: Heartbeat, seconds: float) -> MotipError:
        since = datetime.now(UTC) - timedelta(seconds=seconds)
        line = heartbeat.code_line and f"; it is at {heartbeat.code_line}"
        return MotipError(
            f"rank {rank} of {self.world_size} has made no progress for {_duration(seconds)}",
            where=heartbeat.status or "no status received",
            found=f"nothing since {since:%Y-%m-%d %H:%M:%S} UTC{line}",
            expected=f"a step, a tracked frame, a scored video or a written file within {self._progress_s:g} s "
            "(PROGRESS_TIMEOUT_S)",
            fix="check the storage and the machine of that worker; if a single one of these takes so long, raise "
            "PROGRESS_TIMEOUT_S (--set PROGRESS_TIMEOUT_S=7200). Ray restarts the workers from the last checkpoint, "
            "WORKER_RESTARTS times; after that, and without Ray, run the same command again",
        )

    def _code_line(self) -> str:
        """The innermost line of this package on the stack of the training thread."""
        frame: FrameType | None = sys._current_frames().get(self._thread)
        while frame is not None:
            path = frame.f_code.co_filename
            if path.startswith(_PACKAGE) and path != __file__:
                relative = Path(path).relative_to(Path(_PACKAGE).parent)
                return f"{relative}:{frame.f_lineno} in {frame.f_code.co_name}"
            frame = frame.f_back
        return ""


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
