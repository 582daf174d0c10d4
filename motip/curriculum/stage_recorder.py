"""Stage recorder: delivers the events of a training to MLflow, the stage's folder and the console."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Protocol

from motip.curriculum.failure import log_exceptions
from motip.curriculum.score_table import score_rows
from motip.curriculum.stage_dashboard import StageDashboard
from motip.errors import MotipError
from motip.evaluation.scores import Scores
from motip.lineage import Lineage
from motip.report.stage_history import epochs_synced
from motip.storage.paths import Location, read_json, write_bytes, write_json
from motip.train.ray_train import FitResult

_log = logging.getLogger(__name__)


class EventSink(Protocol):
    """Console output of events."""

    def note(self, text: str) -> None: ...
    def record(self, kind: str, values: dict[str, Any]) -> None: ...


class StageRecorder:
    """Event handler of a training; called with the kind and the values of each event.

    Attributes:
        transfer: report of the weight transfer, without its lists of tensors.
    """

    def __init__(self, lineage: Lineage, run_id: str, ui: EventSink, folder: Location) -> None:
        self._lineage = lineage
        self._run_id = run_id
        self._ui = ui
        self._folder = folder
        stored = folder / "transfer.json"  # only the first attempt reports it
        self.transfer: dict[str, Any] = _without_lists(read_json(stored)) if stored.is_file() else {}
        self.dashboard = StageDashboard(lineage, run_id, folder, ui.note)
        self._notes_file = folder / "notes.txt"
        # Delivered again after a restart: the previous attempt may have ended between writing and delivering a note.
        self._notes = self._notes_file.read_text() if self._notes_file.is_file() else ""
        self._notes_delivered = not self._notes
        self._notes_written = True
        self._handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "step": self._on_step,
            "epoch": self._on_epoch,
            "scores": self._on_scores,
            "transfer": self._on_transfer,
            "note": self._on_note,
        }

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        handler = self._handlers.get(kind)
        if handler is not None:
            handler(values)
        self._ui.record(kind, values)

    def backfill(self, stored: FitResult) -> None:
        """Record epochs that an earlier attempt stored, but was killed before recording."""
        synced = epochs_synced(self._folder)
        for epoch, metrics in sorted(stored.epochs.items()):
            if epoch not in synced:
                step = stored.steps[epoch]
                text = f"metrics of epoch {epoch + 1} recorded only when the stage resumed"
                self._on_note({"step": step, "text": text})
                scores = self._scores_file(epoch)
                if scores.is_file():
                    self._deliver_scores(epoch, read_json(scores))
                self._on_epoch({"epoch": epoch, "step": step, "metrics": metrics})

    @contextlib.contextmanager
    def notes_delivered(self) -> Iterator[None]:
        """Deliver the notes on exit of the block, also after an error, which is then re-raised."""
        try:
            yield
        except BaseException:
            with log_exceptions("the notes of the training could not be delivered"):
                self.deliver_notes()
            raise
        self.deliver_notes()

    def deliver_notes(self) -> None:
        """Update the notes in MLflow. Not called for every note, since it uploads the complete file."""
        if not self._notes_delivered:
            self._lineage.log_text(self._run_id, self._notes, "notes.txt")
            self._notes_delivered = True
        if not self._notes_written:
            self._write_notes()

    def _on_step(self, values: dict[str, Any]) -> None:
        self._metrics(values)
        self.dashboard.step(values)

    def _on_epoch(self, values: dict[str, Any]) -> None:
        self._metrics(values)
        self.dashboard.epoch(values)

    def _metrics(self, values: dict[str, Any]) -> None:
        self._lineage.log_metrics(self._run_id, values["metrics"], int(values["step"]))
        self.deliver_notes()

    def _on_note(self, values: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        step = f" step {values['step']}" if "step" in values else ""
        self._notes += f"{now}{step}: {' '.join(str(values['text']).split())}\n"
        self._notes_delivered = False
        self._write_notes()

    def _write_notes(self) -> None:
        """Write ``notes.txt``; if the storage fails, retry with the next event."""
        try:
            write_bytes(self._notes_file, self._notes.encode())
            self._notes_written = True
        except (MotipError, OSError) as error:
            self._notes_written = False
            _log.warning("notes.txt cannot be written yet: %s", str(error).splitlines()[0])

    def _on_scores(self, values: dict[str, Any]) -> None:
        write_json(self._scores_file(values["epoch"]), values["scores"])  # before MLflow, which may refuse
        self._deliver_scores(values["epoch"], values["scores"])

    def _scores_file(self, epoch: int) -> Location:
        return self._folder / "scores" / f"epoch_{epoch:03d}.json"

    def _deliver_scores(self, epoch: int, scores: dict[str, Any]) -> None:
        self._lineage.log_dict(self._run_id, scores, f"scores/epoch_{epoch:03d}.json")
        own = {source: Scores.from_json(each) for source, each in scores.items()}
        header, rows = score_rows({"": own})
        self._lineage.log_table(self._run_id, header, rows, f"evaluation/epoch_{epoch:03d}.json")

    def _on_transfer(self, values: dict[str, Any]) -> None:
        self.transfer = _without_lists(values)
        write_json(self._folder / "transfer.json", values)
        self._lineage.log_dict(self._run_id, values, "transfer.json")


def _without_lists(transfer: dict[str, Any]) -> dict[str, Any]:
    """A transfer report without its entries per tensor."""
    return {key: value for key, value in transfer.items() if key not in ("file", "model")}
