"""Readers of a training's event log in the driver: files of the stage's folder, dashboard, console, MLflow."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from motip.errors import MotipError
from motip.events import START, EpochDone, Event, Note, Offset, Scored, WeightsTransferred, notes_text
from motip.lineage import Lineage
from motip.report.dashboard import write_dashboard
from motip.report.stage_history import History
from motip.stage_folder import StageFolder
from motip.storage.paths import Location, write_bytes, write_json

_log = logging.getLogger(__name__)

REMOTE_READ_EVERY_S = 5.0
"""Seconds between two readings of a log on an object store, each of which lists its files."""


class Console(Protocol):
    """Console output of events."""

    def event(self, event: Event) -> None: ...


class StageReaders:
    """All readers of a stage's log; `catch_up` is the argument of :func:`motip.train.ray_train.fit`.

    A failure of the storage is logged once per reason and repeated at the next call; training continues.

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
        self._read_at = -self._interval_s
        self._files = _StageFiles(stage)
        now = max((offset for _, offset in self._log.read()), default=START)
        readers = dict.fromkeys((self._files.read, *more), START)
        self._offsets: dict[Callable[[Event], None], Offset] = {**readers, console.event: now}
        self._failures: dict[object, str] = {}

    def catch_up(self) -> None:
        """Let every reader read what is new; on an object store every few seconds."""
        if time.monotonic() - self._read_at < self._interval_s:
            return
        for reader in self._offsets:
            self._succeeds(reader, functools.partial(self._feed, reader))
        for path, write in list(self._files.due.items()):
            if self._succeeds(path, write):
                del self._files.due[path]
        self._lineage.catch_up(self._run_id)
        self._read_at = time.monotonic()

    def flush(self) -> None:
        """Read the rest of a log on an object store, also after a failure; any other log has been read."""
        if self._interval_s:
            self._read_at = -self._interval_s
            self.catch_up()

    def finish(self) -> None:
        """Read the rest of the log and draw the dashboard of the finished stage."""
        self._read_at = -self._interval_s
        self._files.finish()
        self.catch_up()

    def _feed(self, reader: Callable[[Event], None]) -> None:
        for event, offset in self._log.read(self._offsets[reader]):
            try:
                reader(event)
            except (MotipError, OSError):
                raise  # of the storage: the event is read again
            except Exception:
                _log.exception("%s: an event is skipped", self._stage)
            self._offsets[reader] = offset

    def _succeeds(self, of: object, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:
            text = str(error).splitlines()[0] if isinstance(error, MotipError | OSError) else repr(error)
            if self._failures.get(of) != text:
                self._failures[of] = text
                _log.warning("%s: the events are not processed completely yet: %s", self._stage, text)
            return False
        return True


class _StageFiles:
    """Files that are derived from a stage's events: notes, weight transfer, scores per epoch, dashboard.

    Attributes:
        due: path -> what writes the file, for files that changed.
    """

    def __init__(self, stage: StageFolder) -> None:
        self.due: dict[Location, Callable[[], None]] = {}
        self._stage = stage
        self._notes = ""
        self._history = History.begin(stage)
        self._history.finished = False

    def read(self, event: Event) -> None:
        self._history.read(event)
        match event:
            case Note():
                self._notes += notes_text([event])
                self.due[self._stage.notes] = self._write_notes
            case Scored():
                path = self._stage.scores(event.epoch)
                self.due[path] = functools.partial(write_json, path, event.scores)
            case WeightsTransferred():
                self.due[self._stage.transfer] = functools.partial(write_json, self._stage.transfer, event.report)
            case EpochDone():
                self.due[self._stage.dashboard] = self._draw

    def finish(self) -> None:
        """Draw the dashboard once more, without the mark of a running stage."""
        self._history.finished = True
        self.due[self._stage.dashboard] = self._draw

    def _write_notes(self) -> None:
        write_bytes(self._stage.notes, self._notes.encode())

    def _draw(self) -> None:
        if self._history.epochs:
            write_dashboard(self._history, self._stage.dashboard)


def transfer_summary(stage: StageFolder) -> dict[str, object]:
    """Report of the stage's weight transfer without its entries per tensor; empty if it has none."""
    reports = [event.report for event in stage.events() if isinstance(event, WeightsTransferred)]
    return {key: value for key, value in (reports or [{}])[0].items() if key not in ("file", "model")}
