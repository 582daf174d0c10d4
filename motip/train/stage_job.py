"""Everything a training worker has to know about its stage, as plain data that crosses process borders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from motip.config import Config
from motip.data.batch import ClipBatch
from motip.data.clips import ClipPlan, ClipRef, PlanVideo, pad_to, plan_clips
from motip.data.manifest import VideoEntry
from motip.data.sequence import ClassMap


@dataclass(frozen=True)
class Parent:
    """The weights a stage starts from: file, its sha256, and the MLflow run that made it (None for a given file)."""

    path: str
    sha256: str
    run_id: str | None = None
    stage: str | None = None


@dataclass(frozen=True)
class StageJob:
    """One stage, ready to train.

    Attributes:
        config: the stage's Config as plain values.
        train: training videos of all sources with their object counts.
        weights: clips per start frame, by source (the data mix).
        val: locked validation videos of the stage's own sources.
        protocols: source to the protocol its videos are scored by.
        classes: source to {class name: raw categories}.
        storage: folder or URI that holds ``shards/``.
        parent: weights to start from; None trains from freshly initialised weights.
        inputs: hex digest of everything above, the stage's identity.
        run_id: MLflow run the metrics belong to.
        best: metric that chooses the best checkpoint.
    """

    stage: str
    config: dict[str, Any]
    train: tuple[PlanVideo, ...]
    weights: Mapping[str, float]
    val: tuple[VideoEntry, ...]
    protocols: Mapping[str, str]
    classes: Mapping[str, Mapping[str, tuple[str, ...]]]
    storage: str
    parent: Parent | None
    inputs: str
    run_id: str | None = None
    best: str = "HOTA"

    def class_maps(self, config: Config) -> dict[str, ClassMap]:
        """Per source, raw categories to the stage's classes; categories of untrained classes become ignore regions."""
        return {source: ClassMap.among(config.class_names, raws) for source, raws in self.classes.items()}


class Feed(Protocol):
    """Where a worker's batches come from."""

    def steps(self, epoch: int) -> int:
        """Batches of one rank in an epoch; equal on all ranks."""
        ...

    def counts(self, epoch: int) -> dict[str, int]:
        """What the clip plan of an epoch left out or repeated, by reason."""
        ...

    def batches(self, epoch: int, start_step: int) -> Iterator[ClipBatch]:
        """This rank's batches from ``start_step`` on."""
        ...

    def started_with(self, first_world: int) -> None:
        """Share out the global batches of a run that began with this many ranks; called before anything else."""
        ...


class EpochPlans:
    """The clip plan of each epoch for a given number of ranks, made once and kept while it is in use.

    Args:
        world: ranks of this attempt.
        first_world: ranks that the run began with, where it goes on with others: its steps keep their clips.
    """

    def __init__(self, job: StageJob, config: Config, world: int, first_world: int | None = None) -> None:
        self._job = job
        self._config = config
        self._world = world
        self._global_batch = (first_world or world) * config.BATCH_SIZE
        self._kept: dict[int, ClipPlan] = {}

    def __call__(self, epoch: int) -> ClipPlan:
        if epoch not in self._kept:
            self._kept = {number: plan for number, plan in self._kept.items() if number >= epoch - 1}
            self._kept[epoch] = self._make(epoch)
        return self._kept[epoch]

    def _make(self, epoch: int) -> ClipPlan:
        config = self._config
        schedule = config.clip_schedule(epoch)
        plan = plan_clips(
            self._job.train,
            schedule,
            epoch=epoch,
            seed=config.SEED,
            global_batch=self._global_batch,
            weights=self._job.weights,
            max_clips=config.CLIPS_PER_EPOCH,
            length_per_iteration=config.LENGTH_PER_ITERATION,
            interval_seconds=schedule.interval_seconds,
        )
        return shared_among(pad_to(plan, self._global_batch), self._world)


def shared_among(plan: ClipPlan, world: int) -> ClipPlan:
    """The same steps of the same clips for another number of ranks: uneven shares are filled with weight-0 repeats."""
    per_rank = -(-plan.global_batch // world)
    if per_rank * world == plan.global_batch:
        return plan
    clips: list[ClipRef] = []
    for begin in range(0, len(plan.clips), plan.global_batch):
        step = plan.clips[begin : begin + plan.global_batch]
        missing = per_rank * world - len(step)
        clips += [*step, *(replace(step[i % len(step)], weight=0) for i in range(missing))]
    counts = {**plan.counts, "padding_for_workers": len(clips) - len(plan.clips)}
    return replace(plan, clips=tuple(clips), counts=counts, global_batch=per_rank * world)
