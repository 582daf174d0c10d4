"""Out of memory on any rank, step and phase: no rank hangs, accumulated gradients stay, every failure is reported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from motip.config import Config
from motip.errors import MotipError
from motip.train.collectives import ProcessGroup, SingleProcess, current_process_group
from motip.train.oom import OomHistory, downscaled, is_out_of_memory, object_bucket, oom_fallbacks
from motip.train.optimizer import build_optimizer
from motip.train.step import StepLosses, TrainStep
from tests.helpers.small_training import assert_same_gradients, clip, gradients, small_config, small_model, together

STEPS, ACCUMULATE = 4, 2
ORDER = torch.tensor([2, 0, 1])
CROWDS = [(1, 2, 1), (4, 3, 4), (2, 2, 2)]


def _config(**changes: Any) -> Config:
    """A small LR, because Adam's first steps amplify the rounding noise of tiny gradients to full-size updates."""
    settings = {"MEMORY_EFFICIENT": True, "LR": 1e-6, "ACCUMULATE_STEPS": ACCUMULATE, **changes}
    return small_config(**settings)


class FaultInjector:
    """Injects out-of-memory errors and NaN losses into a training step.

    Args:
        failures: (batch, phase, times): number of failures in that batch in the phase `forward` or `backward`, or of
            losses that are `not finite`.
    """

    def __init__(self, step: TrainStep, failures: Iterable[tuple[int, str, int]]) -> None:
        self.batch = -1
        self.left = {(batch, phase): times for batch, phase, times in failures}

        def criterion(*arguments: Any) -> Any:
            losses = real(*arguments)
            self._fail("forward")
            if self.left.get((self.batch, "not finite"), 0) > 0:
                losses.total = losses.total * torch.nan
            return losses

        real = step.loss.criterion
        step.loss = replace(step.loss, criterion=criterion)  # type: ignore[arg-type]
        # Half-way through the backward pass: after the gradients of the ID decoder, before those of the backbone.
        step.model.detr.query_embed.weight.register_hook(lambda _: self._fail("backward"))

    def _fail(self, phase: str) -> None:
        if self.left.get((self.batch, phase), 0) > 0:
            self.left[self.batch, phase] -= 1
            raise torch.OutOfMemoryError(f"injected in {phase}")


def _train(
    comm: ProcessGroup, failures: Iterable[tuple[int, str, int]], config: Config | None = None
) -> tuple[TrainStep, list[StepLosses]]:
    config = config or _config()
    step = TrainStep(small_model(config), config, comm)
    optimizer = build_optimizer(step.model, config)
    injector = FaultInjector(step, failures)
    losses = []
    for batch in range(STEPS):
        injector.batch = batch
        mine = clip(10 * batch + comm.rank, CROWDS[comm.rank])
        losses.append(step.accumulate(mine, ORDER, seed=batch))
        if batch % ACCUMULATE == ACCUMULATE - 1:
            step.apply(optimizer)
    return step, losses


# Failures per case and rank. There are four fallbacks, of which three give the same gradients.
CASES: dict[str, dict[int, list[tuple[int, str, int]]]] = {
    "undisturbed": {},
    "forward": {0: [(0, "forward", 1)]},
    "backward of the second batch": {0: [(1, "backward", 1)]},
    "last rank, twice, both phases": {-1: [(1, "forward", 1), (1, "backward", 1)]},
    "every rank in the same batch": {0: [(1, "backward", 1)], 1: [(1, "forward", 2)], 2: [(1, "backward", 2)]},
    "first rank fails with every fallback": {0: [(1, "forward", 99)]},
    "last rank fails with every fallback in backward": {-1: [(2, "backward", 99)]},
    "not finite, while another rank fails with every fallback": {0: [(1, "not finite", 1)], 1: [(1, "backward", 99)]},
}


def _of_rank(case: str, rank: int, world: int) -> list[tuple[int, str, int]]:
    return [f for who, found in CASES[case].items() if who % world == rank and who < world for f in found]


def _rank(rank: int, world: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    comm = current_process_group()
    saved = {}
    for case in CASES:
        step, losses = _train(comm, _of_rank(case, rank, world))
        saved[case] = _result(step, losses)
    torch.save(saved, Path(directory) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _result(step: TrainStep, losses: list[StepLosses]) -> dict[str, Any]:
    return {
        "weights": dict(step.model.state_dict()),
        "skipped": [loss.skipped for loss in losses],
        "lowered": step.counters.lowered,
        "out_of_memory": step.counters.out_of_memory,
        "not_finite": step.counters.nonfinite_losses,
        "skipped_objects": step.counters.skipped_objects,
        "names": step.counters.names,
        "reports": [line for loss in losses for line in loss.skip_reports],
    }


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    world = request.param
    if world == 1:
        return [{case: _result(*_train(SingleProcess(), _of_rank(case, 0, 1))) for case in CASES}]
    directory = tmp_path_factory.mktemp(f"ranks{world}")
    multiprocessing.spawn(_rank, args=(world, str(directory)), nprocs=world)
    # Written by this test itself, tensors and plain containers only.
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize("case", [case for case in CASES if "every fallback" not in case])
def test_successful_retry_gives_the_same_weights(ranks: list[dict[str, Any]], case: str) -> None:
    assert ranks
    expected = ranks[0]["undisturbed"]["weights"]
    world = len(ranks)
    failures = sum(times for rank in range(world) for _, _, times in _of_rank(case, rank, world))
    for rank in ranks:
        assert rank[case]["skipped"] == [False] * STEPS
        assert rank[case]["lowered"] == failures and rank[case]["out_of_memory"] == 0
        for name, value in rank[case]["weights"].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
            assert torch.equal(value, ranks[0][case]["weights"][name]), name


@pytest.mark.parametrize(
    ("case", "batch"),
    [("first rank fails with every fallback", 1), ("last rank fails with every fallback in backward", 2)],
)
def test_all_ranks_skip_a_batch_that_fails_with_every_fallback(
    ranks: list[dict[str, Any]], case: str, batch: int
) -> None:
    assert ranks
    world = len(ranks)
    for rank in ranks:
        found = rank[case]
        assert found["skipped"] == [step == batch for step in range(STEPS)]
        assert found["out_of_memory"] == 1 and found["lowered"] == len(oom_fallbacks(_config()))
        assert found["names"] == [f"clip {10 * batch + r}" for r in range(world)]
        assert sum(found["skipped_objects"].values()) == world
        assert (
            len(found["reports"]) == world
            and sum("out of memory with the last fallback" in line for line in found["reports"]) == 1
        )
        assert "3 frames" in found["reports"][0] and "at most 2 in a frame" in found["reports"][0]
        for name, value in found["weights"].items():
            assert torch.equal(value, ranks[0][case]["weights"][name]), name


def test_nonfinite_loss_skips_the_batch_without_fallbacks(ranks: list[dict[str, Any]]) -> None:
    """The report names the loss, and no rank retries."""
    assert ranks
    case = "not finite, while another rank fails with every fallback"
    for rank in ranks:
        found = rank[case]
        assert found["skipped"] == [step == 1 for step in range(STEPS)]
        assert (found["not_finite"], found["out_of_memory"], found["lowered"]) == (1, 0, 0)
        assert "not finite: loss" in found["reports"][0] and "rank 0" in found["reports"][0]
        for name, value in found["weights"].items():
            assert torch.equal(value, ranks[0][case]["weights"][name]), name


def test_accumulated_gradients_stay_when_a_later_batch_is_skipped() -> None:
    config = _config()
    step = TrainStep(small_model(config), config, SingleProcess())
    injector = FaultInjector(step, [(1, "backward", 99)])
    injector.batch = 0
    step.accumulate(clip(0), ORDER)
    before = gradients(step.model)
    injector.batch = 1
    assert step.accumulate(clip(1), ORDER).skipped
    assert_same_gradients(gradients(step.model), before, tolerance=0)
    assert step.accumulated == 1


def test_without_fallbacks_the_clip_is_skipped_at_the_first_failure() -> None:
    step, losses = _train(SingleProcess(), [(1, "forward", 1)], _config(MEMORY_EFFICIENT=False))
    assert [loss.skipped for loss in losses] == [False, True, False, False]
    assert losses[1].values == {} and step.counters.lowered == 1


def test_training_stops_if_no_clip_fits() -> None:
    with pytest.raises(MotipError, match=r"(?s)3 batches in a row.*clip 20 .*NONFINITE_LIMIT.*MEMORY_EFFICIENT"):
        _train(SingleProcess(), [(b, "forward", 99) for b in range(STEPS)], _config(NONFINITE_LIMIT=3))


def test_other_errors_are_not_treated_as_out_of_memory() -> None:
    config = _config()
    step = TrainStep(small_model(config), config, SingleProcess())

    def fails(*_: Any) -> Any:
        raise RuntimeError("shapes do not match")

    step.loss = replace(step.loss, criterion=fails)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="shapes"):
        step.accumulate(clip(0), ORDER)
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))


def test_every_fallback_but_the_last_gives_the_same_gradients() -> None:
    config = small_config(MEMORY_EFFICIENT=True)
    fallbacks = oom_fallbacks(config)
    assert [fallback.name for fallback in fallbacks] == [
        "as configured",
        "detector recomputed",
        "ID decoder recomputed",
        "image at 75%",
    ]
    results = []
    for index in range(len(fallbacks)):
        step = TrainStep(small_model(config), config, SingleProcess())
        step.fallbacks = fallbacks[index : index + 1]
        step.accumulate(together(clip(0), clip(1, (1, 4, 2))), ORDER)
        results.append(gradients(step.model))
    for found in results[1:-1]:
        assert_same_gradients(found, results[0])
    with pytest.raises(AssertionError):
        assert_same_gradients(results[-1], results[0])


def test_fallbacks_of_a_full_size_configuration() -> None:
    full = {"MEMORY_EFFICIENT": True, "DETR_NUM_TRAIN_FRAMES": 4, "DETR_NUM_CHECKPOINT_FRAMES": 5}
    fallbacks = oom_fallbacks(small_config(**full, SAMPLE_LENGTHS=[5]))
    assert [
        (fallback.plan.chunk, fallback.plan.recompute, fallback.recompute_decoder, fallback.scale)
        for fallback in fallbacks
    ] == [
        (5, False, False, 1.0),
        (2, True, False, 1.0),
        (1, True, False, 1.0),
        (1, True, True, 1.0),
        (1, True, True, 0.75),
    ]
    assert len(oom_fallbacks(small_config(DETR_NUM_CHECKPOINT_FRAMES=1))) == 1
    for lengths, chunk in (([2], 1), ([1], 1), ([4], 2), ([8], 2)):
        assert oom_fallbacks(small_config(**full, SAMPLE_LENGTHS=lengths))[1].plan.chunk == chunk
    growing = small_config(**full, EPOCHS=4, SAMPLE_STEPS=[0, 2], SAMPLE_LENGTHS=[2, 4], SAMPLE_INTERVALS=[1, 1])
    assert oom_fallbacks(growing)[1].plan.chunk == 2


def test_short_clips_are_recomputed_in_chunks_with_the_same_gradients() -> None:
    config = small_config(MEMORY_EFFICIENT=True, DETR_NUM_TRAIN_FRAMES=4, SAMPLE_LENGTHS=[2])
    images: list[int] = []
    results = []
    for fallback in oom_fallbacks(config)[:2]:
        step = TrainStep(small_model(config), config, SingleProcess())
        step.fallbacks = (fallback,)
        images.clear()
        step.model.detr.register_forward_pre_hook(lambda _module, inputs: images.append(len(inputs[0])))
        step.accumulate(clip(0, (3, 2)), torch.arange(2))
        results.append((max(images), gradients(step.model)))
    assert [most for most, _ in results] == [2, 1]
    assert_same_gradients(results[1][1], results[0][1])


def test_downscaling_keeps_the_padding_borders_of_each_clip() -> None:
    batch = together(clip(0), clip(1))
    batch.masks[1, :, 40:] = True
    smaller = downscaled(batch, 0.75)
    assert smaller.images.shape == (2, 3, 3, 36, 42) and smaller.images.dtype == torch.uint8
    assert [int((~mask[0, :, 0]).sum()) for mask in smaller.masks] == [36, 30]
    assert [int((~mask[0, 0]).sum()) for mask in smaller.masks] == [42, 42]
    flat = clip(0)
    flat.images[:] = 77
    inside = downscaled(flat, 0.75).images[..., :42]
    assert bool((inside == 77).all())
    assert downscaled(batch, 1.0) is batch and smaller.boxes_cxcywh is batch.boxes_cxcywh


def test_similar_clips_start_with_a_later_fallback_but_never_downscaled() -> None:
    fallbacks = oom_fallbacks(_config())
    history = OomHistory(fallbacks)
    history.add(0, (100, 50))
    assert history.first_fallback((100, 50)) == 1 and history.first_fallback((200, 60)) == 1
    assert history.first_fallback((99, 50)) == 0 and history.first_fallback((200, 49)) == 0
    for index in range(len(fallbacks)):
        history.add(index, (100, 50))
    assert fallbacks[history.first_fallback((500, 500))].scale == 1.0


def test_skipped_clips_are_counted_by_objects() -> None:
    assert [object_bucket(n) for n in (0, 9, 10, 99, 100, 5000)] == [
        "0_to_9",
        "0_to_9",
        "10_to_24",
        "50_to_99",
        "100_or_more",
        "100_or_more",
    ]
