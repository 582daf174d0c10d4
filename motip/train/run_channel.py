"""Actor that queues worker events for the driver and carries its stop request."""

from __future__ import annotations

from typing import Any

from motip.errors import MotipError


class RunChannel:
    """Events of the workers, queued until the driver drains them; workers need no connection to the tracking server."""

    def __init__(self) -> None:
        self._records: list[tuple[str, dict[str, Any]]] = []
        self._failure: tuple[MotipError, str] | None = None
        self._lost: MotipError | None = None
        self._initial_world_size: int | None = None
        self._stop = False
        self._progress = "no step was completed yet"

    def put(self, kind: str, values: dict[str, Any]) -> None:
        self._records.append((kind, values))
        if kind == "step":
            position = f"epoch {values['epoch'] + 1}, step {values['index'] + 1}/{values['of']}"
            self._progress = f"the last step that the workers reported was {position}"

    def drain(self) -> list[tuple[str, dict[str, Any]]]:
        records, self._records = self._records, []
        return records

    def initial_world_size(self, world_size: int) -> int:
        """Number of workers of the first attempt; later attempts keep its global batches."""
        self._initial_world_size = self._initial_world_size or world_size
        return self._initial_world_size

    def report_failure(self, error: MotipError, traceback: str) -> None:
        """Keep the first error that a restart of the workers cannot fix."""
        self._failure = self._failure or (error, traceback)

    def failure(self) -> tuple[MotipError, str] | None:
        return self._failure

    def worker_started(self) -> bool:
        """Called by each worker first; False: it must not train, because a restart cannot fix the reported failure."""
        self._lost = None
        return self._failure is None

    def report_lost(self, problem: MotipError) -> None:
        """A rank died or hangs. Every rank that waited for it reports it; the first report is kept."""
        if self._lost is None:
            self._lost = problem
            self.put("note", {"text": problem.render()})

    def lost(self) -> MotipError | None:
        """Report of the rank that was lost in the newest attempt, if any."""
        return self._lost

    def request_stop(self) -> None:
        """Request a stop of this attempt and of later ones; called by the driver."""
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop

    def worker_stopped(self) -> None:
        """A rank ends; all ranks have saved their position."""
        self._progress = "the position is saved, but the workers were slow to end"

    def progress(self) -> str:
        """The last progress of the workers, as text."""
        return self._progress
