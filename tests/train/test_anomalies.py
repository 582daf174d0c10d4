"""Limit on consecutive skipped batches, and detection of gradient-norm spikes."""

from __future__ import annotations

import pytest
import torch

from motip.errors import MotipError
from motip.train.anomalies import GradNormMonitor
from motip.train.collectives import SingleProcess
from motip.train.loop import frame_order, network_seed
from motip.train.optimizer import build_optimizer
from motip.train.step import TrainStep
from tests.helpers.small_training import clip, small_config, small_model


def _step(limit: int) -> tuple[TrainStep, torch.optim.Optimizer]:
    config = small_config(NONFINITE_LIMIT=limit)
    step = TrainStep(small_model(config), config, SingleProcess())
    return step, build_optimizer(step.model, config)


def test_consecutive_nonfinite_losses_stop_training() -> None:
    step, optimizer = _step(limit=3)
    bad = clip(7)
    bad.boxes_cxcywh[0][1][0, 0] = float("nan")
    for batch in (bad, bad, clip(0), bad, bad):
        step.accumulate(batch)
        step.apply(optimizer)
    assert step.counters.nonfinite_losses == 4 and step.skip_limit.in_a_row == 2
    with pytest.raises(MotipError, match=r"(?s)3 batches in a row.*loss_bbox.*clip 7 .*NONFINITE_LIMIT"):
        step.accumulate(bad)


def test_nonfinite_gradients_stop_training_naming_tensor_and_clip() -> None:
    step, optimizer = _step(limit=2)
    with pytest.raises(MotipError, match=r"(?s)2 batches in a row.*detr\.query_embed\.weight.*clip 4"):
        for number in (3, 4):
            step.accumulate(clip(number))
            step.model.detr.query_embed.weight.grad[0, 0] = float("inf")
            step.apply(optimizer)


def test_skip_count_continues_after_a_resume() -> None:
    step, _ = _step(limit=3)
    bad = clip(7)
    bad.boxes_cxcywh[0][1][0, 0] = float("nan")
    step.accumulate(bad)
    step.grad_norm_monitor.update({"norm": 2.0})
    again, _ = _step(limit=3)
    again.load_state_dict(step.state_dict())
    assert again.skip_limit.in_a_row == 1 and again.counters == step.counters
    assert again.grad_norm_monitor.state_dict() == {"norm": [2.0]}


def test_gradient_norm_far_above_its_median_is_reported() -> None:
    monitor = GradNormMonitor()
    assert not any(monitor.update({"norm": 1.0 + 0.01 * i}) for i in range(30))
    assert monitor.update({"norm": 9.0}) == []
    assert monitor.update({"norm": 20.0}) == ["norm is 20, usually 1.15"]


def test_random_numbers_depend_on_seed_epoch_and_step_alone() -> None:
    torch.rand(5)
    assert network_seed(1, 2, 3, 0) == network_seed(1, 2, 3, 0)
    assert len({network_seed(s, e, i, r) for s in (1, 2) for e in (0, 1) for i in (0, 1) for r in (0, 1)}) == 16
    assert frame_order(1, 2, 3).initial_seed() == frame_order(1, 2, 3).initial_seed()
