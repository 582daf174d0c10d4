"""Trains one stage, chooses its best checkpoint and writes the stage record."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from motip.cluster import Cluster
from motip.config import Config, Curriculum, Stage
from motip.curriculum.failure import log_exceptions, mark_run_failed
from motip.curriculum.records import (
    Options,
    StageRecord,
    acquire_lock,
    finished_record,
    release_lock,
    stage_folder,
    unfinished_run,
)
from motip.curriculum.stage_inputs import RESUMABLE_KEYS, datasets, job_facts, stage_job
from motip.curriculum.stage_recorder import StageRecorder
from motip.data.convert import ConvertReport
from motip.data.manifest import Manifest, VideoEntry, entries_digest
from motip.errors import MotipError
from motip.lineage import Lineage
from motip.lineage.driver_process import this_driver
from motip.storage.paths import Location, download, location, sha256, write_json
from motip.train.ray_train import FitResult, ResourcePlan, completed, fit, plan_resources
from motip.train.retention import best_first
from motip.train.stage_job import EpochPlans, Parent, StageJob


class Ui(Protocol):
    """Progress output of the driver."""

    def note(self, text: str) -> None: ...
    def converting(self, phase: str, done: int, total: int) -> None: ...
    def converted(self, report: ConvertReport) -> None: ...
    def stage_begins(self, stage: Stage, job: StageJob, folder: str) -> None: ...
    def record(self, kind: str, values: dict[str, Any]) -> None: ...
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
    job, train = stage_job(session.curriculum, stage, parent, session.manifest, session.options)
    folder = stage_folder(session.curriculum, stage, job.inputs, session.options)
    done = finished_record(folder, job.inputs)
    if done is not None:
        return _sync_late(session, folder, done)
    EpochPlans(job, stage.config, max(1, session.options.workers))(0)  # fails here if no clip can be trained
    placement = _placement(stage.config, session)
    done = acquire_lock(folder / "stage.json", "stage", parent_run_id=session.run_id, inputs=job.inputs)
    if done is not None:  # finished by another process meanwhile
        return _sync_late(session, folder, done)
    try:
        job = replace(job, run_id=_start_run(session, stage, job, train, folder))
        session.ui.stage_begins(stage, job, str(folder))
        return _train(session, stage, job, train, folder, placement)
    except BaseException:
        with log_exceptions(f"{folder} stays locked by this process until it exits"):
            release_lock(folder / "stage.json")
        raise


def _start_run(session: Session, stage: Stage, job: StageJob, train: list[VideoEntry], folder: Location) -> str:
    """Start the stage's MLflow run, or resume that of an interrupted attempt, and write the stage's files."""
    run_id = session.lineage.start_stage(
        session.run_id,
        stage.name,
        stage.config.to_dict(),
        entries_digest([*train, *job.val]),
        None if job.parent is None else job.parent.to_dict(),
        datasets=datasets(train, job.val),
        tags={"motip.stage_inputs": job.inputs},
        resume_run_id=unfinished_run(folder),
        resumable_keys=RESUMABLE_KEYS,
    )
    running = {"status": "running", "inputs": job.inputs, "run_id": run_id}
    driven = {"driver": this_driver(), "curriculum_run": session.run_id}
    write_json(folder / "stage.json", {**running, **driven})
    write_json(folder / "config.json", stage.config.to_dict())
    write_json(folder / "job.json", job_facts(job))
    return run_id


def _train(
    session: Session, stage: Stage, job: StageJob, train: list[VideoEntry], folder: Location, placement: ResourcePlan
) -> StageRecord:
    begin = time.monotonic()
    run_id = str(job.run_id)
    recorder = StageRecorder(session.lineage, run_id, session.ui, folder)
    try:
        with recorder.notes_delivered():
            recorder.backfill(completed(str(folder)))
            result = fit(job, placement, str(folder), recorder)
        record = _conclude(stage, job, folder, result, train, recorder.transfer, time.monotonic() - begin)
    except BaseException as error:
        mark_run_failed(session.lineage, run_id, error)
        raise
    recorder.dashboard.finish()
    return _sync_result(session, folder, record)


def _sync_late(session: Session, folder: Location, record: StageRecord) -> StageRecord:
    """Record the result of a stage whose process was killed before it could; a refusal of MLflow is noted once."""
    if record.mlflow_synced:
        return record
    try:
        return _sync_result(session, folder, record)
    except MotipError as error:
        session.ui.note(f"{record.stage} is finished, but its result is missing in MLflow: {error.what}")
        return _write_synced(folder, record)


def _sync_result(session: Session, folder: Location, record: StageRecord) -> StageRecord:
    """Record a finished stage's result in MLflow; idempotent."""
    if record.run_id is not None:
        session.lineage.log_stage_result(
            record.run_id, record.checkpoint, record.sha256, record.metrics, step=record.step
        )
        session.lineage.finish(record.run_id, "FINISHED")
    return _write_synced(folder, record)


def _write_synced(folder: Location, record: StageRecord) -> StageRecord:
    synced = replace(record, mlflow_synced=True)
    write_json(folder / "stage.json", asdict(replace(synced, skipped=False)))
    return synced


def _placement(config: Config, session: Session) -> ResourcePlan:
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


def _conclude(
    stage: Stage,
    job: StageJob,
    folder: Location,
    result: FitResult,
    train: list[VideoEntry],
    transfer: dict[str, Any],
    seconds: float,
) -> StageRecord:
    """Copy the best epoch's checkpoint, then write the record, which marks the stage as finished."""
    # best checkpoint
    best = choose_best_epoch(result, stage)
    source = location(result.checkpoints[best])
    target = folder / "checkpoint_best.pth"
    if isinstance(target, Path):
        download(source, target)
    else:
        target.write_bytes(source.read_bytes())
    # record
    record = StageRecord(
        stage=stage.name,
        inputs=job.inputs,
        checkpoint=str(target),
        sha256=sha256(target),
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
        transfer=transfer,
        mlflow_synced=False,
    )
    write_json(folder / "stage.json", asdict(record))
    return record
