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
from motip.config import Config
from motip.train import checkpoint_schedule, preemption, ray_train
from motip.train.batch_sources import LocalBatchSource
from motip.train.collectives import SingleProcess
from motip.train.preemption import SigtermForwarder, Stopped
from motip.train.ray_train import FolderReporter, RayReporter
from motip.train.retention import Retention
from motip.train.run_channel import RunChannel
from motip.train.temp_dirs import TempDirs
from motip.weights import load_checkpoint
from tests.train.test_resume import EPOCHS, Records, _config, _job


class Actor:
    """Object with the interface of a Ray actor handle; `ray.get` is patched to the identity."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": staticmethod(getattr(self._inner, name))})


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    return Actor(RunChannel())


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
        _wait_for(channel.stop_requested.remote)

    records = Records(7, terminate)
    reporter = FolderReporter(tmp_path / "out", records)
    reporter.stop_requested = RayReporter(channel, str(tmp_path), Retention()).stop_requested  # type: ignore[method-assign]
    # Workers train outside the main thread. Here they do not, so the driver's signal handler must stay installed.
    monkeypatch.setattr(preemption.StopRequest, "__enter__", lambda self: self)
    batch_source = LocalBatchSource(job, Config.from_dict(job.config))
    with ray_train._forward_sigterm(channel) as sigterm, pytest.raises(Stopped):
        loop.train_stage_on_worker(job, SingleProcess(), batch_source, reporter, torch.device("cpu"))
    assert sigterm.received and signal.getsignal(signal.SIGTERM) is before
    assert max(records.losses) == 8
    assert "SIGTERM): epoch 1, step 8 saved" in records.notes[-1] and "after the request" in records.notes[-1]
    latest = reporter.latest()
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
    assert channel.failure.remote() is None
    assert "position is saved" in channel.progress.remote()


def test_second_sigterm_ends_the_wait(channel: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), ray_train._forward_sigterm(channel):
        _sigterm()
        _wait_for(channel.stop_requested.remote)
        assert channel.stop_requested.remote()
        _sigterm()
        pytest.fail("the wait continues")
    assert signal.getsignal(signal.SIGTERM) is before
    assert channel.drain.remote() == []


def test_wait_ends_after_the_grace_period_and_reports_the_progress(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, channel: Any
) -> None:
    monkeypatch.setattr(preemption, "GRACE_PERIOD_S", 0.2)
    channel.put.remote("step", {"epoch": 1, "index": 6, "of": 14})
    with caplog.at_level(logging.ERROR), pytest.raises(Stopped), ray_train._forward_sigterm(channel):
        _sigterm()
        _wait_for(lambda: False)
    (text,) = [values["text"] for kind, values in channel.drain.remote() if kind == "note"]
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
    with SigtermForwarder(channel.request_stop.remote, lambda: timeouts.append("late")) as sigterm:
        _sigterm()
        _wait_for(channel.stop_requested.remote)
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
    left = RayReporter(None, str(stage), Retention()).folder("epoch_000")
    reporter = RayReporter(None, str(stage), Retention())
    assert reporter.latest() == stage / "step_00000004" / "checkpoint_step_4.pth"
    reporter.loaded()
    assert not left.exists() and list(tmp_path.iterdir()) == [stage]
    assert (stage / "step_00000004" / "checkpoint_step_4.pth").is_file()


def test_stage_trained_to_its_end_has_no_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {})
    records = Records()
    job = _job(tmp_path, _config())
    batch_source = LocalBatchSource(job, Config.from_dict(job.config))
    loop.train_stage_on_worker(
        job, SingleProcess(), batch_source, FolderReporter(tmp_path / "out", records), torch.device("cpu")
    )
    assert sorted(records.epochs) == list(range(EPOCHS)) and records.notes == []
