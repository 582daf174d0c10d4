"""Dashboard of a stage in training, updated after every epoch in its folder and its MLflow run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from motip.errors import MotipError
from motip.lineage import Lineage
from motip.report.dashboard import FILE, write_dashboard
from motip.report.stage_history import History
from motip.storage.paths import Location, upload

SAVE_EVERY_S = 60.0
"""Seconds between writes of the step history inside an epoch."""


class StageDashboard:
    """Collects the events of a training and draws ``dashboard.png`` after each epoch.

    Failures are noted once and do not stop the training; the next epoch retries.
    """

    def __init__(self, lineage: Lineage, run_id: str, folder: Location, note: Callable[[str], None]) -> None:
        self._lineage = lineage
        self._run_id = run_id
        self._folder = folder
        self._note = note
        self._noted = ""
        self._history: History | None = None
        self._saved = time.monotonic()

    def step(self, values: dict[str, Any]) -> None:
        """Add a step event."""
        self._guarded(lambda: self._add_step(values))

    def epoch(self, values: dict[str, Any]) -> None:
        """Add an epoch event, write the history and redraw."""
        self._guarded(lambda: self._add_epoch(values))

    def finish(self) -> None:
        """Redraw as finished, after the stage's record is written."""
        self._guarded(self._close)

    def _add_step(self, values: dict[str, Any]) -> None:
        history = self._loaded()
        history.add_step(int(values["epoch"]), (values["index"] + 1) / values["of"], values["metrics"])
        if time.monotonic() - self._saved >= SAVE_EVERY_S:
            self._saved = time.monotonic()
            history.save(self._folder)

    def _add_epoch(self, values: dict[str, Any]) -> None:
        history = self._loaded()
        history.add_epoch(int(values["epoch"]), values["metrics"])
        self._saved = time.monotonic()
        history.save(self._folder)
        self._draw(history)

    def _close(self) -> None:
        history = self._loaded()
        history.finished = True
        if history.epochs:
            self._draw(history)

    def _loaded(self) -> History:
        """History of earlier attempts and this one, read on first use."""
        if self._history is None:
            self._history = History.load(self._folder)
        return self._history

    def _draw(self, history: History) -> None:
        with tempfile.TemporaryDirectory(prefix="motip-") as temporary:
            picture = Path(temporary) / FILE
            write_dashboard(history, picture)
            upload(picture, self._folder / FILE)
            self._lineage.log_artifact(self._run_id, picture)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (MotipError, OSError) as error:
            text = str(error).splitlines()[0]
            if text != self._noted:
                self._noted = text
                self._note(f"the dashboard is not up to date: {text}")
