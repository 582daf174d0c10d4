"""Run channel: events reach the log before `send` returns; stops, failures and lost ranks reach the other side."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

import motip.train.loop as loop
from motip import events
from motip.errors import MotipError
from motip.events import EventLog, Note, StepLogged
from motip.train import ray_train, run_channel
from motip.train.preemption import Stopped
from motip.train.ray_train import ResourcePlan, fit
from motip.train.run_channel import LocalChannel, RemoteChannel, RunChannel
from tests.train.test_resume import CLIPS, EPOCHS, _config, _job

PROBLEM = MotipError("the disk is full", where="/storage", fix="free some space")


def notes(folder: Path) -> list[str]:
    return [event.text for event in EventLog(folder) if isinstance(event, Note)]


def full(path: Path, lines: bytes) -> None:
    raise OSError(28, "No space left on device")


# -------------------------------------------------------------------------------------------------------- the channel


def test_event_is_on_disk_when_send_returns(tmp_path: Path) -> None:
    channel = RunChannel(str(tmp_path))
    assert channel.progress() == "no step was completed yet"
    channel.send(StepLogged(epoch=0, index=2, of=9, step=3, metrics={}))
    channel.send(Note("a"))
    assert notes(tmp_path) == ["a"]
    assert channel.progress() == "the last step that the workers reported was epoch 1, step 3/9"


def test_an_object_store_without_an_answer_does_not_hold_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, written = threading.Event(), list[bytes]()

    def late(log: EventLog) -> None:
        answers.wait(60)
        written.append(log._pending)
        log._pending = b""

    monkeypatch.setattr(EventLog, "_write", late)
    monkeypatch.setattr(run_channel, "_WRITE_S", 0.01)
    channel = RunChannel("s3://bucket/stage")
    for text in ("a", "b"):
        channel.send(Note(text))
    assert written == [], "both calls returned before the answer"
    answers.set()
    channel.close()
    assert [text for text in ("a", "b") if f'"{text}"'.encode() in b"".join(written)] == ["a", "b"]


def test_first_failure_is_kept_and_ends_later_attempts(tmp_path: Path) -> None:
    channel = RunChannel(str(tmp_path))
    assert channel.worker_started() and channel.failure() is None
    channel.report_failure(PROBLEM, "the traceback")
    channel.report_failure(MotipError("a consequence"), "")
    assert channel.failure() == (PROBLEM, "the traceback")
    assert not channel.worker_started()


def test_world_size_of_the_first_attempt_is_kept(tmp_path: Path) -> None:
    channel = RunChannel(str(tmp_path))
    assert [channel.initial_world_size(size) for size in (4, 2, 8)] == [4, 4, 4]


def test_failures_to_write_are_warnings_and_the_events_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = RunChannel(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(events, "_append", full)
        channel.send(Note("a"))
        with pytest.raises(MotipError, match="No space left"):
            channel.close()
    (warning,) = channel.warnings()
    assert "No space left" in warning and channel.warnings() == []
    channel.close()
    assert notes(tmp_path) == ["a"]


def test_storage_that_blocks_does_not_block_stop_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked, free = threading.Event(), threading.Event()

    def blocks(path: Path, lines: bytes) -> None:
        blocked.set()
        assert free.wait(30)

    monkeypatch.setattr(events, "_append", blocks)
    channel = RunChannel(str(tmp_path))
    sender = threading.Thread(target=channel.report_lost, args=(PROBLEM,))
    sender.start()
    assert blocked.wait(30)
    channel.request_stop()
    assert channel.stop_requested() and channel.lost() is PROBLEM
    assert channel.failure() is None and channel.warnings() == []
    channel.report_lost(MotipError("a consequence"))  # does not wait for the storage either
    assert channel.lost() is PROBLEM
    free.set()
    sender.join(30)


# ------------------------------------------------------------------------------------------------- in this process


def test_readers_of_a_training_in_this_process_read_each_event(tmp_path: Path) -> None:
    read: list[list[str]] = []
    channel = LocalChannel(str(tmp_path), lambda: read.append(notes(tmp_path)))
    channel.send(Note("a"))
    channel.send(Note("b"))
    assert read == [["a"], ["a", "b"]] and not channel.stop_requested()


def test_reader_stops_a_training_in_this_process(tmp_path: Path) -> None:
    def stop() -> None:
        raise Stopped

    channel = LocalChannel(str(tmp_path), stop)
    channel.send(Note("a"))
    assert channel.stop_requested() and notes(tmp_path) == ["a"]


@pytest.fixture
def _without_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {})


@pytest.mark.usefixtures("_without_validation")
def test_training_without_ray_writes_its_log_and_the_readers_read_all_of_it(tmp_path: Path) -> None:
    job, counts = _job(tmp_path, _config()), [0]

    def catch_up() -> None:
        counts.append(len(list(EventLog(tmp_path / "stage"))))

    result = fit(job, ResourcePlan(workers=0), str(tmp_path / "stage"), catch_up)
    assert sorted(result.epochs) == list(range(EPOCHS))
    assert counts[-1] == counts[-2] == EPOCHS * (CLIPS + 1), "one event per step and epoch; a reading after the last"
    fit(job, ResourcePlan(workers=0), str(tmp_path / "stage"), catch_up)
    assert counts[-1] == EPOCHS * (CLIPS + 1), "a finished stage is read too"


@pytest.mark.usefixtures("_without_validation")
def test_events_that_are_lost_on_a_full_disk_end_a_training_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = _job(tmp_path, _config())
    with monkeypatch.context() as patch, pytest.raises(MotipError, match="event log cannot be written"):
        patch.setattr(events, "_append", full)
        fit(job, ResourcePlan(workers=0), str(tmp_path / "stage"))
    assert len([line for line in caplog.messages if "cannot be written yet" in line]) == 1


def test_an_error_of_the_training_is_not_replaced_by_one_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "_append", full)
    with pytest.raises(ZeroDivisionError), ray_train._closed(RunChannel(str(tmp_path))) as channel:
        channel.send(Note("a"))
        raise ZeroDivisionError
    assert "the event log cannot be written" in caplog.text


# ------------------------------------------------------------------------------------------------------- through Ray


class Handle:
    """Handle of an actor whose calls all fail with an error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": lambda *_: self._error})


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> RemoteChannel:
    """A channel whose actor has died."""

    def get(answer: Exception, timeout: float | None = None) -> None:
        raise answer

    monkeypatch.setattr(ray, "get", get)
    return RemoteChannel(Handle(ray.exceptions.RayActorError()))


def test_remote_channel_is_serialisable(tmp_path: Path) -> None:
    again = copy.deepcopy(RemoteChannel("handle", 3.0))  # by the protocol of pickle
    assert vars(again) == {"_actor": "handle", "_timeout_s": 3.0}
    with pytest.raises(AttributeError):
        _ = again._something


def test_call_of_a_dead_actor_is_an_error_for_the_user(dead: RemoteChannel) -> None:
    with pytest.raises(MotipError, match="does not answer") as caught:
        dead.send(Note("a"))
    assert "send of the run channel" in str(caught.value.where) and "resumes" in str(caught.value.fix)


def test_error_of_the_actor_is_raised_as_it_is(dead: RemoteChannel) -> None:
    channel = RemoteChannel(Handle(ray.exceptions.RayTaskError("close", "a traceback", PROBLEM)))
    with pytest.raises(MotipError) as caught:
        channel.close()
    assert caught.value is PROBLEM


def test_failed_training_is_reported_without_the_channel_too(
    dead: RemoteChannel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    error = ray_train._training_error(dead, _job(tmp_path, _config()), str(tmp_path), RuntimeError("first\n  last \n"))
    assert error.what == "training of stage stage failed: last"
    assert (tmp_path / "failure.txt").read_text() == "first\n  last \n"
    assert "does not answer" in caplog.text
    channel = RunChannel(str(tmp_path))
    channel.report_lost(MotipError("rank 2 hangs", where="epoch 3", fix="look at it"))
    lost = ray_train._training_error(channel, _job(tmp_path, _config()), str(tmp_path), RuntimeError("x"))  # type: ignore[arg-type]
    assert (lost.what, lost.where) == ("rank 2 hangs", "epoch 3")
    assert "failure.txt" in str(lost.fix) and "look at it" in str(lost.fix)
    channel.report_failure(PROBLEM, "the traceback")
    assert ray_train._training_error(channel, _job(tmp_path, _config()), "", RuntimeError("x")) is PROBLEM  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- readers in the driver


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunChannel]:
    """Runs the readers' thread with a `catch_up` until it was called a number of times."""
    monkeypatch.setattr(ray_train, "READ_EVERY_S", 0.01)

    def run(catch_up: Callable[[], None], times: int = 5) -> RunChannel:
        channel, called = RunChannel(str(tmp_path)), threading.Semaphore(0)

        def counted() -> None:
            called.release()
            catch_up()

        with ray_train._ReaderThread(channel, counted):  # type: ignore[arg-type]
            for _ in range(times):
                assert called.acquire(timeout=60)
        return channel

    return run


def test_a_reader_that_fails_for_a_while_is_logged_once(read: Any, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def fails_three_times() -> None:
        calls.append(1)
        if len(calls) <= 3:
            raise OSError("away")

    with caplog.at_level(logging.ERROR):
        read(fails_three_times)
    assert len(calls) > 3
    assert len([line for line in caplog.messages if "cannot be read yet" in line]) == 1


def test_a_reader_that_fails_to_the_end_is_an_error(read: Any) -> None:
    def fails() -> None:
        raise OSError("away")

    with pytest.raises(OSError, match="away"):
        read(fails)


def test_a_reader_requests_a_stop(read: Any) -> None:
    def stop() -> None:
        raise Stopped

    assert read(stop).stop_requested()


def test_the_last_events_are_read(read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_train, "READ_EVERY_S", 60.0)
    found: list[list[str]] = []
    EventLog(tmp_path).send(Note("last"))
    read(lambda: found.append(notes(tmp_path)), times=0)
    assert found == [["last"]]
