"""A rank that dies or stalls ends the wait of its peers and its own process; a slow rank does neither."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import motip.train.loop as loop
from motip.errors import MotipError
from motip.events import EventLog, Note
from motip.train.checkpoint_stores import FolderStore
from motip.train.collectives import SingleProcess, current_process_group
from motip.train.run_channel import Heartbeat, RunChannel
from motip.train.stage_job import StageJob
from motip.train.state import Run
from motip.train.watchdog import EXIT_STATUS, STDERR, StallTimer, Watchdog, WorkerLost
from tests.helpers.small_training import small_config
from tests.helpers.training_run import CallbackChannel, train_in_process
from tests.train.test_loop import SETTINGS, job_of, write_video

STATUS = "stage two, validation after epoch 3"


class FakeGroup(SingleProcess):
    """Process group and channel of this rank; `others` has the heartbeats of the other ranks."""

    def __init__(self, world_size: int = 2) -> None:
        self.world_size = world_size
        self.others: dict[int, Heartbeat] = {}
        self.sent: list[Heartbeat] = []
        self.polled = threading.Semaphore(0)
        self.collectives = 0

    def all_gather(self, value: Any) -> list[Any]:
        self.collectives += 1
        return [value, *(self.others[rank].status for rank in range(1, self.world_size))]

    def heartbeat(self, rank: int, heartbeat: Heartbeat) -> None:
        self.sent.append(heartbeat)

    def heartbeats(self) -> dict[int, Heartbeat]:
        self.polled.release()
        return dict(self.others)

    def watchdog(self, timeout_s: float = 60, progress_s: float = 0.2) -> Watchdog:
        return Watchdog(self, cast(RunChannel, self), timeout_s, progress_s)


def _hanging(group: FakeGroup) -> MotipError:
    comm = group.watchdog()
    with pytest.raises(WorkerLost) as lost:
        comm.all_gather("own")
    assert group.collectives == 0, "the collective itself would block"
    assert group.sent[-1].arrived == 1 and "in all_gather" not in group.sent[-1].code_line
    return lost.value.problem


def test_stalled_rank_ends_the_wait_of_its_peers() -> None:
    group = FakeGroup(3)
    group.others = {
        1: Heartbeat("stage two, after epoch 3", "motip/x.py:1 in x", arrived=1),
        2: Heartbeat(f"{STATUS}, ground/night frame 17 tracked", "motip/data/shards.py:88 in read_frames"),
    }
    problem = _hanging(group)
    assert "rank 2 of 3 has made no progress" in problem.what
    assert problem.where == f"{STATUS}, ground/night frame 17 tracked"
    assert "nothing since 2" in str(problem.found) and "motip/data/shards.py:88 in read_frames" in str(problem.found)
    assert "PROGRESS_TIMEOUT_S" in str(problem.expected) and "--set PROGRESS_TIMEOUT_S=" in str(problem.fix)


def test_rank_without_a_status_ends_the_wait() -> None:
    group = FakeGroup()
    assert _hanging(group).where == "no status received"


def test_slow_rank_with_progress_is_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ten times the limit, with progress every few polls; the waiting rank logs it repeatedly."""
    group, progress_s = FakeGroup(), 0.4
    comm = group.watchdog(0.5, progress_s)

    def track() -> None:
        for frame in range(40):
            group.others[1] = Heartbeat(f"{STATUS}, ground/night, frame {frame} tracked")
            for _ in range(5):  # a frame lasts five polls, a quarter of the limit
                group.polled.acquire(timeout=60)
        group.others[1] = Heartbeat("done", arrived=1)

    tracker = threading.Thread(target=track)
    tracker.start()
    with caplog.at_level(logging.WARNING, logger="motip.train.watchdog"):
        assert comm.all_gather("own") == ["own", "done"]
    tracker.join()
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) >= 2 and all(f"rank 1 ({STATUS}, ground/night, frame" in line for line in logged)


def test_suspended_process_is_not_counted_as_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("motip.train.watchdog.time.monotonic", lambda: now[0])
    timer = StallTimer(poll_s=2.0)
    seconds = []
    for passed, value in ((2, "a"), (2, "a"), (3600, "a"), (2, "a"), (2, "b"), (2, "b")):
        now[0] += passed
        seconds.append(timer.update(value))
    assert seconds == [0, 2, 6, 8, 0, 2]


# ------------------------------------------------------------------------------------ real ranks (gloo)


def _start(rank: int, directory: str, seconds: float) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{directory}/r", rank=rank, world_size=2, timeout=limit)


def _does_not_respond(rank: int, directory: str) -> None:
    _start(rank, directory, 4)
    comm = Watchdog(current_process_group(), CallbackChannel(directory, lambda event: None), 4, 1800)
    comm.status = lambda: "stage two, epoch 1, step 7/9, ground/video frames 1,2"
    comm.sum_(torch.ones(1))
    if rank == 1:
        time.sleep(12)
        os._exit(0)
    begin = time.monotonic()
    with pytest.raises(WorkerLost) as error:
        comm.sum_(torch.ones(1))
    Path(directory, "message").write_text(f"{time.monotonic() - begin:.1f}\n{error.value}")
    os._exit(0)  # the group is broken: destroying it would wait for the other rank


def test_unresponsive_rank_ends_the_wait_of_its_peer(tmp_path: Path) -> None:
    multiprocessing.spawn(_does_not_respond, args=(str(tmp_path),), nprocs=2)
    seconds, _, message = (tmp_path / "message").read_text().partition("\n")
    assert 3 < float(seconds) < 10
    assert "rank 0 of 2" in message and "epoch 1, step 7/9, ground/video frames 1,2" in message
    assert "COLLECTIVE_TIMEOUT_S" in message


def _slow_then_hangs(rank: int, directory: str) -> None:
    """Rank 1 is late but makes progress; the second time it hangs until the other rank has reported it."""
    _start(rank, directory, 120)
    # Rank 1 has a longer limit, so that the other rank ends the wait.
    channel = CallbackChannel(directory, lambda event: None)
    comm = Watchdog(current_process_group(120), channel, 120, progress_s=5 if rank == 0 else 40)
    frames, over = [0], Path(directory, "message")
    comm.status = lambda: f"{STATUS}, frame {frames[0]}"
    with comm.monitored():
        if rank == 1:
            for frames[0] in range(8):
                time.sleep(1)
        assert comm.all_gather(rank) == [0, 1]
        if rank == 1:
            while not over.exists():
                time.sleep(0.1)
            os._exit(0)
        with pytest.raises(WorkerLost) as error:
            comm.all_gather(rank)
        over.with_suffix(".new").write_text(str(error.value))
        over.with_suffix(".new").rename(over)
        os._exit(0)


def test_two_ranks_of_which_one_is_slow_and_then_hangs(tmp_path: Path) -> None:
    multiprocessing.spawn(_slow_then_hangs, args=(str(tmp_path),), nprocs=2)
    message = (tmp_path / "message").read_text()
    assert message.startswith("rank 1 of 2 has made no progress for 5 s")
    assert f"where:    {STATUS}, frame 7" in message


# --------------------------------------------------------------------------- a rank that hangs by itself


def _job(folder: Path) -> StageJob:
    config = small_config(**SETTINGS, EPOCHS=1, PROGRESS_TIMEOUT_S=2, LOG_EVERY_STEPS=1)
    return job_of(config, folder, [write_video(folder, "v")])


def _notes(folder: Path) -> list[str]:
    return [event.text for event in EventLog(folder) if isinstance(event, Note)]


def _train(folder: str, hang: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    job = _job(Path(folder))
    os.dup2(os.open(Path(folder, "stderr"), os.O_WRONLY | os.O_CREAT), STDERR)
    hang()
    train_in_process(job, Path(folder, "out"), lambda event: None)
    os._exit(1)  # not reached: the training hangs


def _the_evaluator_hangs() -> None:
    def track_videos(*_: Any, on_frame: Callable[[Any, int], None], **__: Any) -> None:
        on_frame(_Video(), 17)
        threading.Event().wait()

    loop.track_videos = track_videos  # type: ignore[assignment]


class _Video:
    source, video = "ground", "night"


def _the_storage_hangs() -> None:
    def folder(self: FolderStore, name: str) -> Path:
        threading.Event().wait()
        raise AssertionError(name)

    loop.validate = lambda run, epoch: {}
    FolderStore.folder = folder  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("hang", "where"),
    [
        (_the_evaluator_hangs, "stage stage, validation after epoch 1, ground/night, frame 17 tracked"),
        (_the_storage_hangs, "stage stage, after epoch 1"),
    ],
)
def test_process_that_hangs_alone_exits_and_reports_where(tmp_path: Path, hang: Callable[[], None], where: str) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_train, args=(str(tmp_path), hang))
    process.start()
    process.join(timeout=240)
    alive = process.is_alive()
    process.kill()
    assert not alive, "the process does not exit"
    assert process.exitcode == EXIT_STATUS
    (note,) = _notes(tmp_path / "out")
    assert "rank 0 of 1 has made no progress for 2 s" in note and f"where:    {where}" in note
    assert "tests/train" not in note and "it is at motip/train/" in note
    stacks = (tmp_path / "stderr").read_text()
    assert "Thread 0x" in stacks and "in train_stage_on_worker" in stacks


# ----------------------------------------------------------------------------- reports to the driver


def test_channel_keeps_the_first_lost_worker_report_of_an_attempt(tmp_path: Path) -> None:
    channel = RunChannel(str(tmp_path))
    assert channel.worker_started() and channel.lost() is None
    for rank in (0, 1):
        channel.report_lost(MotipError(f"rank 2 hangs, reported by rank {rank}"))
    assert _notes(tmp_path) == ["rank 2 hangs, reported by rank 0"]
    assert str(channel.lost()) == "rank 2 hangs, reported by rank 0"
    assert channel.worker_started() and channel.lost() is None, "a report of an earlier attempt"
    channel.report_lost(MotipError("again"))
    assert _notes(tmp_path) == ["rank 2 hangs, reported by rank 0", "again"]


def test_lost_rank_is_reported_and_ends_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = MotipError("rank 1 hangs")

    def validate(run: Run, epoch: int) -> dict[str, float]:
        raise WorkerLost(lost)

    monkeypatch.setattr(loop, "validate", validate)
    with pytest.raises(WorkerLost, match="rank 1 hangs"):
        train_in_process(_job(tmp_path), tmp_path / "out", lambda event: None)
    assert "rank 1 hangs" in _notes(tmp_path / "out")


def test_changing_the_timeouts_does_not_make_a_stage_stale() -> None:
    from motip.curriculum.stage_inputs import NON_IDENTITY_KEYS

    assert {"PROGRESS_TIMEOUT_S", "COLLECTIVE_TIMEOUT_S"} <= NON_IDENTITY_KEYS
