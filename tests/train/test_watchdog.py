"""A rank that dies or hangs ends the wait of the others and itself; one that is only slow does neither."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import motip.train.loop as loop
from motip.config import Config
from motip.errors import MotipError
from motip.train.batch_sources import LocalFeed
from motip.train.collectives import SingleProcess, current_communicator
from motip.train.ray_train import FolderReporter
from motip.train.run_channel import Mailbox
from motip.train.watchdog import EXIT_STATUS, Standing, Stillness, Watched, WorkerLost
from tests.helpers.small_training import small_config
from tests.train.test_loop import SETTINGS, job_of, write_video

PLACE = "stage two, validation after epoch 3"


class Board(SingleProcess):
    """This rank of several; `others` holds what the rest have posted."""

    def __init__(self, world_size: int = 2) -> None:
        self.world_size = world_size
        self.others: dict[int, Standing] = {}
        self.heard = threading.Semaphore(0)
        self.gathered = 0

    def gather(self, value: Any) -> list[Any]:
        self.gathered += 1
        return [value, *(self.others[rank].where for rank in range(1, self.world_size))]

    def read(self, rank: int) -> str:
        self.heard.release()
        return json.dumps(asdict(self.others[rank])) if rank in self.others else ""


def _hanging(board: Board, comm: Watched) -> MotipError:
    with pytest.raises(WorkerLost) as lost:
        comm.gather("own")
    assert board.gathered == 0, "the collective itself would wait for ever"
    return lost.value.problem


def test_a_rank_that_stands_still_ends_the_wait_of_the_others() -> None:
    board = Board(3)
    board.others = {
        1: Standing("stage two, after epoch 3", "motip/x.py:1 in x", arrived=1),
        2: Standing(f"{PLACE}, ground/night frame 17 tracked", "motip/data/shards.py:88 in read_frames"),
    }
    problem = _hanging(board, Watched(board, timeout_s=60, progress_s=0.2))
    assert "rank 2 of 3 has made no progress" in problem.what
    assert problem.where == f"{PLACE}, ground/night frame 17 tracked"
    assert "nothing since 2" in str(problem.found) and "motip/data/shards.py:88 in read_frames" in str(problem.found)
    assert "PROGRESS_TIMEOUT_S" in str(problem.expected) and "--set PROGRESS_TIMEOUT_S=" in str(problem.fix)


def test_a_rank_that_was_never_heard_of_ends_it_too() -> None:
    board = Board()
    assert _hanging(board, Watched(board, timeout_s=60, progress_s=0.2)).where == "it has not been heard of"


def test_a_rank_that_tracks_frame_after_frame_is_waited_for_however_long_it_takes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ten times the limit, with a sign of life every few looks; who waits names it again and again."""
    board, progress_s = Board(), 0.4
    comm = Watched(board, timeout_s=0.5, progress_s=progress_s)

    def track() -> None:
        for frame in range(40):
            board.others[1] = Standing(f"{PLACE}, ground/night, frame {frame} tracked")
            for _ in range(5):  # a frame lasts five looks, a quarter of the limit
                board.heard.acquire(timeout=60)
        board.others[1] = Standing("done", arrived=1)

    tracker = threading.Thread(target=track)
    tracker.start()
    with caplog.at_level(logging.WARNING, logger="motip.train.watchdog"):
        assert comm.gather("own") == ["own", "done"]
    tracker.join()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) >= 2 and all(f"rank 1 ({PLACE}, ground/night, frame" in line for line in said)


def test_time_in_which_the_process_itself_was_stopped_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("motip.train.watchdog.time.monotonic", lambda: now[0])
    still = Stillness(look_s=2.0)
    seen = []
    for passed, value in ((2, "a"), (2, "a"), (3600, "a"), (2, "a"), (2, "b"), (2, "b")):
        now[0] += passed
        seen.append(still.see(value))
    assert seen == [0, 2, 6, 8, 0, 2]


# ------------------------------------------------------------------------------------ real ranks (gloo)


def _start(rank: int, directory: str, seconds: float) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{directory}/r", rank=rank, world_size=2, timeout=limit)


def _does_not_answer(rank: int, directory: str) -> None:
    _start(rank, directory, 4)
    comm = Watched(current_communicator(), 4)
    comm.where = lambda: "stage two, epoch 1, step 7/9, ground/video frames 1,2"
    comm.sum_(torch.ones(1))
    if rank == 1:
        time.sleep(12)
        os._exit(0)
    begin = time.monotonic()
    with pytest.raises(WorkerLost) as told:
        comm.sum_(torch.ones(1))
    Path(directory, "said").write_text(f"{time.monotonic() - begin:.1f}\n{told.value}")
    os._exit(0)  # the group is broken: taking it down in order would wait for the other rank


def test_a_rank_that_does_not_answer_ends_the_wait_of_the_other(tmp_path: Path) -> None:
    multiprocessing.spawn(_does_not_answer, args=(str(tmp_path),), nprocs=2)
    seconds, _, message = (tmp_path / "said").read_text().partition("\n")
    assert 3 < float(seconds) < 10
    assert "rank 0 of 2" in message and "epoch 1, step 7/9, ground/video frames 1,2" in message
    assert "COLLECTIVE_TIMEOUT_S" in message


def _slow_then_hangs(rank: int, directory: str) -> None:
    """Rank 1 comes late, at work all the while; the second time it hangs until the other has said so."""
    _start(rank, directory, 120)
    # Rank 1 is patient with itself, so that it is the other who ends the wait.
    comm = Watched(current_communicator(120), 120, progress_s=5 if rank == 0 else 40)
    frames, over = [0], Path(directory, "said")
    comm.where = lambda: f"{PLACE}, frame {frames[0]}"
    with comm.guarded(lambda problem: None):
        if rank == 1:
            for frames[0] in range(8):
                time.sleep(1)
        assert comm.gather(rank) == [0, 1]
        if rank == 1:
            while not over.exists():
                time.sleep(0.1)
            os._exit(0)
        with pytest.raises(WorkerLost) as told:
            comm.gather(rank)
        over.with_suffix(".new").write_text(str(told.value))
        over.with_suffix(".new").rename(over)
        os._exit(0)


def test_two_ranks_of_which_one_is_slow_and_then_hangs(tmp_path: Path) -> None:
    multiprocessing.spawn(_slow_then_hangs, args=(str(tmp_path),), nprocs=2)
    message = (tmp_path / "said").read_text()
    assert message.startswith("rank 1 of 2 has made no progress for 5 s")
    assert f"where:    {PLACE}, frame 7" in message


# --------------------------------------------------------------------------- a rank that hangs by itself


def _job(folder: Path, **changes: Any) -> tuple[Config, Any]:
    config = small_config(**SETTINGS, **{"EPOCHS": 1, "PROGRESS_TIMEOUT_S": 2, "LOG_EVERY_STEPS": 1, **changes})
    return config, job_of(config, folder, [write_video(folder, "v")])


def _train(folder: str, hang: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    config, job = _job(Path(folder))
    hang()
    notes = Path(folder, "notes")

    def record(kind: str, values: dict[str, Any]) -> None:
        if kind == "note":
            notes.write_text(values["text"])

    reporter = FolderReporter(Path(folder, "out"), record)
    loop.run_stage(job, SingleProcess(), LocalFeed(job, config), reporter, torch.device("cpu"))
    os._exit(1)  # it did not hang


def _the_evaluator_hangs() -> None:
    def track_videos(*_: Any, on_frame: Callable[[Any, int], None], **__: Any) -> None:
        on_frame(_Video(), 17)
        threading.Event().wait()

    loop.track_videos = track_videos  # type: ignore[assignment]


class _Video:
    source, video = "ground", "night"


def _the_storage_hangs() -> None:
    def folder(self: FolderReporter, name: str) -> Path:
        threading.Event().wait()
        raise AssertionError(name)

    loop.validate = lambda run, epoch: {}
    FolderReporter.folder = folder  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("hang", "where"),
    [
        (_the_evaluator_hangs, "stage stage, validation after epoch 1, ground/night, frame 17 tracked"),
        (_the_storage_hangs, "stage stage, after epoch 1"),
    ],
)
def test_a_process_that_hangs_alone_ends_itself_and_says_where(
    tmp_path: Path, hang: Callable[[], None], where: str
) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_train, args=(str(tmp_path), hang))
    process.start()
    process.join(timeout=240)
    alive = process.is_alive()
    process.kill()
    assert not alive, "it hangs for ever"
    assert process.exitcode == EXIT_STATUS
    note = (tmp_path / "notes").read_text()
    assert "rank 0 of 1 has made no progress for 2 s" in note and f"where:    {where}" in note
    assert "tests/train" not in note and "it is at motip/train/" in note


# -------------------------------------------------------------------------------- what the driver hears


def test_the_driver_hears_once_per_attempt_why_it_ended(tmp_path: Path) -> None:
    mailbox = Mailbox()
    assert mailbox.worker_begins() and mailbox.lost() is None
    for rank in (0, 1):
        mailbox.lose(MotipError(f"rank 2 hangs, says rank {rank}"))
    assert [values["text"] for _, values in mailbox.drain()] == ["rank 2 hangs, says rank 0"]
    assert str(mailbox.lost()) == "rank 2 hangs, says rank 0"
    assert mailbox.worker_begins() and mailbox.lost() is None, "of an attempt before"
    mailbox.lose(MotipError("again"))
    assert [values["text"] for _, values in mailbox.drain()] == ["again"]


def test_a_lost_rank_is_told_and_ends_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, job = _job(tmp_path)
    lost = MotipError("rank 1 hangs")

    def validate(run: loop.Run, epoch: int) -> dict[str, float]:
        raise WorkerLost(lost)

    monkeypatch.setattr(loop, "validate", validate)
    notes: list[str] = []
    reporter = FolderReporter(tmp_path / "out", lambda kind, values: notes.append(values.get("text", "")))
    with pytest.raises(WorkerLost, match="rank 1 hangs"):
        loop.run_stage(job, SingleProcess(), LocalFeed(job, config), reporter, torch.device("cpu"))
    assert "rank 1 hangs" in notes


def test_raising_the_limit_does_not_make_a_stage_stale() -> None:
    from motip.curriculum.stage_inputs import SPEED_ONLY

    assert {"PROGRESS_TIMEOUT_S", "COLLECTIVE_TIMEOUT_S"} <= SPEED_ONLY
