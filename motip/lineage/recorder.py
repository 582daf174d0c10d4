"""MLflow recorder: a reader of event logs that records each run's events in MLflow.

Its only state is an offset per run, under ``storage/mlflow/readers``. Without it the log is delivered again from its
beginning, with the same result: MLflow ignores a point of the same metric, step and time, and replaces artifacts.
"""

from __future__ import annotations

import json
import logging
import posixpath
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motip.errors import MotipError
from motip.evaluation.score_table import score_rows
from motip.evaluation.scores import Scores
from motip.events import (
    START,
    ArtifactWritten,
    CheckpointChosen,
    Ended,
    EpochDone,
    Event,
    EventLog,
    Imported,
    MetricsLogged,
    Note,
    Offset,
    Resumed,
    Scored,
    StepLogged,
    TableWritten,
    TagsSet,
    TextWritten,
    WeightsTransferred,
    notes_text,
)
from motip.lineage.provenance import redact
from motip.lineage.registered_model import find_run, register
from motip.lineage.store import Store, Unreachable
from motip.lineage.tags import MAX_TAG, Tag
from motip.stage_folder import StageFolder
from motip.storage.atomic import write_json_atomic
from motip.storage.paths import Location, download, exclusive_lock, location, read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

BATCH_POINTS = 1000
"""Maximum number of metric values in one request to MLflow."""


class Outage:
    """A time in which MLflow accepts nothing; shared by the recorders of one process.

    Args:
        retry_interval: seconds without another attempt.
    """

    def __init__(self, store: Store, retry_interval: float) -> None:
        self.store = store
        self.reason = ""
        self._retry_interval = retry_interval
        self._retry_at = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # The monotonic clock of another machine has another zero.
        return {**self.__dict__, "_retry_at": 0.0}

    @property
    def waiting(self) -> bool:
        return time.monotonic() < self._retry_at

    def begin(self, error: Unreachable) -> None:
        """Warn once per outage, and wait for the retry interval."""
        if not self.reason:
            logger.warning(
                "MLflow at %s cannot be used now; the events stay in the event logs and are recorded later (%s)",
                self.store.shown_uri,
                str(error)[:200],
            )
        self.reason = str(error)
        self._retry_at = time.monotonic() + self._retry_interval

    def over(self) -> None:
        self.reason, self._retry_at = "", 0.0


class MlflowRecorder:
    """Delivers a run's event log to its MLflow run, in order. What MLflow refuses is set aside with the reason."""

    def __init__(self, outage: Outage, run_id: str) -> None:
        self.run_id = run_id
        self._outage = outage
        self._store = outage.store
        self._state = _readers(self._store) / f"{run_id}.json"
        stored = read_json(self._state) if self._state.is_file() else {}
        recorded = stored.get("folder", f"mlflow/logs/{run_id}")
        # A folder in the storage is recorded by its relative path, so that the storage can be moved.
        folder = location(recorded)
        relative = isinstance(folder, Path) and not folder.is_absolute()
        self.log = EventLog(self._store.storage / recorded if relative else folder)

    @classmethod
    def attach(cls, outage: Outage, run_id: str, folder: Location) -> MlflowRecorder:
        """The recorder of a run whose event log is in `folder`."""
        recorder = cls(outage, run_id)
        if recorder.log.folder != folder:
            recorder.log = EventLog(folder)
            recorder._save(START)
        return recorder

    @staticmethod
    def attached(store: Store) -> list[str]:
        """Ids of all runs that have a recorder."""
        return sorted(path.stem for path in _readers(store).glob("*.json"))

    @property
    def rejected(self) -> Path:
        """File of the run's refused events, each with the reason."""
        return self._state.with_suffix(".rejected.jsonl")

    def catch_up(self) -> int:
        """Deliver the events behind the offset; returns the number of events that remain. Raises nothing."""
        try:
            if not self._outage.waiting:
                self._state.parent.mkdir(parents=True, exist_ok=True)
                with exclusive_lock(self._state.with_suffix(".lock"), f"the delivery of run {self.run_id}"):
                    self._deliver_new()
        except Unreachable as error:
            self._outage.begin(error)
        except (MotipError, OSError) as error:
            self._outage.begin(Unreachable(str(error).splitlines()[0]))
        try:
            return sum(1 for _ in self.log.read(self._offset()))
        except (MotipError, OSError) as error:
            self._outage.begin(Unreachable(str(error).splitlines()[0]))
            return 1

    # ---- offset

    def _offset(self) -> Offset:
        if not self._state.is_file():
            return START
        stored = read_json(self._state)
        return stored["file"], stored["position"]

    def _save(self, offset: Offset) -> None:
        folder = str(self.log.folder).removeprefix(f"{self._store.storage}/")
        self._state.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(self._state, {"folder": folder, "file": offset[0], "position": offset[1]})

    # ---- delivery

    def _deliver_new(self) -> None:
        begin = self._offset()
        entries = list(self.log.read(begin))
        if begin == START:
            imported = [index for index, (event, _) in enumerate(entries) if isinstance(event, Imported)]
            entries = entries[max(imported, default=-1) + 1 :]
            self.rejected.unlink(missing_ok=True)
        for batch, offset in _batches(entries):
            self._deliver(batch)
            self._save(offset)
        if entries:
            self._deliver_files([event for event, _ in entries])
            self._outage.over()

    def _deliver(self, batch: list[Event]) -> None:
        """Deliver one event, or several with metrics; set aside what MLflow refuses.

        Raises:
            Unreachable: MLflow cannot accept them now.
        """
        try:
            with self._store.errors():
                self._send(batch)
            return
        except Unreachable:
            raise
        except Exception as error:
            self._store.probe()
            reason = error.what if isinstance(error, MotipError) else f"{type(error).__name__}: {error}"
        parts = [] if self._run_is_gone() else _parts(batch)
        if parts:
            for part in parts:
                self._deliver([part])
            return
        reason = str(redact(reason))[:500]
        logger.warning("MLflow refuses an event of run %s, set aside in %s: %s", self.run_id, self.rejected, reason)
        with self.rejected.open("a") as stream:
            stream.writelines(json.dumps({**vars(event), "reason": reason}) + "\n" for event in batch)

    def _run_is_gone(self) -> bool:
        with self._store.errors():
            return find_run(self._store.client(), self.run_id) is None

    def _send(self, batch: list[Event]) -> None:
        client, run_id, event = self._store.client(), self.run_id, batch[0]
        match event:
            case StepLogged() | EpochDone() | MetricsLogged():
                _log_points(client, run_id, batch)
            case Scored():
                self._attach_json(event.scores, f"scores/epoch_{event.epoch:03d}.json")
                scores = {source: Scores.from_json(each) for source, each in event.scores.items()}
                self._attach_table(*score_rows({"": scores}), f"evaluation/epoch_{event.epoch:03d}.json")
            case WeightsTransferred():
                self._attach_json(event.report, "transfer.json")
            case TagsSet():
                from mlflow.entities import RunTag

                client.log_batch(run_id, tags=[RunTag(key, value) for key, value in event.tags.items()])
            case TextWritten():
                client.log_text(run_id, event.text, event.path)
            case TableWritten():
                self._attach_table(event.header, event.rows, event.path)
            case ArtifactWritten():
                self._attach_file(event)
            case CheckpointChosen():
                register(self._store, run_id, event.uri, event.sha256, event.step)
            case Ended():
                client.set_terminated(run_id, event.status, int(event.time * 1000))
            case Note() | Resumed() | Imported():
                pass  # the notes are one file, attached once per reading

    def _deliver_files(self, events: list[Event]) -> None:
        """Attach the files that are derived from the complete log: notes and dashboard."""
        if any(isinstance(event, Note) for event in events):
            self._deliver([TextWritten("notes.txt", str(redact(notes_text(self.log))))])
        dashboard = StageFolder(self.log.folder).dashboard
        if any(isinstance(event, EpochDone | Ended) for event in events) and dashboard.is_file():
            self._deliver([ArtifactWritten(dashboard.name, dashboard.name)])

    def _attach_json(self, value: Any, path: str) -> None:
        self._store.client().log_text(self.run_id, json_text(value), path)

    def _attach_table(self, header: list[str], rows: list[list[Any]], path: str) -> None:
        """Attach a table and add it to MLflow's list of the run's tables, unless the tag would become too long."""
        client = self._store.client()
        self._attach_json({"columns": header, "data": rows}, path)
        try:
            tables = json.loads(client.get_run(self.run_id).data.tags.get(Tag.TABLES, "[]"))
            known = [table["path"] for table in tables]
        except (ValueError, TypeError, KeyError):
            return
        text = json.dumps([*tables, {"path": path, "type": "table"}])
        if path not in known and len(text) <= MAX_TAG:
            client.set_tag(self.run_id, Tag.TABLES, text)

    def _attach_file(self, event: ArtifactWritten) -> None:
        source = location(event.file)
        if isinstance(source, Path) and not source.is_absolute():
            source = self.log.folder / event.file
        if not source.is_file():
            raise MotipError("the file of this artifact is missing", where=source)
        folder, name = posixpath.split(event.path)
        with tempfile.TemporaryDirectory(prefix="motip-") as temporary:
            file = download(source, Path(temporary) / name)
            self._store.client().log_artifact(self.run_id, str(file), folder or None)


def json_text(value: Any) -> str:
    """JSON without secrets."""
    return json.dumps(redact(value), indent=1, sort_keys=True, default=str) + "\n"


def _readers(store: Store) -> Path:
    return store.folder / "readers"


def _batches(entries: Iterable[tuple[Event, Offset]]) -> Iterator[tuple[list[Event], Offset]]:
    """Consecutive events with metrics in batches that fit one request, other events singly; with the offset behind."""
    batch: list[Event] = []
    points, end = 0, START
    for event, offset in entries:
        own = len(event.metrics) if isinstance(event, StepLogged | EpochDone | MetricsLogged) else BATCH_POINTS
        if batch and points + own > BATCH_POINTS:
            yield batch, end
            batch, points = [], 0
        batch.append(event)
        points, end = points + own, offset
    if batch:
        yield batch, end


def _parts(batch: list[Event]) -> list[MetricsLogged]:
    """The single points of refused metrics; empty for one point, and for other events."""
    points = [
        MetricsLogged({name: value}, event.step, time=event.time)
        for event in batch
        if isinstance(event, StepLogged | EpochDone | MetricsLogged)
        for name, value in event.metrics.items()
    ]
    return points if len(points) > 1 else []


def _log_points(client: MlflowClient, run_id: str, batch: list[Event]) -> None:
    from mlflow.entities import Metric

    points = [
        Metric(name, value, int(event.time * 1000), event.step)
        for event in batch
        if isinstance(event, StepLogged | EpochDone | MetricsLogged)
        for name, value in event.metrics.items()
    ]
    for begin in range(0, len(points), BATCH_POINTS):
        client.log_batch(run_id, metrics=points[begin : begin + BATCH_POINTS])
