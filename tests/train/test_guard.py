"""What training watches itself for: batches left out in a row, gradients that grow, ranks that do not answer."""

from __future__ import annotations

import logging
import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from motip.errors import MotipError
from motip.train.communicate import SingleProcess, Watched, WorkerLost, current_communicator
from motip.train.guard import GradientWatch
from motip.train.loop import frame_order, network_seed
from motip.train.optimizer import build_optimizer
from motip.train.step import TrainStep
from tests.train.small import clip, small_config, small_model


def _step(limit: int) -> tuple[TrainStep, torch.optim.Optimizer]:
    config = small_config(NONFINITE_LIMIT=limit)
    step = TrainStep(small_model(config), config, SingleProcess())
    return step, build_optimizer(step.model, config)


def test_losses_that_are_not_finite_stop_training_after_some_in_a_row() -> None:
    step, optimizer = _step(limit=3)
    bad = clip(7)
    bad.boxes_cxcywh[0][1][0, 0] = float("nan")
    for batch in (bad, bad, clip(0), bad, bad):
        step.accumulate(batch)
        step.apply(optimizer)
    assert step.counters.nonfinite_losses == 4 and step.left_out.in_a_row == 2
    with pytest.raises(MotipError, match=r"(?s)3 batches in a row.*loss_bbox.*clip 7 .*NONFINITE_LIMIT"):
        step.accumulate(bad)


def test_gradients_that_are_not_finite_stop_training_naming_tensor_and_clip() -> None:
    step, optimizer = _step(limit=2)
    with pytest.raises(MotipError, match=r"(?s)2 batches in a row.*detr\.query_embed\.weight.*clip 4"):
        for number in (3, 4):
            step.accumulate(clip(number))
            step.model.detr.query_embed.weight.grad[0, 0] = float("inf")
            step.apply(optimizer)


def test_the_count_goes_on_after_a_resume() -> None:
    step, _ = _step(limit=3)
    bad = clip(7)
    bad.boxes_cxcywh[0][1][0, 0] = float("nan")
    step.accumulate(bad)
    step.gradient_watch.see({"norm": 2.0})
    again, _ = _step(limit=3)
    again.load_state_dict(step.state_dict())
    assert again.left_out.in_a_row == 1 and again.counters == step.counters
    assert again.gradient_watch.state_dict() == {"norm": [2.0]}


def test_a_gradient_norm_far_above_its_median_is_told() -> None:
    watch = GradientWatch()
    assert not any(watch.see({"norm": 1.0 + 0.01 * i}) for i in range(30))
    assert watch.see({"norm": 9.0}) == []
    assert watch.see({"norm": 20.0}) == ["norm is 20, usually 1.15"]


def test_random_numbers_follow_from_seed_epoch_and_step_alone() -> None:
    torch.rand(5)
    assert network_seed(1, 2, 3, 0) == network_seed(1, 2, 3, 0)
    assert len({network_seed(s, e, i, r) for s in (1, 2) for e in (0, 1) for i in (0, 1) for r in (0, 1)}) == 16
    assert frame_order(1, 2, 3).initial_seed() == frame_order(1, 2, 3).initial_seed()


class _SlowRanks(SingleProcess):
    """Answers once it has been told that somebody waits, twice."""

    world_size = 2

    def __init__(self) -> None:
        self.heard = threading.Semaphore(0)

    def gather(self, value: Any) -> list[Any]:
        assert all(self.heard.acquire(timeout=60) for _ in range(2))
        return [value, "other"]


def test_who_waits_for_a_validation_or_a_save_says_so_again_and_again() -> None:
    ranks, said = _SlowRanks(), list[str]()
    comm = Watched(ranks, 0.01)
    comm.where = lambda: "stage two, validation after epoch 3"

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            ranks.heard.release()

    listener, logger = Listener(), logging.getLogger("motip.train.communicate")
    logger.addHandler(listener)
    try:
        assert comm.gather("own") == ["own", "other"]
    finally:
        logger.removeHandler(listener)
    assert len(said) >= 2 and all("stage two, validation after epoch 3" in line for line in said)
    assert "min for the other workers" in said[0]


def _stalled(rank: int, directory: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/r", rank=rank, world_size=2, timeout=timedelta(seconds=4)
    )
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
    multiprocessing.spawn(_stalled, args=(str(tmp_path),), nprocs=2)
    seconds, _, message = (tmp_path / "said").read_text().partition("\n")
    assert 3 < float(seconds) < 10
    assert "rank 0 of 2" in message and "epoch 1, step 7/9, ground/video frames 1,2" in message
    assert "COLLECTIVE_TIMEOUT_S" in message
