"""Stage job: data, weights and settings of a stage as plain values, serialisable to the training workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from motip.config import Config
from motip.data.clips import ClipPlan, ClipRef, PlanVideo, pad_to, plan_clips
from motip.data.manifest import VideoEntry
from motip.data.sequence import ClassMap


@dataclass(frozen=True)
class Parent:
    """Initial weights of a stage: file, its sha256, and the MLflow run that wrote it (None for a given file)."""

    path: str
    sha256: str
    run_id: str | None = None
    stage: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """``{"path", "sha256", "run_id"}``, as checkpoints store it and the lineage records it."""
        return {"path": self.path, "sha256": self.sha256, "run_id": self.run_id}


@dataclass(frozen=True)
class StageJob:
    """One stage, ready to train.

    Attributes:
        config: the stage's Config as plain values.
        train: training videos of all sources with their object counts.
        weights: clips per start frame, by source (the data mix).
        val: locked validation videos of the stage's own sources.
        protocols: source to the evaluation protocol of its videos.
        classes: source to {class name: raw categories}.
        storage: folder or URI that holds ``shards/``.
        parent: weights to start from; None trains from freshly initialised weights.
        inputs: hex digest of all fields above, the identity of the stage.
        run_id: MLflow run of the metrics.
        best: metric that selects the best checkpoint.
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
        """Per source: raw categories to the stage's classes; categories of untrained classes become ignore regions."""
        return {source: ClassMap.among(config.class_names, raws) for source, raws in self.classes.items()}


class EpochPlans:
    """The clip plan of each epoch for a given number of ranks, with a cache of the epochs in use.

    Args:
        world_size: ranks of this attempt.
        initial_world_size: ranks at the start of a resumed run, whose global batches are kept; None: ``world_size``.
    """

    def __init__(self, job: StageJob, config: Config, world_size: int, initial_world_size: int | None = None) -> None:
        self._job = job
        self._config = config
        self._world_size = world_size
        self._global_batch = (initial_world_size or world_size) * config.BATCH_SIZE
        self._cache: dict[int, ClipPlan] = {}

    def __call__(self, epoch: int) -> ClipPlan:
        if epoch not in self._cache:
            self._cache = {number: plan for number, plan in self._cache.items() if number >= epoch - 1}
            self._cache[epoch] = self._make(epoch)
        return self._cache[epoch]

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
        return divided_among(pad_to(plan, self._global_batch), self._world_size)


def divided_among(plan: ClipPlan, world_size: int) -> ClipPlan:
    """The same steps of the same clips for another number of ranks; uneven shares are padded with weight-0 repeats."""
    per_rank = -(-plan.global_batch // world_size)
    if per_rank * world_size == plan.global_batch:
        return plan
    clips: list[ClipRef] = []
    for begin in range(0, len(plan.clips), plan.global_batch):
        step = plan.clips[begin : begin + plan.global_batch]
        missing = per_rank * world_size - len(step)
        clips += [*step, *(replace(step[i % len(step)], weight=0) for i in range(missing))]
    counts = {**plan.counts, "padding_for_workers": len(clips) - len(plan.clips)}
    return replace(plan, clips=tuple(clips), counts=counts, global_batch=per_rank * world_size)
