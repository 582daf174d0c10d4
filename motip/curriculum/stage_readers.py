"""Readers of a training's event log in the driver: files of the stage's folder, dashboard, console, MLflow."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from motip.errors import MotipError
from motip.events import START, Event, Note, Offset, Scored, WeightsTransferred, notes_text
from motip.lineage import Lineage
from motip.report.dashboard import write_dashboard
from motip.report.stage_history import History
from motip.stage_folder import StageFolder
from motip.storage.paths import write_bytes, write_json

_log = logging.getLogger(__name__)

REMOTE_READ_EVERY_S = 5.0
"""Seconds between two readings of a log on an object store, each of which lists its files."""


class Console(Protocol):
    """Console output of events."""

    def event(self, event: Event) -> None: ...


class StageReaders:
    """All readers of a stage's log; `catch_up` is the argument of :func:`motip.train.ray_train.fit`.

    A reader that fails is logged once per reason, and reads the same event again later; training continues.

    Args:
        run_id: MLflow run that records the log.
        console: shows the events of this attempt only.
        more: further readers of all events; may raise `Stopped`.
    """

    def __init__(
        self,
        lineage: Lineage,
        run_id: str,
        stage: StageFolder,
        console: Console,
        *more: Callable[[Event], None],
    ) -> None:
        self._lineage = lineage
        self._run_id = run_id
        self._stage = stage
        self._log = stage.log()
        self._interval_s = 0.0 if isinstance(stage.path, Path) else REMOTE_READ_EVERY_S
        self._read_at = 0.0
        self._dashboard = _Dashboard(stage)
        now = max((offset for _, offset in self._log.read()), default=START)
        readers = (_Files(stage).read, self._dashboard.read, *more)
        self._offsets: dict[Callable[[Event], None], Offset] = {**dict.fromkeys(readers, START), console.event: now}
        self._failures: dict[object, str] = {}

    def catch_up(self) -> None:
        """Let every reader read what is new; on an object store every few seconds."""
        if time.monotonic() - self._read_at < self._interval_s:
            return
        for reader in self._offsets:
            self._keep_failure(reader, functools.partial(self._feed, reader))
        self._keep_failure(self._dashboard, self._dashboard.draw)
        self._lineage.catch_up(self._run_id)
        self._read_at = time.monotonic()

    def finish(self) -> None:
        """Read the rest of the log and draw the dashboard of the finished stage."""
        self._read_at = -self._interval_s
        self._dashboard.finished = True
        self.catch_up()

    def _feed(self, reader: Callable[[Event], None]) -> None:
        for event, offset in self._log.read(self._offsets[reader]):
            reader(event)
            self._offsets[reader] = offset

    def _keep_failure(self, reader: object, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            text = str(error).splitlines()[0] if isinstance(error, MotipError | OSError) else repr(error)
            if self._failures.get(reader) != text:
                self._failures[reader] = text
                _log.warning("%s: the events are not processed completely yet: %s", self._stage, text)


class _Files:
    """Writes notes.txt, transfer.json and the scores of each epoch."""

    def __init__(self, stage: StageFolder) -> None:
        self._stage = stage
        self._notes = ""

    def read(self, event: Event) -> None:
        match event:
            case Note():
                notes = self._notes + notes_text([event])
                write_bytes(self._stage.notes, notes.encode())
                self._notes = notes
            case Scored():
                write_json(self._stage.scores(event.epoch), event.scores)
            case WeightsTransferred():
                write_json(self._stage.transfer, event.report)


class _Dashboard:
    """Draws ``dashboard.png`` after each epoch."""

    def __init__(self, stage: StageFolder) -> None:
        self._stage = stage
        self._history = History.begin(stage)
        self._drawn: tuple[int, bool] = (-1, False)
        self.finished = False

    def read(self, event: Event) -> None:
        self._history.read(event)

    def draw(self) -> None:
        """Draw the history if it has a new epoch or the stage is finished."""
        state = len(self._history.epochs), self.finished
        if not self._history.epochs or state == self._drawn:
            return
        self._history.finished = self.finished
        write_dashboard(self._history, self._stage.dashboard)
        self._drawn = state


def transfer_summary(stage: StageFolder) -> dict[str, object]:
    """Report of the stage's weight transfer without its entries per tensor; empty if it has none."""
    reports = [event.report for event in stage.events() if isinstance(event, WeightsTransferred)]
    return {key: value for key, value in (reports or [{}])[0].items() if key not in ("file", "model")}
