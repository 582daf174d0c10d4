"""Event log of a run: typed events, appended as whole lines to the run's folder.

A run is a stage, a trial, a sweep or a curriculum. The log is the only record of what happened; MLflow, progress line,
dashboard, notes and sweep scheduler are readers with an offset. A reader that starts again from zero gives the same
result, because every event carries its time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time as clock
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from motip.errors import MotipError
from motip.storage.paths import Location, create_folder, files_under, write_bytes
from motip.storage.redaction import redact

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Timed:
    time: float = field(default_factory=clock.time)
    """Seconds since 1970."""


@dataclass(frozen=True)
class StepLogged(_Timed):
    """Means of the steps since the last event: 0-based `epoch` and batch `index` of `of`, and the optimiser `step`."""

    epoch: int
    index: int
    of: int
    step: int
    metrics: Metrics
    kind: Literal["step"] = "step"

    @property
    def done(self) -> float:
        """Fraction of the epoch that is done, in (0, 1]."""
        return (self.index + 1) / self.of

    @property
    def position(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.index + 1}/{self.of}"


@dataclass(frozen=True)
class EpochDone(_Timed):
    """Means and scores of a 0-based epoch."""

    epoch: int
    step: int
    metrics: Metrics
    kind: Literal["epoch"] = "epoch"


@dataclass(frozen=True)
class Scored(_Timed):
    """Validation scores of an epoch: source -> scores as JSON."""

    epoch: int
    step: int
    scores: dict[str, Any]
    kind: Literal["scores"] = "scores"


@dataclass(frozen=True)
class WeightsTransferred(_Timed):
    """Report of the initial weights, tensor by tensor."""

    report: dict[str, Any]
    kind: Literal["transfer"] = "transfer"


@dataclass(frozen=True)
class Note(_Timed):
    """A line of text for the run's history."""

    text: str
    step: int | None = None
    kind: Literal["note"] = "note"


@dataclass(frozen=True)
class Resumed(_Timed):
    """Start of a further attempt by another driver process."""

    driver: str
    kind: Literal["resumed"] = "resumed"


@dataclass(frozen=True)
class Imported(_Timed):
    """The events before this one come from files of version 0.1, which recorded them in MLflow itself."""

    kind: Literal["imported"] = "imported"


@dataclass(frozen=True)
class MetricsLogged(_Timed):
    """Metrics outside the steps and epochs of a training."""

    metrics: Metrics
    step: int
    kind: Literal["metrics"] = "metrics"


@dataclass(frozen=True)
class TagsSet(_Timed):
    """Tags of the run."""

    tags: dict[str, str]
    kind: Literal["tags"] = "tags"


@dataclass(frozen=True)
class TextWritten(_Timed):
    """A text artifact, content included; `path` is its name among the run's artifacts."""

    path: str
    text: str
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class TableWritten(_Timed):
    """A table artifact: `path` ends in .json."""

    path: str
    header: list[str]
    rows: list[list[Any]]
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class ArtifactWritten(_Timed):
    """A file artifact: the address `file`, relative to the run's folder if it lies in it, attached as `path`."""

    file: str
    path: str
    kind: Literal["artifact"] = "artifact"


@dataclass(frozen=True)
class CheckpointChosen(_Timed):
    """The best checkpoint of a stage: its address, hex sha256 and optimiser step."""

    uri: str
    sha256: str
    step: int
    kind: Literal["checkpoint"] = "checkpoint"


@dataclass(frozen=True)
class Ended(_Timed):
    """End of an attempt: FINISHED, FAILED or KILLED."""

    status: str
    kind: Literal["ended"] = "ended"


Event = (
    StepLogged
    | EpochDone
    | Scored
    | WeightsTransferred
    | Note
    | Resumed
    | Imported
    | MetricsLogged
    | TagsSet
    | TextWritten
    | TableWritten
    | ArtifactWritten
    | CheckpointChosen
    | Ended
)
_EVENTS: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])

Offset = tuple[str, int]
"""Position in a log: file name and bytes read of it. Later files have greater names."""
START: Offset = ("", 0)

FILE = "events.jsonl"
_SEGMENTS = "events"
"""Folder of the log's files on an object store, whose objects cannot be appended to."""
SEGMENT_BYTES = 256 << 10
"""Size from which on an object store the next event begins a new object."""
RETRY_AFTER = 4
"""Pause after a failed attempt to write, as a multiple of its duration."""


class EventLog:
    """The append-only log in a run's folder: ``events.jsonl``; on an object store ``events/<time>-<id>.jsonl``.

    Any process may write and read at any time; on an object store one process writes at a time. Secrets in addresses
    and under the names of secrets are replaced before an event is written. An event that cannot be written is kept and
    written with a later one. After a failure no attempt is made for several times its duration, so that a storage that
    answers late does not stop the writer.

    Args:
        on_failure: called with a line at the first of several failures in a row.
    """

    def __init__(self, folder: Location, on_failure: Callable[[str], None] = lambda text: None) -> None:
        self.folder = folder
        self._on_failure = on_failure
        self._pending = b""
        self._segment: tuple[Location, bytes] | None = None
        self._lock = threading.Lock()
        self._retry_at = 0.0  # 0: the last attempt did not fail
        self._indexed = START
        self._last: dict[tuple[Any, ...], dict[str, Any]] = {}  # subject -> values of the last event, up to _indexed

    def send(self, event: Event) -> None:
        """Append an event; it is in the storage on return, unless the storage fails, which `close` raises.

        Raises:
            TypeError, ValueError: the event has a value that cannot be read again, a defect of the program.
        """
        line = _line(event)
        with self._lock:
            self._pending += line
            begin = clock.monotonic()
            if begin < self._retry_at:
                return
            try:
                self._write()
            except (MotipError, OSError) as error:
                if not self._retry_at:
                    self._on_failure(f"the event log cannot be written yet: {str(error).splitlines()[0]}")
                self._retry_at = clock.monotonic() + RETRY_AFTER * (clock.monotonic() - begin)

    def send_changed(self, event: Event) -> None:
        """Append an event unless the last one of the same subject has the same values."""
        for each, offset in self.read(self._indexed):
            self._last[_subject(each)], self._indexed = _values(each), offset
        # As text, because NaN differs from itself.
        if _text(self._last.get(_subject(event))) != _text(redact(_values(event))):
            self.send(event)

    def create(self, events: Iterable[Event]) -> None:
        """Write a log that does not exist yet, completely or not at all."""
        path = self.folder / FILE if isinstance(self.folder, Path) else self._new_segment()
        write_bytes(path, b"".join(map(_line, events)))

    def close(self) -> None:
        """Write what could not be written before; on an object store a later event begins a new object.

        Raises:
            MotipError: it cannot be written now either.
        """
        with self._lock:
            try:
                self._write()
                self._segment = None
            except OSError as error:
                raise MotipError(
                    f"the event log cannot be written: {error.strerror or error}",
                    where=self.folder,
                    expected="free space and write permission",
                    fix="free some space, then run the same command again: it resumes",
                ) from error

    def read(self, offset: Offset = START) -> Iterator[tuple[Event, Offset]]:
        """Events after an offset, each with the offset behind it.

        An incomplete last line is left for a later call. Lines that are not an event of this version are skipped.
        """
        for name, path in self._files():
            if name < offset[0]:
                continue
            position = offset[1] if name == offset[0] else 0
            for line in _complete_lines(path, position):
                position += len(line)
                event = _parse(line)
                if event is not None:
                    yield event, (name, position)

    def __iter__(self) -> Iterator[Event]:
        return (event for event, _ in self.read())

    def exists(self) -> bool:
        return bool(self._files())

    def _files(self) -> list[tuple[str, Location]]:
        if isinstance(self.folder, Path):
            path = self.folder / FILE
            return [(FILE, path)] if path.is_file() else []
        return sorted((path.name, path) for path in files_under(self.folder / _SEGMENTS))

    def _write(self) -> None:
        if not self._pending:
            return
        if isinstance(self.folder, Path):
            create_folder(self.folder)
            _append(self.folder / FILE, self._pending)
        else:
            # Kept after a failure too: the object may have been written, and only the answer lost.
            path, written = self._segment = self._segment or (self._new_segment(), b"")
            content = written + self._pending
            write_bytes(path, content)
            self._segment = None if len(content) >= SEGMENT_BYTES else (path, content)
        self._pending, self._retry_at = b"", 0.0

    def _new_segment(self) -> Location:
        """An object whose name is greater than all others, also if this machine's clock is behind."""
        newest = max((int(name.partition("-")[0]) for name, _ in self._files()), default=0)
        return self.folder / _SEGMENTS / f"{max(clock.time_ns(), newest + 1):020d}-{uuid.uuid4().hex[:8]}.jsonl"


def _append(path: Path, lines: bytes) -> None:
    """Append complete lines; a half line left by a killed process is removed first."""
    # Unbuffered: after a failure nothing is left that a later flush would write again.
    with path.open("ab+", buffering=0) as stream:
        with contextlib.suppress(OSError):  # some network mounts have no locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(size - 1)
            if stream.read(1) != b"\n":
                stream.seek(0)
                size = stream.readall().rfind(b"\n") + 1
                stream.truncate(size)
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[stream.write(rest) or 0 :]
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(size)  # of a full disk: nothing of it, rather than half
            raise


def _complete_lines(path: Location, position: int) -> list[bytes]:
    if isinstance(path, Path):
        with path.open("rb") as stream:
            stream.seek(position)
            content = stream.read()
    else:
        content = path.read_bytes()[position:]
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def _line(event: Event) -> bytes:
    line = json.dumps(redact({"kind": event.kind, **vars(event)})).encode() + b"\n"
    if _parse(line) is None:
        raise ValueError(f"not a valid event: {event}")
    return line


def _parse(line: bytes) -> Event | None:
    try:
        return _EVENTS.validate_json(line)
    except ValidationError:
        return None


def _values(event: Event) -> dict[str, Any]:
    return {name: value for name, value in vars(event).items() if name != "time"}


def _subject(event: Event) -> tuple[Any, ...]:
    """What an event replaces: the state of the run, a point of metrics, tags, the best checkpoint, or an artifact."""
    match event:
        case Resumed() | Ended():
            return ("state",)
        case MetricsLogged():
            return event.kind, event.step, *sorted(event.metrics)
        case TagsSet():
            return event.kind, *sorted(event.tags)
        case TextWritten() | TableWritten() | ArtifactWritten():
            return event.kind, event.path
        case _:
            return (event.kind,)


def notes_text(events: Iterable[Event]) -> str:
    """The notes among events, one line each: UTC time, optimiser step if it has one, text."""
    lines = []
    for event in events:
        if isinstance(event, Note):
            when = datetime.fromtimestamp(event.time, UTC).isoformat(timespec="seconds")
            step = "" if event.step is None else f" step {event.step}"
            lines.append(f"{when}{step}: {' '.join(event.text.split())}\n")
    return "".join(lines)


def _text(values: Any) -> str:
    return json.dumps(values, sort_keys=True)
