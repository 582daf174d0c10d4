"""Keep a stage's dashboard up to date while it trains: in its folder, and as a figure of its MLflow run."""

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
from motip.storage.paths import Location, put

SAVE_EVERY_S = 60.0
"""Seconds between two times that the steps inside an epoch are written down."""


class StageDashboard:
    """Takes in a training's records and draws ``dashboard.png`` after each epoch.

    A picture is no reason to end a training: what goes wrong with it is said, once, and the next epoch tries again.
    """

    def __init__(self, lineage: Lineage, run_id: str, folder: Location, say: Callable[[str], None]) -> None:
        self._lineage = lineage
        self._run_id = run_id
        self._folder = folder
        self._say = say
        self._said = ""
        self._history: History | None = None
        self._saved = time.monotonic()

    def step(self, values: dict[str, Any]) -> None:
        """Take in a step record."""
        self._attempt(lambda: self._take_step(values))

    def epoch(self, values: dict[str, Any]) -> None:
        """Take in an epoch, keep the history and draw."""
        self._attempt(lambda: self._take_epoch(values))

    def finish(self) -> None:
        """Draw once more, now that the stage's record is written."""
        self._attempt(self._close)

    def _take_step(self, values: dict[str, Any]) -> None:
        history = self._loaded()
        history.add_step(int(values["epoch"]), (values["index"] + 1) / values["of"], values["metrics"])
        if time.monotonic() - self._saved >= SAVE_EVERY_S:
            self._saved = time.monotonic()
            history.save(self._folder)

    def _take_epoch(self, values: dict[str, Any]) -> None:
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
        """What an attempt before this one left, with what this one adds."""
        if self._history is None:
            self._history = History.load(self._folder)
        return self._history

    def _draw(self, history: History) -> None:
        with tempfile.TemporaryDirectory(prefix="motip-") as place:
            picture = Path(place) / FILE
            write_dashboard(history, picture)
            put(picture, self._folder / FILE)
            self._lineage.log_artifact(self._run_id, picture)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (MotipError, OSError) as error:
            text = str(error).splitlines()[0]
            if text != self._said:
                self._said = text
                self._say(f"the dashboard is not up to date: {text}")
