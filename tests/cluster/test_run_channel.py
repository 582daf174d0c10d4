"""Run channel as an actor: another process writes to the log and finds the channel by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from motip.errors import MotipError
from motip.events import EventLog, Note
from motip.train.ray_train import request_stop
from motip.train.run_channel import RemoteChannel

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
