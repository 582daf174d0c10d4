"""Event log of a run: round trips, half and damaged lines, kills, full disks, objects of an object store."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import motip.events as events
from motip.errors import MotipError
from motip.events import (
    FILE,
    START,
    EpochDone,
    Event,
    EventLog,
    MetricsLogged,
    Note,
    Scored,
    StepLogged,
    TableWritten,
    TagsSet,
)
from motip.storage import retries
from motip.storage.paths import Location, files_under, location
from tests.helpers.object_store import ObjectStore


def texts(log: EventLog) -> list[str]:
    return [event.text for event in log if isinstance(event, Note)]


# ------------------------------------------------------------------------------------------------------- round trips

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "time": st.floats(0, 1e11),
    "int": st.integers(0, 2**53),
    "int | None": st.none() | st.integers(0, 2**53),
    "str": st.text(),
    "Metrics": st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=4),
    "dict[str, Any]": st.dictionaries(st.text(), _JSON, max_size=3),
    "dict[str, str]": st.dictionaries(st.text(), st.text(), max_size=3),
    "list[str]": st.lists(st.text(), max_size=3),
    "list[list[Any]]": st.lists(st.lists(_JSON, max_size=3), max_size=3),
}


def _events(kind: type[Event]) -> st.SearchStrategy[Event]:
    named = {each.name: str(each.type) for each in fields(kind) if each.name != "kind"}
    return st.builds(kind, **{name: _VALUES["time" if name == "time" else form] for name, form in named.items()})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of([_events(kind) for kind in get_args(Event)]), max_size=8), st.data())
def test_events_are_read_as_they_were_sent(
    tmp_path_factory: pytest.TempPathFactory, sent: list[Event], data: st.DataObject
) -> None:
    log = EventLog(tmp_path_factory.mktemp("run"))
    for event in sent:
        log.send(event)
    read = list(log.read())
    assert [event for event, _ in read] == sent
    # A reader that continues behind any event reads the rest.
    index = data.draw(st.integers(0, len(sent)))
    offset = START if index == 0 else read[index - 1][1]
    assert [event for event, _ in log.read(offset)] == sent[index:]


def test_every_kind_has_another_name() -> None:
    kinds = [next(each.default for each in fields(kind) if each.name == "kind") for kind in get_args(Event)]
    assert len(set(kinds)) == len(kinds)


def test_metrics_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.send(EpochDone(0, 3, {"loss": math.nan, "bound": math.inf}))
    (event,) = log
    assert isinstance(event, EpochDone) and math.isnan(event.metrics["loss"]) and event.metrics["bound"] == math.inf


def test_event_that_cannot_be_read_again_is_a_defect(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    with pytest.raises(ValueError, match="not a valid event"):
        log.send(EpochDone(0, 3, {"HOTA": None}))  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        log.send(Scored(0, 3, {"ground": object()}))
    log.send(Note("fine"))
    assert texts(log) == ["fine"]


def test_position_of_a_step() -> None:
    step = StepLogged(epoch=1, index=6, of=14, step=20, metrics={})
    assert step.position == "epoch 2, step 7/14" and step.done == 0.5


# ------------------------------------------------------------------------------------------------------ reading


def test_offsets_continue_behind_the_last_event(folder: Location) -> None:
    log = EventLog(folder)
    assert not log.exists() and list(log) == []
    log.send(Note("a"))
    ((_, offset),) = log.read()
    assert log.exists() and list(log.read(offset)) == []
    log.send(Note("b"))
    assert [event.text for event, _ in EventLog(folder).read(offset) if isinstance(event, Note)] == ["b"]
    assert texts(EventLog(folder)) == ["a", "b"], "a reader that starts again reads everything"


def test_half_a_line_is_ignored_by_readers_and_removed_by_the_next_writer(tmp_path: Path) -> None:
    EventLog(tmp_path).send(Note("whole"))
    whole = (tmp_path / FILE).read_bytes()
    half = json.dumps({"kind": "note", "text": "half", "time": 1.0}).encode()
    for cut in (1, 10, len(half)):  # the last is complete except for its line end
        (tmp_path / FILE).write_bytes(whole + half[:cut])
        log = EventLog(tmp_path)
        assert texts(log) == ["whole"]
        ((_, offset),) = log.read()
        log.send(Note("next"))
        assert texts(log) == ["whole", "next"]
        assert [event.text for event, _ in log.read(offset) if isinstance(event, Note)] == ["next"]
    (tmp_path / FILE).write_bytes(half[:9])  # of a log without a complete line
    EventLog(tmp_path).send(Note("first"))
    assert texts(EventLog(tmp_path)) == ["first"]


def test_damaged_lines_and_events_of_later_versions_are_skipped(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.send(Note("a"))
    with (tmp_path / FILE).open("ab") as stream:
        stream.write(b'\x00\xff\r{\n\n[1]\n{"kind": "of version 9"}\n{"kind": "note", "text": 5}\n{"kind": "note"}\n')
        stream.write(b'{"kind": "note", "text": "more", "time": 1.0, "field of a later version": 1}\n')
    log.send(Note("b"))
    assert texts(log) == ["a", "more", "b"]
    offsets = [offset for _, offset in log.read()]
    assert texts(EventLog(tmp_path)) == ["a", "more", "b"] and offsets == sorted(offsets)
    assert [event.text for event, _ in log.read(offsets[0]) if isinstance(event, Note)] == ["more", "b"]


def test_repeated_values_are_sent_once(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for tag in ("a", "a", "b", "b", "a"):
        log.send_changed(TagsSet({"name": tag}))
        log.send_changed(MetricsLogged({"HOTA": 1.0}, 0))
    assert [event.tags["name"] for event in log if isinstance(event, TagsSet)] == ["a", "b", "a"]
    assert sum(isinstance(event, MetricsLogged) for event in log) == 1
    log.send_changed(TableWritten("scores.json", ["video"], [["a"]]))
    log.send_changed(TableWritten("other.json", ["video"], [["a"]]))
    log.send_changed(TableWritten("scores.json", ["video"], [["a"]]))
    assert sum(isinstance(event, TableWritten) for event in log) == 2


# ---------------------------------------------------------------------------------------------------- kills and disks

_WRITER = """
import sys
from motip.events import EventLog, Note
from motip.storage.paths import location
log = EventLog(location(sys.argv[1]))
for number in range(int(sys.argv[2]), 10**6):
    log.send(Note(str(number) + 2000 * "."))
    print(number, flush=True)
"""


def test_a_writer_killed_at_a_random_moment_loses_no_sent_event(tmp_path: Path) -> None:
    sent = 0
    for _ in range(3):
        with Popen([sys.executable, "-c", _WRITER, str(tmp_path), str(sent)], stdout=PIPE, text=True) as writer:
            assert writer.stdout is not None
            sent = int(writer.stdout.readline()) + 1
            time.sleep(random.uniform(0.01, 0.2))
            writer.send_signal(signal.SIGKILL)
            sent = max([sent, *(int(line) + 1 for line in writer.stdout if line.endswith("\n"))])
        written = [int(text.rstrip(".")) for text in texts(EventLog(tmp_path))]
        assert written[:sent] == list(range(sent)) and len(written) <= sent + 1
        sent = len(written)


def test_concurrent_writers_of_one_file_mix_no_lines(tmp_path: Path) -> None:
    writers = [
        Popen([sys.executable, "-c", _WRITER, str(tmp_path), str(first)], stdout=PIPE, text=True)
        for first in (0, 10**5)
    ]
    for writer in writers:
        assert writer.stdout is not None
        while int(writer.stdout.readline()) % 10**5 < 30:
            pass
        writer.kill()
        writer.communicate()
    numbers = [int(text.rstrip(".")) for text in texts(EventLog(tmp_path))]
    assert set(range(31)) | set(range(10**5, 10**5 + 31)) <= set(numbers) and len(set(numbers)) == len(numbers)


@pytest.fixture
def limit_file_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Limits the size of files that this process writes, as a full disk does; -1: no limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size < 0 else size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "RETRY_AFTER", 0)


@pytest.mark.usefixtures("no_pauses")
def test_full_disk_keeps_events_until_there_is_space(tmp_path: Path, limit_file_size: Any) -> None:
    failures: list[str] = []
    log = EventLog(tmp_path, failures.append)
    log.send(Note("before"))
    size = (tmp_path / FILE).stat().st_size
    line = len(json.dumps({"kind": "note", **vars(Note("first " + 40 * "a"))}))
    limit_file_size(size + 50)
    log.send(Note("first " + 40 * "a"))
    assert (tmp_path / FILE).stat().st_size == size, "no half line"
    limit_file_size(size + line + 50)  # the first line fits, and half of the second
    log.send(Note("second"))
    assert (tmp_path / FILE).stat().st_size == size, "not the first of two lines either, which would be repeated"
    with pytest.raises(MotipError, match=r"(?s)event log cannot be written.*expected: free space") as caught:
        log.close()
    assert str(tmp_path) in str(caught.value)
    assert len(failures) == 1 and "cannot be written yet" in failures[0], "once for several failures in a row"
    limit_file_size(-1)
    log.send(Note("after"))
    assert [text.split()[0] for text in texts(EventLog(tmp_path))] == ["before", "first", "second", "after"]
    log.close()


@pytest.mark.usefixtures("no_pauses")
def test_write_interrupted_in_the_middle_repeats_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines are pending, and the disk is full after the first: neither stays, so the next attempt repeats none."""
    log = EventLog(tmp_path)
    real = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(events.os, "fsync", full)
    for text in ("a", "b"):
        log.send(Note(text))
    assert texts(EventLog(tmp_path)) == []
    monkeypatch.setattr(events.os, "fsync", real)
    log.close()
    assert texts(EventLog(tmp_path)) == ["a", "b"]


def test_slow_failing_storage_is_not_tried_with_every_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, attempts = [100.0], []

    def fails(path: Path, lines: bytes) -> None:
        attempts.append(now[0])
        now[0] += 60
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(events, "_append", fails)
    monkeypatch.setattr(events.clock, "monotonic", lambda: now[0])
    log = EventLog(tmp_path)
    for _ in range(601):
        log.send(Note("a"))
        now[0] += 1
    assert attempts == [100, 400, 700]


# ----------------------------------------------------------------------------------------------------- object store


def test_events_of_an_object_store_are_in_few_objects(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = location(f"{store.uri}/segments/run")
    monkeypatch.setattr(events, "SEGMENT_BYTES", 2000)
    log = EventLog(folder)
    for number in range(30):
        log.send(Note(str(number) + 100 * "."))
    assert 1 < len(files_under(folder)) < 10
    assert [int(text.rstrip(".")) for text in texts(EventLog(folder))] == list(range(30))
    offsets = [offset for _, offset in log.read()]
    assert offsets == sorted(offsets)
    assert len(list(log.read(offsets[11]))) == 18


def test_a_later_writer_continues_behind_all_objects(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one on a machine whose clock is behind."""
    folder = location(f"{store.uri}/later/run")
    EventLog(folder).send(Note("a"))
    ((_, offset),) = EventLog(folder).read()
    monkeypatch.setattr(events.clock, "time_ns", lambda: 5)
    EventLog(folder).send(Note("b"))
    assert [event.text for event, _ in EventLog(folder).read(offset) if isinstance(event, Note)] == ["b"]


@pytest.mark.usefixtures("no_pauses")
def test_unreachable_store_keeps_events_and_repeats_none(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries.with_retries, "__defaults__", (0.0, *retries.with_retries.__defaults__[1:]))  # type: ignore[index]
    folder, failures = location(f"{store.uri}/away/run"), []
    log = EventLog(folder, failures.append)
    store.fail("(PUT|POST) .*away", 1000)
    for text in ("a", "b"):
        log.send(Note(text))
    with pytest.raises(MotipError, match="S3 request failed"):
        log.close()
    store.failures.clear()
    assert len(failures) == 1
    log.close()
    log.send(Note("c"))
    assert texts(EventLog(folder)) == ["a", "b", "c"]


def test_answer_that_is_lost_after_the_object_was_written_repeats_no_event(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = location(f"{store.uri}/lost/run")
    log, real = EventLog(folder), events.write_bytes

    def lost(path: Location, data: bytes) -> None:
        real(path, data)
        raise MotipError("S3 request failed: the connection was lost")

    monkeypatch.setattr(events, "write_bytes", lost)
    log.send(Note("a"))
    monkeypatch.setattr(events, "write_bytes", real)
    log.close()
    assert texts(EventLog(folder)) == ["a"]
