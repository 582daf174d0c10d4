"""Stage job: data, weights and settings of a stage as plain values, serialisable to the training workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from motip.config import Config
from motip.data.clips import ClipPlan, PlanVideo, plan_epoch
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
    """The clip plan of each epoch for a given number of ranks (`plan_epoch`), with a cache of the epochs in use."""

    def __init__(self, job: StageJob, config: Config, world_size: int, initial_world_size: int | None = None) -> None:
        plan = partial(plan_epoch, job.train, job.weights, config, world_size, initial_world_size)
        self._plan = lru_cache(maxsize=2)(plan)

    def __call__(self, epoch: int) -> ClipPlan:
        return self._plan(epoch)
