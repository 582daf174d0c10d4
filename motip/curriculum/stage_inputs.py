"""A stage's data chosen from the manifest, and everything that goes into it named by one digest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from motip.config import Config, Curriculum, Source, Stage
from motip.curriculum.records import FORMAT, Options
from motip.data.clip_loader import plan_videos
from motip.data.manifest import Manifest, VideoEntry, entries_digest
from motip.errors import MotipError
from motip.lineage import DataUsed
from motip.storage.atomic import digest
from motip.train.stage_job import Parent, StageJob

SPEED_ONLY = frozenset(
    {"_name", "NUM_WORKERS", "PREFETCH_FACTOR", "LOG_EVERY_STEPS", "root_path", "OUTPUT_DIR", "OUTPUTS_DIR"}
    | {"CHECKPOINT_EVERY_STEPS", "CHECKPOINT_EVERY_MINUTES", "CHECKPOINTS_KEPT", "EPOCH_CHECKPOINTS_KEPT"}
    | {"COLLECTIVE_TIMEOUT_S", "PROGRESS_TIMEOUT_S", "NONFINITE_LIMIT", "WORKER_RESTARTS", "RESIZE_EVERY_S"}
)
"""Keys that change how fast or where a stage runs, not what comes out: they do not make it stale."""

PACE_ONLY = SPEED_ONLY - {"OUTPUT_DIR", "OUTPUTS_DIR"}
"""Those of them that may change when a stage that was cut off goes on: in another folder it begins anew."""

PLANNED_CLASSES = {"pedestrian", "car"}
"""The class list, beside its own, that the BDD100K and VisDrone protocols are defined for here."""


def stage_job(
    curriculum: Curriculum, stage: Stage, parent: Parent | None, manifest: Manifest, options: Options
) -> tuple[StageJob, list[VideoEntry]]:
    """The stage with its data chosen and its inputs named by one digest."""
    config = stage.config
    train = training_videos(stage, manifest)
    val: list[VideoEntry] = []
    judges = stage.val if stage.val is not None else tuple(mix.source for mix in stage.data)
    for name in judges:
        val += manifest.of(name, "val")
    if not val:
        raise MotipError(
            f"stage {stage.name} has no validation videos",
            where="sources: " + ", ".join(judges),
            expected="at least one labelled sequence in the val split",
            fix="give the source a `val` split; the best checkpoint is chosen on it",
        )
    used = list(dict.fromkeys([*(mix.source for mix in stage.data), *judges]))
    classes = {name: dict(curriculum.sources[name].classes) for name in used}
    weights = {mix.source: mix.weight for mix in stage.data}
    identity = {
        "format": FORMAT,
        "stage": stage.name,
        "best": stage.best,
        "config": {key: value for key, value in config.to_dict().items() if key not in SPEED_ONLY},
        "train": entries_digest(train),
        "val": entries_digest(val),
        "classes": classes,
        "weights": weights,
        "parent": None if parent is None else parent.sha256,
    }
    job = StageJob(
        stage=stage.name,
        config=config.to_dict(),
        train=(),
        weights=weights,
        val=tuple(val),
        protocols={name: protocol_of(curriculum.sources[name], config) for name in used},
        classes=classes,
        storage=options.storage,
        parent=parent,
        inputs=digest(identity),
        best=stage.best,
    )
    videos = plan_videos(train, job.class_maps(config), options.storage)
    return replace(job, train=tuple(videos)), train


def training_videos(stage: Stage, manifest: Manifest) -> list[VideoEntry]:
    """The videos that the stage's mix takes of each source, source after source."""
    return [
        video
        for mix in stage.data
        for video in manifest.select(
            mix.source, "train", videos=mix.videos, frame_budget=mix.frame_budget, allow_fewer=mix.allow_fewer
        )
    ]


def protocol_of(source: Source, config: Config) -> str:
    """The benchmark's own rules where they are defined for the trained classes, else `plain`."""
    return protocol_for(source, config.class_names)


def protocol_for(source: Source, class_names: Collection[str]) -> str:
    """The benchmark's own rules where they are defined for these classes, else `plain`."""
    names = set(class_names)
    if source.format == "motchallenge":
        return "motchallenge" if names == {"pedestrian"} else "plain"
    return source.format if names == PLANNED_CLASSES else "plain"


def job_facts(job: StageJob) -> dict[str, Any]:
    """What whoever judges the stage later must know beside its configuration: which videos, which classes, which rules.

    Kept as ``job.json`` in the stage's folder.
    """
    return {
        "stage": job.stage,
        "best": job.best,
        "classes": {source: {name: list(raws) for name, raws in own.items()} for source, own in job.classes.items()},
        "protocols": dict(job.protocols),
        "val": sorted({video.source for video in job.val}),
    }


def datasets(train: list[VideoEntry], val: tuple[VideoEntry, ...]) -> list[DataUsed]:
    """What the stage reads, source by source, for MLflow's dataset inputs."""
    used: list[DataUsed] = []
    for context, entries in (("training", train), ("validation", list(val))):
        for source in sorted({entry.source for entry in entries}):
            own = [entry for entry in entries if entry.source == source]
            profile = {"videos": len(own), "frames": sum(entry.frames for entry in own)}
            videos = {"videos": sorted(entry.video for entry in own)}
            used.append(DataUsed(f"{source}/{own[0].split}", entries_digest(own), context, videos, profile))
    return used
