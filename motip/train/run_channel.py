"""Run channel: events from the workers to the event log, stop requests to the workers, failures to the driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from motip.errors import MotipError
from motip.events import Event, EventLog, Note, StepLogged
from motip.storage.paths import location
from motip.train.preemption import Stopped


class RunChannel:
    """Channel of one training, of a stage or of a trial; an actor on Ray, a plain object without.

    An event is in the log of the run's folder when `send` returns, so a kill at any later moment does not lose it.

    Args:
        folder: of the run; on Ray, reachable from the driver's node.
    """

    def __init__(self, folder: str) -> None:
        self._warnings: list[str] = []
        self._log = EventLog(location(folder), self._warnings.append)
        self._failure: tuple[MotipError, str] | None = None
        self._lost: MotipError | None = None
        self._initial_world_size: int | None = None
        self._stop = False
        self._progress = "no step was completed yet"

    # ---- called by workers

    def worker_started(self) -> bool:
        """Called by each worker first; False: it must not train, because a restart cannot fix the reported failure."""
        self._lost = None
        return self._failure is None

    def initial_world_size(self, world_size: int) -> int:
        """Number of workers of the first attempt; later attempts keep its global batches."""
        self._initial_world_size = self._initial_world_size or world_size
        return self._initial_world_size

    def send(self, event: Event) -> None:
        """Append an event to the log."""
        if isinstance(event, StepLogged):
            self._progress = f"the last step that the workers reported was {event.position}"
        self._log.send(event)

    def stop_requested(self) -> bool:
        return self._stop

    def report_failure(self, error: MotipError, traceback: str) -> None:
        """Keep the first error that a restart of the workers cannot fix."""
        self._failure = self._failure or (error, traceback)

    def report_lost(self, problem: MotipError) -> None:
        """A rank died or hangs. Every rank that waited for it reports it; the first report is kept."""
        if self._lost is None:
            self._lost = problem
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
        found, self._warnings[:] = list(self._warnings), []
        return found

    def close(self) -> None:
        """Write events that could not be written before; raises MotipError if that fails again."""
        self._log.close()


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


class RemoteChannel:
    """The methods of `RunChannel`, forwarded to its actor; each call waits for the result."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):  # looked up while an instance is unpickled
            raise AttributeError(name)
        import ray

        method = getattr(self._actor, name)
        return lambda *args: ray.get(method.remote(*args))
