"""Two ranks (gloo) give the same result as one rank with both clips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

from motip.config import Config
from motip.train.collectives import (
    SingleProcess,
    TorchDistributed,
    all_reduce_gradients,
    current_process_group,
)
from motip.train.optimizer import build_optimizer
from motip.train.step import TrainStep
from tests.helpers.small_training import assert_same_gradients, clip, gradients, small_config, small_model, together

ORDER = torch.tensor([2, 0, 1])
# The ranks have different numbers of objects and ID targets, so that a mean of means would differ.
COUNTS = [(1, 2, 1), (4, 3, 4)]
# Small, because Adam amplifies the rounding noise of tiny gradients to full-size updates.
LR = 1e-4


def _config(focal: bool = False) -> Config:
    return small_config(USE_FOCAL_LOSS=focal, LR=LR)


def _rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    comm = current_process_group()
    assert isinstance(comm, TorchDistributed)
    saved = {
        "clips": _one_clip_each(rank, comm),
        "padding": _only_the_second_has_a_clip(rank, comm),
        "bad": _second_is_not_finite(rank, comm),
        "uneven": _uneven_use(rank, comm),
    }
    torch.save(saved, Path(directory) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _one_clip_each(rank: int, comm: TorchDistributed) -> dict[str, object]:
    config = _config()
    step = TrainStep(small_model(config), config, comm)
    losses = step.accumulate(clip(rank, COUNTS[rank]), ORDER)
    all_reduce_gradients(step.model.parameters(), comm, bucket_bytes=4096)
    return {"values": losses.values, "objects": losses.objects, "gradients": gradients(step.model)}


def _only_the_second_has_a_clip(rank: int, comm: TorchDistributed) -> dict[str, object]:
    config = _config()
    step = TrainStep(small_model(config), config, comm)
    optimizer = build_optimizer(step.model, config)
    mine = clip(rank, COUNTS[rank])
    mine.weights = torch.tensor([float(rank)])
    losses = step.accumulate(mine, ORDER)
    norms = step.apply(optimizer)
    return {"values": losses.values, "norms": norms, "weights": step.model.state_dict()}


def _second_is_not_finite(rank: int, comm: TorchDistributed) -> tuple[bool, int, bool]:
    config = _config()
    step = TrainStep(small_model(config), config, comm)
    mine = clip(rank)
    if rank == 1:
        mine.boxes_cxcywh[0][0][0] = float("inf")
    losses = step.accumulate(mine, ORDER)
    untouched = all(gradient is None for gradient in gradients(step.model).values())
    return losses.skipped, step.counters.nonfinite_losses, untouched


def _uneven_use(rank: int, comm: TorchDistributed) -> list[torch.Tensor | None]:
    """Parameter 0 has a gradient on both ranks, 1 on the second only, 2 on none; 3 is frozen."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    parameters[3].requires_grad_(False)
    parameters[0].grad = torch.full((3,), rank + 1.0)
    if rank == 1:
        parameters[1].grad = torch.arange(3.0)
    all_reduce_gradients(parameters, comm)
    return [parameter.grad for parameter in parameters]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Same number of threads as the ranks, because it changes the order of summation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    directory = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(_rank, args=(str(directory),), nprocs=2)
    # Written by this test itself, tensors and plain containers only.
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_one_clip_per_rank_equals_one_batch_of_two(ranks: list[dict]) -> None:
    assert len(ranks) == 2
    config = _config()
    step = TrainStep(small_model(config), config, SingleProcess())
    losses = step.accumulate(together(*(clip(rank, counts) for rank, counts in enumerate(COUNTS))), ORDER)
    expected = gradients(step.model)
    for rank in ranks:
        assert_same_gradients(rank["clips"]["gradients"], expected, tolerance=1e-5)
        assert rank["clips"]["values"] == pytest.approx(losses.values, rel=1e-5, abs=1e-7)
        assert rank["clips"]["objects"] == losses.objects == sum(map(sum, COUNTS))


def test_rank_without_a_clip_has_the_same_weights(ranks: list[dict]) -> None:
    assert len(ranks) == 2
    config = _config()
    step = TrainStep(small_model(config), config, SingleProcess())
    optimizer = build_optimizer(step.model, config)
    losses = step.accumulate(clip(1, COUNTS[1]), ORDER)
    norms = step.apply(optimizer)
    for rank in ranks:
        assert rank["padding"]["values"] == pytest.approx(losses.values, rel=1e-5)
        assert rank["padding"]["norms"] == pytest.approx(norms, rel=1e-5)
    first, second = (rank["padding"]["weights"] for rank in ranks)
    for name, expected in step.model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, rtol=1e-5, atol=1e-6)


def test_nonfinite_loss_on_one_rank_is_skipped_on_both(ranks: list[dict]) -> None:
    assert [rank["bad"] for rank in ranks] == [(True, 1, True)] * 2


def test_gradients_of_unevenly_used_parameters(ranks: list[dict]) -> None:
    assert len(ranks) == 2
    for rank in ranks:
        shared, second_only, unused, frozen = rank["uneven"]
        assert shared.tolist() == [3.0, 3.0, 3.0] and second_only.tolist() == [0.0, 1.0, 2.0]
        assert unused is None and frozen is None


def test_single_process_group() -> None:
    comm = current_process_group()
    assert isinstance(comm, SingleProcess)
    assert comm.all_gather("own") == ["own"] and comm.sum_(torch.ones(2)).tolist() == [1.0, 1.0]
