"""MLflow recorder: a reader of event logs that records each run's events in MLflow.

Its only state is an offset per run, under ``storage/mlflow/readers``. Without it the log is delivered again from its
beginning, with the same result: MLflow ignores a point of the same metric, step and time, and replaces artifacts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import posixpath
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motip import events
from motip.errors import MotipError
from motip.evaluation.score_table import score_rows
from motip.evaluation.scores import Scores
from motip.events import START, Event, EventLog, Offset, notes_text
from motip.lineage.registered_model import find_run, register
from motip.lineage.store import Store, Unreachable, reason_of
from motip.lineage.tags import MAX_TAG, Tag
from motip.stage_folder import StageFolder
from motip.storage.atomic import write_json_atomic
from motip.storage.paths import Location, download, location, read_json
from motip.storage.redaction import redact
from motip.storage.retries import is_transient

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_BATCH_POINTS = 1000
"""Maximum number of metric values in one request to MLflow."""


class Outage:
    """A time in which MLflow accepts nothing, or nothing of one run.

    Args:
        where: what accepts nothing, for the log.
        retry_interval: seconds without another attempt.
    """

    def __init__(self, where: str, retry_interval: float) -> None:
        self.reason = ""
        self._where = where
        self._retry_interval = retry_interval
        self._retry_at = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # The monotonic clock of another machine has another zero.
        return {**self.__dict__, "_retry_at": 0.0}

    @property
    def waiting(self) -> bool:
        return time.monotonic() < self._retry_at

    def begin(self, reason: str) -> None:
        """Warn once per outage, and wait for the retry interval."""
        if not self.reason:
            logger.warning(
                "%s cannot be used now; the events stay in the event logs and are recorded later (%s)",
                self._where,
                reason[:200],
            )
        self.reason = reason or "no answer"
        self._retry_at = time.monotonic() + self._retry_interval

    def over(self) -> None:
        self.reason, self._retry_at = "", 0.0


class MlflowRecorder:
    """Delivers a run's event log to its MLflow run, in order. What MLflow refuses is set aside with the reason.

    Args:
        outage: of MLflow; shared by all recorders of a process.
    """

    def __init__(self, store: Store, outage: Outage, run_id: str, retry_interval: float) -> None:
        self.run_id = run_id
        self._store = store
        self._outages = outage, Outage(f"MLflow at {store.shown_uri} for run {run_id}", retry_interval)
        self._state = _readers(store) / f"{run_id}.json"
        self._warned: set[str] = set()
        recorded = self._stored().get("folder", f"mlflow/logs/{run_id}")
        # A folder in the storage is recorded by its relative path, so that the storage can be moved.
        folder = location(recorded)
        relative = isinstance(folder, Path) and not folder.is_absolute()
        self.log = EventLog(store.storage / recorded if relative else folder)

    @staticmethod
    def attached(store: Store) -> list[str]:
        """Ids of all runs whose log may have events that are not delivered."""
        stored = {path.stem: _content(path) for path in _readers(store).glob("*.json")}
        own_logs = {path.name for path in (store.folder / "logs").glob("*")}  # some without any delivered event
        return sorted(run for run in own_logs | set(stored) if not stored.get(run, {}).get("ended"))

    @property
    def rejected(self) -> Path:
        """File of the run's refused events, each with the reason."""
        return self._state.with_suffix(".rejected.jsonl")

    def attach(self, folder: Location) -> None:
        """Deliver the log in `folder` from now on; from its beginning, unless that was done before."""
        if self.log.folder == folder and self.log.exists():
            return
        rest = [] if self.log.folder == folder else [event for event, _ in self.log.read(self._offset())]
        self.log = EventLog(folder)
        for event in rest:  # of a queue of version 0.1, while MLflow was away
            self.log.send(event)
        self.log.close()
        self._save(START)
        # A run that was deleted in MLflow and whose stage continues in this one.
        for path in _readers(self._store).glob("*.json"):
            if path != self._state and _content(path).get("folder") == self._stored()["folder"]:
                path.unlink(missing_ok=True)

    def ended(self) -> bool:
        """Whether the last attempt in the log has ended."""
        attempts = [event for event in self.log if isinstance(event, events.Resumed | events.Ended)]
        return bool(attempts) and isinstance(attempts[-1], events.Ended)

    def open(self) -> None:
        """Expect further events of a run that has ended."""
        if self._stored().get("ended"):
            self._save(self._offset())

    def catch_up(self) -> None:
        """Deliver the events behind the offset, if MLflow accepts them now. Raises nothing."""
        everything, this_run = self._outages
        if everything.waiting or this_run.waiting:
            return
        try:
            self._state.parent.mkdir(parents=True, exist_ok=True)
            with self._state.with_suffix(".lock").open("a") as lock:
                with contextlib.suppress(OSError):  # a mount without locks: an event delivered twice does no harm
                    fcntl.flock(lock, fcntl.LOCK_EX)
                self._deliver_new()
        except Unreachable as error:
            (this_run if error.server_up else everything).begin(str(error))
        except Exception as error:
            this_run.begin(reason_of(error))

    @property
    def reason(self) -> str:
        """Why events remain."""
        return next((outage.reason for outage in self._outages if outage.reason), "")

    def remaining(self) -> int:
        """Number of events behind the offset."""
        try:
            return sum(1 for _ in self.log.read(self._offset()))
        except (MotipError, OSError) as error:
            self._outages[1].begin(reason_of(error))
            return 1

    # ---- offset

    def _stored(self) -> dict[str, Any]:
        return _content(self._state)

    def _offset(self) -> Offset:
        stored = self._stored()
        return stored.get("file", ""), stored.get("position", 0)

    def _save(self, offset: Offset, *, ended: bool = False) -> None:
        folder = str(self.log.folder).removeprefix(f"{self._store.storage}/")
        write_json_atomic(self._state, {"folder": folder, "file": offset[0], "position": offset[1], "ended": ended})

    # ---- delivery

    def _deliver_new(self) -> None:
        begin = self._offset()
        entries = list(self.log.read(begin))
        if begin == START:
            imported = [index for index, (event, _) in enumerate(entries) if isinstance(event, events.Imported)]
            entries = entries[max(imported, default=-1) + 1 :]
            self.rejected.unlink(missing_ok=True)
        # Before the offset is saved: a process killed here attaches the files again.
        for event in self._files_of([event for event, _ in entries]):
            self._deliver([event])
        for batch, offset in _batches(entries):
            self._deliver(batch)
            self._save(offset, ended=isinstance(batch[-1], events.Ended))
        if entries:
            for outage in self._outages:
                outage.over()

    def _files_of(self, new: list[Event]) -> Iterator[Event]:
        """Attachments that are derived from the complete log: notes and dashboard."""
        if any(isinstance(event, events.Note) for event in new):
            yield events.TextWritten("notes.txt", notes_text(self.log))
        dashboard = StageFolder(self.log.folder).dashboard
        if any(isinstance(event, events.EpochDone | events.Ended) for event in new) and dashboard.is_file():
            yield events.ArtifactWritten(dashboard.name, dashboard.name)

    def _deliver(self, batch: list[Event]) -> None:
        """Deliver one event, or several with metrics; set aside what MLflow refuses.

        Raises:
            Unreachable: MLflow cannot accept them now.
        """
        try:
            with self._store.errors():
                self._send(batch)
            return
        except Exception as error:
            if not isinstance(error, Unreachable) or error.server_up:
                self._store.probe()  # raises Unreachable if MLflow accepts nothing at all
            if isinstance(error, Unreachable):
                raise
            reason = reason_of(error)
        halves = _halves(batch)
        if halves and not self._run_is_gone():
            for half in halves:
                self._deliver(half)
            return
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning("MLflow refuses events of run %s, set aside in %s: %s", self.run_id, self.rejected, reason)
        with self.rejected.open("a") as stream:
            stream.writelines(json.dumps({**vars(event), "reason": reason}) + "\n" for event in batch)

    def _run_is_gone(self) -> bool:
        with self._store.errors():
            return find_run(self._store.client(), self.run_id) is None

    def _send(self, batch: list[Event]) -> None:
        client, run_id, event = self._store.client(), self.run_id, batch[0]
        match event:
            case events.StepLogged() | events.EpochDone() | events.MetricsLogged():
                _log_points(client, run_id, batch)
            case events.Scored():
                self._attach_json(event.scores, f"scores/epoch_{event.epoch:03d}.json")
                scores = {source: Scores.from_json(each) for source, each in event.scores.items()}
                self._attach_table(*score_rows({"": scores}), f"evaluation/epoch_{event.epoch:03d}.json")
            case events.WeightsTransferred():
                self._attach_json(event.report, "transfer.json")
            case events.TagsSet():
                from mlflow.entities import RunTag

                client.log_batch(run_id, tags=[RunTag(key, value) for key, value in event.tags.items()])
            case events.TextWritten():
                client.log_text(run_id, event.text, event.path)
            case events.TableWritten():
                self._attach_table(event.header, event.rows, event.path)
            case events.ArtifactWritten():
                self._attach_file(event)
            case events.CheckpointChosen():
                register(self._store, run_id, event.uri, event.sha256, event.step)
            case events.Ended():
                client.set_terminated(run_id, event.status, int(event.time * 1000))
            case events.Resumed():
                client.update_run(run_id, status="RUNNING")
                client.set_tag(run_id, Tag.DRIVER, event.driver)
            case events.Note() | events.Imported():
                pass  # the notes are one file, attached once per reading

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

    def _attach_file(self, event: events.ArtifactWritten) -> None:
        source = location(event.file)
        if isinstance(source, Path) and not source.is_absolute():
            source = self.log.folder / event.file
            if not source.is_file():
                source = self._store.storage / event.file
        folder, name = posixpath.split(event.path)
        with tempfile.TemporaryDirectory(prefix="motip-") as temporary:
            try:
                if not source.is_file():
                    raise MotipError("the file of this artifact is missing", where=source)
                file = download(source, Path(temporary) / name)
            except MotipError as error:
                if is_transient(error):
                    raise Unreachable(error.what, server_up=True) from error
                raise
            self._store.client().log_artifact(self.run_id, str(file), folder or None)


def json_text(value: Any) -> str:
    """JSON without secrets."""
    return json.dumps(redact(value), indent=1, sort_keys=True, default=str) + "\n"


def _readers(store: Store) -> Path:
    return store.folder / "readers"


def _content(path: Path) -> dict[str, Any]:
    """Folder and offset of a reader; empty if there are none, or damaged ones: its log is then delivered again."""
    with contextlib.suppress(MotipError, OSError):
        return dict(read_json(path))
    return {}


_WithMetrics = events.StepLogged | events.EpochDone | events.MetricsLogged


def _batches(entries: Iterable[tuple[Event, Offset]]) -> Iterator[tuple[list[Event], Offset]]:
    """Consecutive events with metrics in batches that fit one request, other events singly; with the offset behind."""
    batch: list[Event] = []
    points, end = 0, START
    for event, offset in entries:
        own = len(event.metrics) if isinstance(event, _WithMetrics) else _BATCH_POINTS
        if batch and points + own > _BATCH_POINTS:
            yield batch, end
            batch, points = [], 0
        batch.append(event)
        points, end = points + own, offset
    if batch:
        yield batch, end


def _halves(batch: list[Event]) -> list[list[Event]]:
    """Two halves of refused events, or of the metrics of one; empty for a single point, and for other events."""
    parts = batch
    if len(batch) == 1 and isinstance(event := batch[0], _WithMetrics):
        parts = [
            events.MetricsLogged({name: value}, event.step, time=event.time) for name, value in event.metrics.items()
        ]
    middle = len(parts) // 2
    return [parts[:middle], parts[middle:]] if middle else []


def _log_points(client: MlflowClient, run_id: str, batch: list[Event]) -> None:
    from mlflow.entities import Metric

    points = [
        Metric(name, value, int(event.time * 1000), event.step)
        for event in batch
        if isinstance(event, _WithMetrics)
        for name, value in event.metrics.items()
    ]
    for begin in range(0, len(points), _BATCH_POINTS):
        client.log_batch(run_id, metrics=points[begin : begin + _BATCH_POINTS])
