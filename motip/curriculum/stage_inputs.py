"""Training job of a stage: its videos, chosen from the manifest, and the digest that identifies its inputs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from motip.config import Curriculum, Source, Stage
from motip.curriculum.options import Options
from motip.data.clip_loader import plan_videos
from motip.data.manifest import Manifest, VideoEntry, entries_digest
from motip.errors import MotipError
from motip.evaluation.protocols import PLAN_CLASSES, PROTOCOLS
from motip.lineage import DataUsed
from motip.stage_folder import FORMAT, JobFacts
from motip.storage.atomic import digest
from motip.train.stage_job import Parent, StageJob

NON_IDENTITY_KEYS = frozenset(
    {"_name", "NUM_WORKERS", "PREFETCH_FACTOR", "LOG_EVERY_STEPS", "root_path", "OUTPUT_DIR", "OUTPUTS_DIR"}
    | {"CHECKPOINT_EVERY_STEPS", "CHECKPOINT_EVERY_MINUTES", "CHECKPOINTS_KEPT", "EPOCH_CHECKPOINTS_KEPT"}
    | {"COLLECTIVE_TIMEOUT_S", "PROGRESS_TIMEOUT_S", "NONFINITE_LIMIT", "WORKER_RESTARTS", "RESIZE_EVERY_S"}
)
"""Configuration keys that affect speed or paths but no result: a change does not make a stage stale."""

RESUMABLE_KEYS = NON_IDENTITY_KEYS - {"OUTPUT_DIR", "OUTPUTS_DIR"}
"""Those keys that may differ when an interrupted stage resumes; in another output folder it starts over."""


def stage_job(
    curriculum: Curriculum, stage: Stage, parent: Parent | None, manifest: Manifest, options: Options
) -> tuple[StageJob, list[VideoEntry]]:
    """The stage's job, whose ``inputs`` digest identifies everything that affects its result, and its training videos.

    Raises:
        MotipError: no validation video, fewer training videos than asked for, or no trainable clip.
    """
    # videos
    config = stage.config
    train = training_videos(stage, manifest)
    val: list[VideoEntry] = []
    for name in stage.validation_sources:
        val += manifest.of(name, "val")
    if not val:
        raise MotipError(
            f"stage {stage.name} has no validation videos",
            where="sources: " + ", ".join(stage.validation_sources),
            expected="at least one labelled sequence in the val split",
            fix="give the source a `val` split; the best checkpoint is chosen on it",
        )
    used = list(dict.fromkeys([*(mix.source for mix in stage.data), *stage.validation_sources]))
    classes = {name: dict(curriculum.sources[name].classes) for name in used}
    weights = {mix.source: mix.weight for mix in stage.data}
    # identity: a change in any of these makes the stage stale
    identity = {
        "format": FORMAT,
        "stage": stage.name,
        "best": stage.best,
        "config": {key: value for key, value in config.to_dict().items() if key not in NON_IDENTITY_KEYS},
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
        protocols={name: protocol_for(curriculum.sources[name], config.class_names) for name in used},
        classes=classes,
        storage=options.storage,
        parent=parent,
        inputs=digest(identity),
        best=stage.best,
    )
    videos = plan_videos(train, job.class_maps(config), options.storage)
    return replace(job, train=tuple(videos)), train


def training_videos(stage: Stage, manifest: Manifest) -> list[VideoEntry]:
    """Training videos selected by the stage's data mix, source by source."""
    return [
        video
        for mix in stage.data
        for video in manifest.select(
            mix.source, "train", videos=mix.videos, frame_budget=mix.frame_budget, allow_fewer=mix.allow_fewer
        )
    ]


def protocol_for(source: Source, class_names: Collection[str]) -> str:
    """Name of the format's own protocol if it has one and it is defined for these classes, else `plain`."""
    defined_for = {"pedestrian"} if source.format == "motchallenge" else set(PLAN_CLASSES)
    return source.format if source.format in PROTOCOLS and set(class_names) == defined_for else "plain"


def job_facts(job: StageJob) -> JobFacts:
    """Facts beside the configuration that later evaluations need."""
    return JobFacts(
        stage=job.stage,
        best=job.best,
        classes={source: {name: list(raws) for name, raws in own.items()} for source, own in job.classes.items()},
        protocols=dict(job.protocols),
        val=sorted({video.source for video in job.val}),
    )


def datasets(train: list[VideoEntry], val: tuple[VideoEntry, ...]) -> list[DataUsed]:
    """Datasets that the stage reads, one per source and split, for MLflow's dataset inputs."""
    used: list[DataUsed] = []
    for context, entries in (("training", train), ("validation", list(val))):
        for source in sorted({entry.source for entry in entries}):
            own = [entry for entry in entries if entry.source == source]
            profile = {"videos": len(own), "frames": sum(entry.frames for entry in own)}
            videos = {"videos": sorted(entry.video for entry in own)}
            used.append(DataUsed(f"{source}/{own[0].split}", entries_digest(own), context, videos, profile))
    return used
