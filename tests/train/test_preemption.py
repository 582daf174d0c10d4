"""SIGTERM where a training on Ray was started: the workers are asked, waited for, and not started again."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train.collective
import torch

import motip.train.loop as loop
from motip.config import Config
from motip.train import checkpoints, preemption, ray_train
from motip.train.batch_sources import LocalFeed
from motip.train.collectives import SingleProcess
from motip.train.preemption import PassedOn, Stopped
from motip.train.ray_train import FolderReporter, RayReporter
from motip.train.retention import Retention
from motip.train.run_channel import Mailbox
from motip.train.stage_job import StageJob
from motip.train.temp_dirs import Scratch
from motip.weights.pretrained import load_checkpoint
from tests.train.test_resume import EPOCHS, Records, _config, _job


class Actor:
    """An object that is spoken to as Ray's actors are; `ray.get` gives back what it is given."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": staticmethod(getattr(self._inner, name))})


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    return Actor(Mailbox())


def _sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_drivers_sigterm_stops_the_training_at_a_saved_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mailbox: Any
) -> None:
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {})
    monkeypatch.setattr(checkpoints, "LOOK_EVERY_S", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    job = _job(tmp_path, _config())

    def terminate() -> None:
        _sigterm()
        _wait_for(mailbox.stop_asked.remote)

    records = Records(7, terminate)
    reporter = FolderReporter(tmp_path / "out", records)
    reporter.asked_to_stop = RayReporter(mailbox, str(tmp_path), Retention()).asked_to_stop  # type: ignore[method-assign]
    # The workers' training is no main thread's; here it is, so the driver's handler is put back around it.
    monkeypatch.setattr(loop.Notice, "__enter__", lambda self: self)
    feed = LocalFeed(job, Config.from_dict(job.config))
    with ray_train._passing_on(mailbox) as sigterm, pytest.raises(Stopped):
        loop.run_stage(job, SingleProcess(), feed, reporter, torch.device("cpu"))
    assert sigterm.given and signal.getsignal(signal.SIGTERM) is before
    assert max(records.losses) == 8
    assert "SIGTERM): epoch 1, step 8 saved" in records.notes[-1] and "notice was heard" in records.notes[-1]
    latest = reporter.latest()
    assert latest is not None and load_checkpoint(latest)["position"]["step"] == 8


def test_a_stop_is_no_failure_that_ray_would_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mailbox: Any
) -> None:
    def stopped(job: StageJob, *rest: Any) -> None:
        raise Stopped

    monkeypatch.setattr(ray_train, "_train", stopped)
    ray_train._worker({"job": None, "placement": None, "mailbox": mailbox, "folder": str(tmp_path)})
    assert mailbox.failure.remote() is None
    assert "position is saved" in mailbox.reached.remote()


def test_a_second_sigterm_ends_the_wait_at_once(mailbox: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), ray_train._passing_on(mailbox):
        _sigterm()
        _wait_for(mailbox.stop_asked.remote)
        assert mailbox.stop_asked.remote()
        _sigterm()
        pytest.fail("the wait goes on")
    assert signal.getsignal(signal.SIGTERM) is before
    assert mailbox.drain.remote() == []


def test_where_the_workers_do_not_end_in_time_the_wait_does_and_says_how_far_they_were(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mailbox: Any
) -> None:
    monkeypatch.setattr(preemption, "GRACE_S", 0.2)
    mailbox.put.remote("step", {"epoch": 1, "index": 6, "of": 14})
    with caplog.at_level(logging.ERROR), pytest.raises(Stopped), ray_train._passing_on(mailbox):
        _sigterm()
        _wait_for(lambda: False)
    (text,) = [values["text"] for kind, values in mailbox.drain.remote() if kind == "note"]
    assert "epoch 2, step 7/14" in text and "did not end" in text
    assert text in caplog.text


def test_where_the_workers_cannot_be_asked_the_wait_ends(caplog: pytest.LogCaptureFixture) -> None:
    def gone() -> None:
        raise ConnectionError("the mailbox is gone")

    with caplog.at_level(logging.ERROR), pytest.raises(Stopped), PassedOn(gone, gone):
        _sigterm()
        _wait_for(lambda: False)
    assert "the mailbox is gone" in caplog.text


def test_a_wait_that_ends_in_time_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, mailbox: Any) -> None:
    said: list[str] = []
    with PassedOn(mailbox.stop.remote, lambda: said.append("late")) as sigterm:
        _sigterm()
        _wait_for(mailbox.stop_asked.remote)
    assert sigterm.given
    _wait_for(lambda: all(thread.name != "motip-stop" for thread in threading.enumerate()))
    assert all(thread.name != "motip-stop" for thread in threading.enumerate()) and said == []


def test_scratch_folders_end_with_their_use_or_with_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed, other = Scratch("s3://bucket/stage"), Scratch("s3://bucket/other")
    for name in ("resume", "step_00000004", "epoch_000"):
        (killed.new(name) / "weights.pth").write_bytes(b"left behind")
    kept = other.new("resume")
    again = Scratch("s3://bucket/stage")
    again.sweep()
    assert kept.is_dir() and list(tmp_path.iterdir()) == [other.parent], "only the run's own"
    resumed, uploading = again.new("resume"), again.new("step_00000008", given_away=True)
    again.clear()
    assert not resumed.exists() and uploading.is_dir(), "it is still on its way"
    uploading.rmdir()
    again.clear()
    other.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_local_checkpoint_is_resumed_where_it_lies_and_a_restart_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda data: data)
    context = type("Context", (), {"get_local_rank": lambda self: 0, "get_world_rank": lambda self: 0})
    monkeypatch.setattr(ray.train, "get_context", context)
    stage = tmp_path / "stage"
    (stage / "step_00000004").mkdir(parents=True)
    (stage / "step_00000004" / "checkpoint_step_4.pth").write_bytes(b"whole")
    left = RayReporter(None, str(stage), Retention()).folder("epoch_000")
    reporter = RayReporter(None, str(stage), Retention())
    assert reporter.latest() == stage / "step_00000004" / "checkpoint_step_4.pth"
    reporter.loaded()
    assert not left.exists() and list(tmp_path.iterdir()) == [stage]
    assert (stage / "step_00000004" / "checkpoint_step_4.pth").is_file()


def test_a_stage_trained_to_its_end_has_no_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {})
    records = Records()
    job = _job(tmp_path, _config())
    feed = LocalFeed(job, Config.from_dict(job.config))
    loop.run_stage(job, SingleProcess(), feed, FolderReporter(tmp_path / "out", records), torch.device("cpu"))
    assert sorted(records.epochs) == list(range(EPOCHS)) and records.notes == []
