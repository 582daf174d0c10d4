"""Trains one stage, chooses its best checkpoint and writes the stage record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from motip.cluster import Cluster
from motip.config import Config, Curriculum, Stage
from motip.curriculum.failure import log_exceptions, mark_run_failed
from motip.curriculum.options import Options, stage_folder
from motip.curriculum.stage_inputs import RESUMABLE_KEYS, datasets, job_facts, stage_job
from motip.curriculum.stage_readers import StageReaders, transfer_summary
from motip.data.convert import ConvertReport
from motip.data.manifest import Manifest, VideoEntry, entries_digest
from motip.errors import MotipError
from motip.events import Event
from motip.lineage import Lineage
from motip.stage_folder import StageFolder, StageRecord, best_first
from motip.storage.paths import download, location, sha256
from motip.train.ray_train import FitResult, ResourcePlan, fit, plan_resources
from motip.train.stage_job import EpochPlans, Parent, StageJob


class Ui(Protocol):
    """Progress output of the driver."""

    def note(self, text: str) -> None: ...
    def converting(self, phase: str, done: int, total: int) -> None: ...
    def converted(self, report: ConvertReport) -> None: ...
    def stage_begins(self, stage: Stage, job: StageJob, folder: str) -> None: ...
    def event(self, event: Event) -> None: ...
    def stage_ends(self, record: StageRecord) -> None: ...


@dataclass(frozen=True)
class Session:
    """State shared by all stages of one curriculum run."""

    curriculum: Curriculum
    options: Options
    manifest: Manifest
    cluster: Cluster | None
    lineage: Lineage
    run_id: str
    ui: Ui


def run_stage(session: Session, stage: Stage, parent: Parent | None) -> StageRecord:
    """Train a stage, or return its record if it is finished and its inputs are unchanged.

    Raises:
        MotipError: the stage's data, weights or configuration do not fit; completed epochs are kept.
        InUse: another live process trains it.
    """
    # job; a finished stage ends here
    job, train = stage_job(session.curriculum, stage, parent, session.manifest, session.options)
    folder = stage_folder(session.curriculum, stage, job.inputs, session.options)
    done = folder.finished(job.inputs)
    if done is None:
        EpochPlans(job, stage.config, max(1, session.options.workers))(0)  # fails here if no clip can be trained
        resources = _resources(stage.config, session)
        done = folder.acquire_unless_finished(job.inputs, session.run_id)
    if done is not None:
        if done.run_id is not None and folder.log().exists():
            session.lineage.catch_up(done.run_id, folder.path)
        if done.run_id is not None and folder.not_in_mlflow():
            _log_result(session.lineage, done.run_id, done)
            folder.write_record(done)
        return done
    # training
    begin = time.monotonic()
    run_id = ""
    try:
        folder.complete_log()
        run_id = start_stage_run(session.lineage, session.run_id, stage, job, train, folder)
        session.ui.stage_begins(stage, job, str(folder))
        readers = StageReaders(session.lineage, run_id, folder, session.ui)
        try:
            result = fit(replace(job, run_id=run_id), resources, str(folder), readers.catch_up)
        finally:
            readers.flush()
        readers.finish()
        record = _record(stage, replace(job, run_id=run_id), folder, result, train, time.monotonic() - begin)
        _log_result(session.lineage, run_id, record)
    except BaseException as error:
        if run_id:
            session.lineage.catch_up(run_id)
            mark_run_failed(session.lineage, run_id, error)
        with log_exceptions(f"{folder} stays locked by this process until it exits"):
            folder.release()
        raise
    folder.write_record(record)  # marks the stage as finished
    return record


def start_stage_run(
    lineage: Lineage,
    parent_run_id: str,
    stage: Stage,
    job: StageJob,
    train: list[VideoEntry],
    folder: StageFolder,
    *,
    name: str = "",
    tags: Mapping[str, str] | None = None,
) -> str:
    """Start the MLflow run of a stage or trial, or resume that of an interrupted attempt; write the folder's files.

    Args:
        parent_run_id: run of the curriculum or sweep.
        name: of the run; default: the stage's.
        tags: besides the stage's inputs.
    """
    run_id = lineage.start_stage(
        parent_run_id,
        name or stage.name,
        stage.config.to_dict(),
        entries_digest([*train, *job.val]),
        None if job.parent is None else job.parent.to_dict(),
        folder.run_id(),
        folder=folder.path,
        datasets=datasets(train, job.val),
        tags={"motip.stage_inputs": job.inputs, **(tags or {})},
        resumable_keys=RESUMABLE_KEYS,
    )
    folder.start(run_id, parent_run_id, inputs=job.inputs)
    folder.write_job(stage.config.to_dict(), job_facts(job))
    return run_id


def _log_result(lineage: Lineage, run_id: str, record: StageRecord) -> None:
    """Log a stage's result and the end of its run; idempotent."""
    lineage.log_stage_result(run_id, record.checkpoint, record.sha256, record.metrics, step=record.step)
    lineage.finish(run_id, "FINISHED")


def _resources(config: Config, session: Session) -> ResourcePlan:
    if session.options.workers == 0 or session.cluster is None:
        return ResourcePlan(workers=0)
    return plan_resources(session.options.workers, config, session.cluster, session.options.min_workers)


def choose_best_epoch(result: FitResult, stage: Stage) -> int:
    """The epoch with the highest value of the stage's metric among those with stored weights; the earliest of equals.

    Raises:
        MotipError: no epoch has that metric.
    """
    ranked = best_first({epoch: result.epochs[epoch] for epoch in result.checkpoints}, stage.best)
    if not ranked:
        known = sorted({name for metrics in result.epochs.values() for name in metrics})
        raise MotipError(
            f"no epoch of stage {stage.name} has the metric that chooses the best checkpoint",
            where="best",
            found=stage.best,
            expected="one of " + ", ".join(name for name in known if "/" not in name),
        )
    return ranked[0]


def _record(
    stage: Stage, job: StageJob, folder: StageFolder, result: FitResult, train: list[VideoEntry], seconds: float
) -> StageRecord:
    """The record of a trained stage, whose best epoch's checkpoint is copied to ``checkpoint_best.pth``."""
    best = choose_best_epoch(result, stage)
    source = location(result.checkpoints[best])
    if isinstance(folder.best, Path):
        download(source, folder.best)
    else:
        folder.best.write_bytes(source.read_bytes())
    return StageRecord(
        stage=stage.name,
        inputs=job.inputs,
        checkpoint=str(folder.best),
        sha256=sha256(folder.best),
        best_epoch=best,
        step=result.steps[best],
        metrics=result.epochs[best],
        run_id=job.run_id,
        parent_sha256=None if job.parent is None else job.parent.sha256,
        data_digest=entries_digest([*train, *job.val]),
        videos=len(train),
        frames=sum(entry.frames for entry in train),
        epochs=stage.config.EPOCHS,
        seconds=seconds,
        transfer=transfer_summary(folder),
    )
