"""Run channel: events from the workers to the event log, stop requests to the workers, failures to the driver."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from motip.errors import MotipError
from motip.events import Event, EventLog, Note, StepLogged
from motip.storage.paths import RemotePath, location
from motip.train.preemption import Stopped

_log = logging.getLogger(__name__)

_THREADS = 16
"""Calls that the actor handles at a time: a stop request does not wait for an event that a slow storage holds."""
_WRITE_S = 10.0
"""Time for which a worker waits until its event is in an object store."""
_NAME_TAKEN_S = 30.0
"""Time for which the start of an actor waits until the one of an earlier attempt with the same name has ended."""


@dataclass(frozen=True)
class Heartbeat:
    """Status that a rank sends for the others.

    Attributes:
        status: what the rank does; a rank whose status changes makes progress.
        code_line: line of the program that its training thread executes.
        arrived: number of `all_gather` calls that it has entered.
    """

    status: str = ""
    code_line: str = ""
    arrived: int = 0


class RunChannel:
    """Channel of one training, of a stage or of a trial; an actor on Ray, a plain object without.

    An event is in the log of the run's folder when `send` returns, so a kill at any later moment does not lose it. If
    an object store answers late, `send` returns earlier; the events are written in order.

    Args:
        folder: of the run; on Ray, reachable from the driver's node.
    """

    def __init__(self, folder: str) -> None:
        self._warnings: list[str] = []
        self._log = EventLog(location(folder), self._warn)
        remote = isinstance(self._log.folder, RemotePath)
        self._writer = ThreadPoolExecutor(1) if remote else None
        self._lock = threading.Lock()
        self._failure: tuple[MotipError, str] | None = None
        self._lost: MotipError | None = None
        self._initial_world_size: int | None = None
        self._heartbeats: dict[int, Heartbeat] = {}
        self._stop = False
        self._progress = "no step was completed yet"

    # ---- called by workers

    def worker_started(self) -> bool:
        """Called by each worker first; False: it must not train, because a restart cannot fix the reported failure."""
        # Of an earlier attempt. All workers start before one of them trains, so nothing of this attempt is removed.
        self._lost, self._heartbeats = None, {}
        return self._failure is None

    def initial_world_size(self, world_size: int) -> int:
        """Number of workers of the first attempt; later attempts keep its global batches."""
        self._initial_world_size = self._initial_world_size or world_size
        return self._initial_world_size

    def send(self, event: Event) -> None:
        """Append an event to the log."""
        if isinstance(event, StepLogged):
            self._progress = f"the last step that the workers reported was {event.position}"
        self._write(event)

    def heartbeat(self, rank: int, heartbeat: Heartbeat) -> None:
        self._heartbeats[rank] = heartbeat

    def heartbeats(self) -> dict[int, Heartbeat]:
        """The last heartbeat of each rank that has sent one."""
        return dict(self._heartbeats)

    def stop_requested(self) -> bool:
        return self._stop

    def report_failure(self, error: MotipError, traceback: str) -> None:
        """Keep the first error that a restart of the workers cannot fix."""
        self._failure = self._failure or (error, traceback)

    def report_lost(self, problem: MotipError) -> None:
        """A rank died or hangs. Every rank that waited for it reports it; the first report is kept."""
        with self._lock:
            first = self._lost is None
            self._lost = self._lost or problem
        if first:
            self.send(Note(problem.render()))

    def worker_stopped(self) -> None:
        """A rank ends; all ranks have saved their position."""
        self._progress = "the position is saved, but the workers were slow to end"

    # ---- called by the driver

    def request_stop(self) -> None:
        """Request a stop of this attempt and of later ones."""
        self._stop = True

    def failure(self) -> tuple[MotipError, str] | None:
        return self._failure

    def lost(self) -> MotipError | None:
        """Report of the rank that was lost in the newest attempt, if any."""
        return self._lost

    def progress(self) -> str:
        """The last progress of the workers, as text."""
        return self._progress

    def warnings(self) -> list[str]:
        """Failures to write the log since the last call."""
        with self._lock:
            found, self._warnings = self._warnings, []
        return found

    def close(self) -> None:
        """Write events that could not be written before; raises MotipError if that fails again."""
        if self._writer is None:
            self._log.close()
        else:
            self._writer.submit(self._log.close).result()

    def _write(self, event: Event) -> None:
        if self._writer is None:
            self._log.send(event)
            return
        # The other ranks wait in a collective meanwhile, which ends the training if it takes too long.
        with contextlib.suppress(TimeoutError):
            self._writer.submit(self._log.send, event).result(_WRITE_S)

    def _warn(self, text: str) -> None:
        with self._lock:
            self._warnings.append(text)


class LocalChannel(RunChannel):
    """Channel of a training in this process; the readers read each event as it is sent."""

    def __init__(self, folder: str, catch_up: Callable[[], None]) -> None:
        super().__init__(folder)
        self._catch_up = catch_up

    def send(self, event: Event) -> None:
        super().send(event)
        try:
            self._catch_up()
        except Stopped:
            self.request_stop()

    def _warn(self, text: str) -> None:
        _log.warning(text)


class RemoteChannel:
    """The methods of `RunChannel`, forwarded to its actor; each call waits for the result.

    Args:
        timeout_s: time after which the driver stops waiting; a worker, which the watchdog ends, waits without limit.

    Raises:
        MotipError: by every method, if the actor has died or does not answer.
    """

    def __init__(self, actor: Any, timeout_s: float | None = None) -> None:
        self._actor = actor
        self._timeout_s = timeout_s

    @classmethod
    def start(cls, folder: str, name: str | None, timeout_s: float) -> RemoteChannel:
        """Start an actor, pinned to the driver's node: it outlives every other node and writes to its disk.

        Args:
            name: of the actor, unique among the running trainings of the Ray job; None: without a name.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        pinned = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"name": name, "num_cpus": 0, "max_concurrency": _THREADS, "scheduling_strategy": pinned}
        deadline = time.monotonic() + _NAME_TAKEN_S
        while True:
            try:
                return cls(ray.remote(RunChannel).options(**options).remote(folder), timeout_s)
            except ValueError:
                # Ray frees the name some time after the end of the earlier actor.
                if name is None or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def for_workers(self) -> RemoteChannel:
        """The channel as the workers use it."""
        return RemoteChannel(self._actor)

    def stop_actor(self) -> None:
        """End the actor, so that its name is free for another attempt."""
        import ray

        with contextlib.suppress(Exception):  # Ray may have been shut down
            ray.kill(self._actor)

    def heartbeat(self, rank: int, heartbeat: Heartbeat) -> None:
        """Send it without waiting: a channel that does not answer must not stop the watchdog."""
        self._actor.heartbeat.remote(rank, heartbeat)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):  # looked up while an instance is unpickled
            raise AttributeError(name)
        import ray

        method = getattr(self._actor, name)

        def call(*args: Any) -> Any:
            try:
                return ray.get(method.remote(*args), timeout=self._timeout_s)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                raise MotipError(
                    f"the actor that records the events of the training does not answer: {_first_line(error)}",
                    where=f"{name} of the run channel, on the driver's node",
                    fix="check the memory and the storage of the driver's node, then run the same command again: it "
                    "resumes",
                ) from error
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, MotipError) else error from None

        return call


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
