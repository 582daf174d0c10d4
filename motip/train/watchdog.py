"""Waiting comes to an end: whoever makes no progress is named with where it stands, and the workers end.

Two eyes watch a rank. The others do while they wait for it in `gather`, and raise. It does itself, in a thread of its
own, because with one worker nobody waits, and ends its process: no exception reaches what hangs in a dead mount.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from motip.errors import MotipError
from motip.train.collectives import Communicator

PROGRESS_TIMEOUT_S = 1800.0
EXIT_STATUS = 70
"""Of a process that ends itself because it hangs (EX_SOFTWARE of sysexits)."""

_LOOK_S = 2.0
_TELL_S = 10.0
"""A storage that hangs must not keep the process from ending."""
_PACKAGE = str(Path(__file__).resolve().parents[1])

_log = logging.getLogger(__name__)


class WorkerLost(RuntimeError):
    """Another rank died or stalled. No MotipError: Ray starts the workers again after it, and that may cure it.

    Attributes:
        problem: what the user is told.
    """

    def __init__(self, problem: MotipError) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass(frozen=True)
class Standing:
    """What a rank tells the others of itself.

    Attributes:
        where: what it does. A rank whose text changes makes progress.
        line: of the program that it is in.
        arrived: how often it has come to a `gather`.
    """

    where: str = ""
    line: str = ""
    arrived: int = 0

    @staticmethod
    def parse(text: str) -> Standing:
        return Standing(**json.loads(text)) if text else Standing()


class Stillness:
    """For how long something has not changed, by being looked at now and then.

    Args:
        look_s: usual time between two looks. A longer one counts as twice that: the process itself was stopped.
    """

    def __init__(self, look_s: float) -> None:
        self._most = 2 * look_s
        self._value: object = None
        self._last = time.monotonic()
        self.seconds = 0.0

    def see(self, value: object) -> float:
        """Look; returns the seconds since it last was another."""
        now = time.monotonic()
        self.seconds = self.seconds + min(now - self._last, self._most) if value == self._value else 0.0
        self._value, self._last = value, now
        return self.seconds


class Watched:
    """A communicator that ends, with a message, when another rank does not answer or makes no progress.

    `sum_` is for ranks that do the same thing at the same time: it waits for COLLECTIVE_TIMEOUT_S. `gather` waits as
    long as those who have not come make progress, since they may be validating or saving: it says again and again whom
    it waits for, and gives up after PROGRESS_TIMEOUT_S without any.

    Args:
        inner: the ranks.
        timeout_s: COLLECTIVE_TIMEOUT_S, for the messages; the process group itself keeps the time.
        progress_s: PROGRESS_TIMEOUT_S.

    Attributes:
        where: says where training is: stage, epoch, step and clips, or the frame that is tracked.
    """

    def __init__(self, inner: Communicator, timeout_s: float, progress_s: float = PROGRESS_TIMEOUT_S) -> None:
        self._inner = inner
        self._timeout_s = timeout_s
        self._progress_s = progress_s
        self._look_s = min(_LOOK_S, progress_s / 20)
        self.world_size = inner.world_size
        self.rank = inner.rank
        self.where: Callable[[], str] = lambda: "before the first step"
        self._thread = threading.get_ident()
        self._waits = False
        self._posting = threading.Lock()
        # Others may have used the same ranks before.
        self._arrived = Standing.parse(inner.read(self.rank)).arrived

    def sum_(self, tensor: Tensor) -> Tensor:
        with self._waiting(), self._answered():
            return self._inner.sum_(tensor)

    def gather(self, value: Any) -> list[Any]:
        with self._waiting():
            if self.world_size > 1:
                self._meet()
            with self._answered():
                return self._inner.gather(value)

    def post(self, text: str) -> None:
        self._inner.post(text)

    def read(self, rank: int) -> str:
        return self._inner.read(rank)

    @contextlib.contextmanager
    def guarded(self, tell: Callable[[MotipError], None]) -> Iterator[None]:
        """Let the others see where this rank is, and end this process where it makes no progress itself.

        Args:
            tell: hears why, in a thread of its own, before the process ends.
        """
        over = threading.Event()
        self._thread = threading.get_ident()
        thread = threading.Thread(target=self._guard, args=(over, tell), name="motip-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=_TELL_S)

    # ------------------------------------------------------------------------------------- the others

    def _meet(self) -> None:
        """Return once every rank has come to this `gather`.

        Raises:
            WorkerLost: one that has not come makes no progress.
        """
        self._arrived += 1
        with self._answered(alarm=False):
            self._post()
        still = {rank: Stillness(self._look_s) for rank in range(self.world_size) if rank != self.rank}
        begin = told = time.monotonic()
        pause = 0.001
        while late := self._not_come(list(still)):
            still = {rank: still[rank] for rank in late}
            for rank, standing in late.items():
                if still[rank].see(standing.where) >= self._progress_s:
                    raise WorkerLost(self._stalled(rank, standing, still[rank].seconds))
            if time.monotonic() - told >= self._timeout_s:
                told = time.monotonic()
                _log.warning(
                    "rank %d has waited %s for %s; it goes on waiting as long as they make progress",
                    self.rank,
                    _lasting(told - begin),
                    "; ".join(f"rank {rank} ({each.where or 'not heard of yet'})" for rank, each in late.items()),
                )
            time.sleep(pause)
            pause = min(1.5 * pause, self._look_s)

    def _not_come(self, ranks: list[int]) -> dict[int, Standing]:
        with self._answered(alarm=False):
            standings = {rank: Standing.parse(self._inner.read(rank)) for rank in ranks}
        return {rank: each for rank, each in standings.items() if each.arrived < self._arrived}

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    @contextlib.contextmanager
    def _answered(self, alarm: bool = True) -> Iterator[None]:
        # Where NCCL's watchdog ends the process without an exception, this line is what the log has.
        timer = threading.Timer(0.9 * self._timeout_s, self._no_answer_yet)
        timer.daemon = True
        if self.world_size > 1 and alarm:
            timer.start()
        begin = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            problem = MotipError(
                f"rank {self.rank} of {self.world_size} got no answer from another worker",
                where=self.where(),
                found=f"{str(error).splitlines()[0][:200]} (after {time.monotonic() - begin:.0f} s)",
                expected=f"an answer within {self._timeout_s:g} s (COLLECTIVE_TIMEOUT_S)",
                fix="look for the worker that stopped or is far slower than the others (its own log, its memory); "
                "run the same command again to go on from the last checkpoint",
            )
            raise WorkerLost(problem) from error
        finally:
            timer.cancel()

    def _no_answer_yet(self) -> None:
        _log.error(
            "rank %d has waited %.0f s for another worker: %s; at %.0f s training ends",
            self.rank,
            0.9 * self._timeout_s,
            self.where(),
            self._timeout_s,
        )

    # ------------------------------------------------------------------------------------------ itself

    def _guard(self, over: threading.Event, tell: Callable[[MotipError], None]) -> None:
        # Those who wait for this rank are given the time to say so: an error tells more than a process that is gone.
        patience = self._progress_s * (1.0 if self.world_size == 1 else 1.2)
        still = Stillness(self._look_s)
        posts = self.world_size > 1
        while not over.wait(self._look_s):
            where = self.where()
            if still.see(object() if self._waits else where) >= patience:
                problem = self._stalled(self.rank, Standing(where, self._line()), still.seconds)
                _log.error("%s\n%s", problem.render(), self._stack())
                self._tell(tell, problem)
                if not over.is_set():
                    os._exit(EXIT_STATUS)
            try:
                if posts and not over.is_set():
                    self._post()
            except RuntimeError as error:
                posts = False
                _log.warning("rank %d cannot tell the others where it is: %s", self.rank, str(error).splitlines()[0])

    def _tell(self, tell: Callable[[MotipError], None], problem: MotipError) -> None:
        teller = threading.Thread(target=tell, args=(problem,), daemon=True)
        teller.start()
        teller.join(_TELL_S)

    def _post(self) -> None:
        # Two threads post: without the lock an older standing could replace a newer one.
        with self._posting:
            self._inner.post(self._standing())

    def _standing(self) -> str:
        return json.dumps(asdict(Standing(self.where(), self._line(), self._arrived)))

    def _stalled(self, rank: int, standing: Standing, seconds: float) -> MotipError:
        since = datetime.now(UTC) - timedelta(seconds=seconds)
        return MotipError(
            f"rank {rank} of {self.world_size} has made no progress for {_lasting(seconds)}",
            where=standing.where or "it has not been heard of",
            found=f"nothing since {since:%Y-%m-%d %H:%M:%S} UTC{standing.line and f'; it is at {standing.line}'}",
            expected=f"a step, a tracked frame, a scored video or a written file within {self._progress_s:g} s "
            "(PROGRESS_TIMEOUT_S)",
            fix="look at the storage and the machine of that worker; if a single one of these takes so long, raise "
            "PROGRESS_TIMEOUT_S (--set PROGRESS_TIMEOUT_S=7200). Ray starts the workers again from the last "
            "checkpoint, WORKER_RESTARTS times; after that, and without Ray, run the same command again",
        )

    def _line(self) -> str:
        """Where in this package the training thread is, or what that has called where it is elsewhere."""
        frame: FrameType | None = sys._current_frames().get(self._thread)
        while frame is not None:
            path = frame.f_code.co_filename
            if path.startswith(_PACKAGE) and path != __file__:
                place = Path(path).relative_to(Path(_PACKAGE).parent)
                return f"{place}:{frame.f_lineno} in {frame.f_code.co_name}"
            frame = frame.f_back
        return ""

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._thread)
        return "" if frame is None else "".join(traceback.format_stack(frame))


def _lasting(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
