"""SIGTERM to the driver of a training on Ray: it is forwarded to the workers, which save, end and are not restarted."""

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
from motip.events import EventLog, Note, StepLogged
from motip.stage_folder import StageFolder
from motip.train import checkpoint_schedule, preemption, ray_train
from motip.train.preemption import SigtermForwarder, Stopped
from motip.train.ray_train import RayStore
from motip.train.retention import Retention
from motip.train.run_channel import RemoteChannel, RunChannel
from motip.train.temp_dirs import TempDirs
from motip.weights import load_checkpoint
from tests.helpers.training_run import CallbackChannel, train_in_process
from tests.train.test_resume import EPOCHS, Records, _config, _job, _newest


class Actor:
    """Object with the interface of a Ray actor handle; `ray.get` is patched to the identity."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": staticmethod(getattr(self._inner, name))})


@pytest.fixture
def channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ray, "get", lambda answer, timeout=None: answer)
    return RemoteChannel(Actor(RunChannel(str(tmp_path / "channel"))))


@pytest.fixture
def notes(tmp_path: Path) -> Callable[[], list[str]]:
    """The notes that the channel recorded."""
    return lambda: [event.text for event in EventLog(tmp_path / "channel") if isinstance(event, Note)]


def _sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_sigterm_of_the_driver_stops_training_at_a_saved_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channel: Any
) -> None:
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {})
    monkeypatch.setattr(checkpoint_schedule, "POLL_INTERVAL_S", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    job = _job(tmp_path, _config())

    def terminate() -> None:
        _sigterm()
        _wait_for(channel.stop_requested)

    records = Records(7, terminate)
    local = CallbackChannel(tmp_path / "out", records)
    local.stop_requested = channel.stop_requested  # type: ignore[method-assign]
    # Workers train outside the main thread. Here they do not, so the driver's signal handler must stay installed.
    monkeypatch.setattr(preemption.StopRequest, "__enter__", lambda self: self)
    with ray_train._forward_sigterm(channel) as sigterm, pytest.raises(Stopped):
        train_in_process(job, tmp_path / "out", records, channel=local)
    assert sigterm.received and signal.getsignal(signal.SIGTERM) is before
    assert max(records.losses) == 8
    assert "SIGTERM): epoch 1, step 8 saved" in records.notes[-1] and "after the request" in records.notes[-1]
    latest = _newest(tmp_path / "out")
    assert latest is not None and load_checkpoint(latest)["position"]["step"] == 8


def test_stop_is_not_a_failure_that_ray_would_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channel: Any
) -> None:
    def stopped(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(ray_train, "train_stage_on_worker", stopped)
    monkeypatch.setattr(ray_train, "_worker_device", lambda _: torch.device("cpu"))
    resources = ray_train.ResourcePlan(workers=1)
    job = _job(tmp_path, _config())
    ray_train._worker_main({"job": job, "resources": resources, "channel": channel, "folder": str(tmp_path)})
    assert channel.failure() is None
    assert "position is saved" in channel.progress()


def test_second_sigterm_ends_the_wait(channel: Any, notes: Callable[[], list[str]]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), ray_train._forward_sigterm(channel):
        _sigterm()
        _wait_for(channel.stop_requested)
        assert channel.stop_requested()
        _sigterm()
        pytest.fail("the wait continues")
    assert signal.getsignal(signal.SIGTERM) is before
    assert notes() == []


def test_wait_ends_after_the_grace_period_and_reports_the_progress(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, channel: Any, notes: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(preemption, "GRACE_PERIOD_S", 0.2)
    channel.send(StepLogged(epoch=1, index=6, of=14, step=7, metrics={}))
    with caplog.at_level(logging.ERROR), pytest.raises(Stopped), ray_train._forward_sigterm(channel):
        _sigterm()
        _wait_for(lambda: False)
    (text,) = notes()
    assert "epoch 2, step 7/14" in text and "did not end" in text
    assert text in caplog.text


def test_wait_ends_if_the_workers_are_unreachable(caplog: pytest.LogCaptureFixture) -> None:
    def gone() -> None:
        raise ConnectionError("the channel is gone")

    with caplog.at_level(logging.ERROR), pytest.raises(Stopped), SigtermForwarder(gone, gone):
        _sigterm()
        _wait_for(lambda: False)
    assert "the channel is gone" in caplog.text


def test_wait_that_ends_in_time_leaves_no_thread(monkeypatch: pytest.MonkeyPatch, channel: Any) -> None:
    timeouts: list[str] = []
    with SigtermForwarder(channel.request_stop, lambda: timeouts.append("late")) as sigterm:
        _sigterm()
        _wait_for(channel.stop_requested)
    assert sigterm.received
    _wait_for(lambda: all(thread.name != "motip-stop" for thread in threading.enumerate()))
    assert all(thread.name != "motip-stop" for thread in threading.enumerate()) and timeouts == []


def test_temporary_directories_are_removed_after_use_or_by_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed, other = TempDirs("s3://bucket/stage"), TempDirs("s3://bucket/other")
    for name in ("resume", "step_00000004", "epoch_000"):
        (killed.new(name) / "weights.pth").write_bytes(b"left behind")
    kept = other.new("resume")
    again = TempDirs("s3://bucket/stage")
    again.remove_stale()
    assert kept.is_dir() and list(tmp_path.iterdir()) == [other.parent], "only those of the run"
    resumed, uploading = again.new("resume"), again.new("step_00000008", keep=True)
    again.clear()
    assert not resumed.exists() and uploading.is_dir(), "it is still being uploaded"
    uploading.rmdir()
    again.clear()
    other.clear()
    assert list(tmp_path.iterdir()) == []


def _ray_store(stage: Path) -> RayStore:
    return RayStore(RunChannel(str(stage)), StageFolder(stage), Retention())


def test_local_checkpoint_is_resumed_in_place_and_a_restart_removes_stale_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda data: data)
    context = type("Context", (), {"get_local_rank": lambda self: 0, "get_world_rank": lambda self: 0})
    monkeypatch.setattr(ray.train, "get_context", context)
    stage = tmp_path / "stage"
    (stage / "step_00000004").mkdir(parents=True)
    (stage / "step_00000004" / "checkpoint_step_4.pth").write_bytes(b"whole")
    left = _ray_store(stage).folder("epoch_000")
    with _ray_store(stage).newest() as newest:
        assert newest == stage / "step_00000004" / "checkpoint_step_4.pth"
    assert not left.exists() and list(tmp_path.iterdir()) == [stage]
    assert (stage / "step_00000004" / "checkpoint_step_4.pth").is_file()


def test_stage_trained_to_its_end_has_no_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {})
    records = Records()
    job = _job(tmp_path, _config())
    train_in_process(job, tmp_path / "out", records)
    assert sorted(records.epochs) == list(range(EPOCHS)) and records.notes == []
