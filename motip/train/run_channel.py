"""Where the training workers leave what they have to say, and find what the driver asks of them."""

from __future__ import annotations

from typing import Any

from motip.errors import MotipError


class Mailbox:
    """What the workers have to say, kept until the driver fetches it: workers need no way to the tracking server."""

    def __init__(self) -> None:
        self._records: list[tuple[str, dict[str, Any]]] = []
        self._failure: tuple[MotipError, str] | None = None
        self._lost: MotipError | None = None
        self._first_world: int | None = None
        self._stop = False
        self._reached = "the workers had not told of a step yet"

    def put(self, kind: str, values: dict[str, Any]) -> None:
        self._records.append((kind, values))
        if kind == "step":
            position = f"epoch {values['epoch'] + 1}, step {values['index'] + 1}/{values['of']}"
            self._reached = f"the last step that the workers told of was {position}"

    def drain(self) -> list[tuple[str, dict[str, Any]]]:
        records, self._records = self._records, []
        return records

    def began_with(self, world: int) -> int:
        """Workers of the first attempt, whatever later ones have; their batches are kept."""
        self._first_world = self._first_world or world
        return self._first_world

    def give_up(self, error: MotipError, traceback: str) -> None:
        """Keep the first error that no restart of the workers can cure."""
        self._failure = self._failure or (error, traceback)

    def failure(self) -> tuple[MotipError, str] | None:
        return self._failure

    def worker_begins(self) -> bool:
        """Each worker asks before it does anything; False: an error that would only come again was told of."""
        self._lost = None
        return self._failure is None

    def lose(self, problem: MotipError) -> None:
        """A rank died or hangs. Those that waited for it all say so; the first is heard."""
        if self._lost is None:
            self._lost = problem
            self.put("note", {"text": problem.render()})

    def lost(self) -> MotipError | None:
        """Why the newest attempt ended, where it was that."""
        return self._lost

    def stop(self) -> None:
        """The driver's word to the workers, of this attempt and of later ones."""
        self._stop = True

    def stop_asked(self) -> bool:
        return self._stop

    def stopped(self) -> None:
        """Some rank ends, after all saved their position."""
        self._reached = "the position is saved, but the workers were slow to end"

    def reached(self) -> str:
        """How far the workers came, in words."""
        return self._reached
