"""Run channel as an actor: another process writes to the log and finds the channel by its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import ray

from motip.errors import MotipError
from motip.events import EpochDone, EventLog, Note, StepLogged
from motip.train.preemption import Stopped
from motip.train.ray_train import ResourcePlan, fit, request_stop
from motip.train.run_channel import RemoteChannel
from tests.helpers.small_training import small_config
from tests.train.test_loop import SETTINGS, job_of, write_video

pytestmark = pytest.mark.cluster


@ray.remote(num_cpus=0)
def _work(channel: RemoteChannel, name: str) -> list[bool]:
    """A worker that records an event and requests a stop by the channel's name."""
    before = channel.stop_requested()
    channel.send(Note("from a worker"))
    request_stop("motip-no-such-training")
    request_stop(name)
    return [before, channel.stop_requested()]


@pytest.mark.usefixtures("local_ray")
def test_worker_reaches_the_log_and_stops_by_name(tmp_path: Path) -> None:
    name = "motip-training-1"
    for attempt in (1, 2):  # the name of an ended training is free again
        channel = RemoteChannel.start(str(tmp_path), name, 60.0)
        assert ray.get(_work.remote(channel.for_workers(), name)) == [False, True]
        assert [event.text for event in EventLog(tmp_path) if isinstance(event, Note)] == ["from a worker"] * attempt
        channel.report_failure(MotipError("the disk is full", where="/storage"), "traceback")
        error, text = channel.failure()
        assert (error.what, error.where, text) == ("the disk is full", "/storage", "traceback")
        channel.close()
        channel.stop_actor()
    with pytest.raises(MotipError, match="does not answer"):
        channel.lost()
    request_stop(name)


STEPS = 300


@pytest.mark.usefixtures("local_ray")
def test_training_on_ray_writes_its_log_stops_by_name_and_resumes(tmp_path: Path) -> None:
    # A training longer than the five seconds between two polls for a stop, and a short validation.
    config = small_config(**SETTINGS, EPOCHS=1, CLIPS_PER_EPOCH=2 * STEPS, LOG_EVERY_STEPS=1)
    val = write_video(tmp_path, "short")
    vars(val).update(frames=6, width=96, height=64, rows_per_group=8, identity=("ground", "val", "short"))
    job = job_of(config, tmp_path, [write_video(tmp_path, "long", frames=2 * STEPS + 10)])
    job = replace(job, val=(val,), protocols={"ground": "plain"})
    resources, folder, name = ResourcePlan(workers=2, cpus=0.5, decoders=0), tmp_path / "stage", "motip-training-2"
    log = EventLog(folder)

    def steps() -> list[int]:
        return [event.step for event in log if isinstance(event, StepLogged)]

    with pytest.raises(Stopped):
        fit(job, resources, str(folder), lambda: request_stop(name) if steps() else None, name)
    done = steps()
    assert done == list(range(1, len(done) + 1)) and len(done) < STEPS
    # The rest: no step is repeated or missing, and the readers have read everything.
    read: list[int] = []
    result = fit(job, resources, str(folder), lambda: read.append(sum(1 for _ in log)), name)
    assert sorted(result.checkpoints) == [0] and result.epochs[0]["HOTA"] >= 0
    assert steps() == list(range(1, STEPS + 1))
    assert [event.epoch for event in log if isinstance(event, EpochDone)] == [0]
    assert read[-1] == sum(1 for _ in log)
