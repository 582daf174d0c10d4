"""Run one stage: train, choose the best checkpoint, write the record that the next stage starts from."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from motip.cluster import Cluster
from motip.config import Config, Curriculum, Stage
from motip.curriculum.failure import beside_a_failure, tell_failure
from motip.curriculum.records import (
    Options,
    StageRecord,
    claim,
    finished_record,
    release,
    stage_folder,
    unfinished_run,
)
from motip.curriculum.score_table import score_rows
from motip.curriculum.stage_dashboard import StageDashboard
from motip.curriculum.stage_inputs import PACE_ONLY, datasets, job_facts, stage_job
from motip.data.convert import ConvertReport
from motip.data.manifest import Manifest, VideoEntry, entries_digest
from motip.errors import MotipError
from motip.evaluate.scores import Scores
from motip.lineage import Lineage
from motip.lineage.driver_process import this_driver
from motip.report.stage_history import epochs_told
from motip.storage.paths import Location, fetch, location, read_json, sha256, write_bytes, write_json
from motip.train.ray_train import FitResult, Placement, completed, fit, place
from motip.train.retention import best_first
from motip.train.stage_job import EpochPlans, Parent, StageJob

_log = logging.getLogger(__name__)


class Ui(Protocol):
    """Where the driver shows what happens."""

    def note(self, text: str) -> None: ...
    def converting(self, phase: str, done: int, total: int) -> None: ...
    def converted(self, report: ConvertReport) -> None: ...
    def stage_begins(self, stage: Stage, job: StageJob, folder: str) -> None: ...
    def record(self, kind: str, values: dict[str, Any]) -> None: ...
    def stage_ends(self, record: StageRecord) -> None: ...


@dataclass(frozen=True)
class Session:
    """What all stages of one run of a curriculum share."""

    curriculum: Curriculum
    options: Options
    manifest: Manifest
    cluster: Cluster | None
    lineage: Lineage
    run_id: str
    ui: Ui


def run_stage(session: Session, stage: Stage, parent: Parent | None) -> StageRecord:
    """Train a stage to its end, or return its record where it is finished and its inputs have not changed.

    Raises:
        MotipError: the stage's data, weights or configuration do not fit; what was trained so far is kept.
    """
    job, train = stage_job(session.curriculum, stage, parent, session.manifest, session.options)
    folder = stage_folder(session.curriculum, stage, job.inputs, session.options)
    done = finished_record(folder, job.inputs)
    if done is not None:
        return _tell_late(session, folder, done)
    EpochPlans(job, stage.config, max(1, session.options.workers))(0)  # no trainable clip is said now, not by workers
    placement = _placement(stage.config, session)
    done = claim(folder / "stage.json", "stage", under=session.run_id, inputs=job.inputs)
    if done is not None:  # another process has finished it since
        return _tell_late(session, folder, done)
    try:
        job = replace(job, run_id=_start_run(session, stage, job, train, folder))
        session.ui.stage_begins(stage, job, str(folder))
        return _train(session, stage, job, train, folder, placement)
    except BaseException:
        with beside_a_failure(f"{folder} stays in use by this process while it lives"):
            release(folder / "stage.json")
        raise


def _start_run(session: Session, stage: Stage, job: StageJob, train: list[VideoEntry], folder: Location) -> str:
    """The stage's MLflow run, the same one where an attempt was cut off."""
    parent = job.parent
    run_id = session.lineage.start_stage(
        session.run_id,
        stage.name,
        stage.config.to_dict(),
        entries_digest([*train, *job.val]),
        None if parent is None else {"path": parent.path, "sha256": parent.sha256, "run_id": parent.run_id},
        datasets=datasets(train, job.val),
        tags={"motip.stage_inputs": job.inputs},
        resume_run_id=unfinished_run(folder),
        free=PACE_ONLY,
    )
    running = {"status": "running", "inputs": job.inputs, "run_id": run_id}
    driven = {"driver": this_driver(), "curriculum_run": session.run_id}
    write_json(folder / "stage.json", {**running, **driven})
    write_json(folder / "config.json", stage.config.to_dict())
    write_json(folder / "job.json", job_facts(job))
    return run_id


def _train(
    session: Session, stage: Stage, job: StageJob, train: list[VideoEntry], folder: Location, placement: Placement
) -> StageRecord:
    begin = time.monotonic()
    run_id = str(job.run_id)
    keeper = Keeper(session.lineage, run_id, session.ui, folder)
    try:
        with keeper.notes_delivered():
            keeper.make_up(completed(str(folder)))
            result = fit(job, placement, str(folder), keeper)
        record = _conclude(stage, job, folder, result, train, keeper.transfer, time.monotonic() - begin)
    except BaseException as error:
        tell_failure(session.lineage, run_id, error)
        raise
    keeper.dashboard.finish()
    return _tell_end(session, folder, record)


def _tell_late(session: Session, folder: Location, record: StageRecord) -> StageRecord:
    """Tell the end of a stage whose process was killed before it could; what MLflow refuses is said once."""
    if record.told:
        return record
    try:
        return _tell_end(session, folder, record)
    except MotipError as error:
        told = replace(record, told=True)
        write_json(folder / "stage.json", asdict(replace(told, skipped=False)))
        session.ui.note(f"{record.stage} is finished, but its result is missing in MLflow: {error.what}")
        return told


def _tell_end(session: Session, folder: Location, record: StageRecord) -> StageRecord:
    """Bring a finished stage's result to MLflow; done again, it changes nothing."""
    if record.run_id is not None:
        session.lineage.log_stage_result(
            record.run_id, record.checkpoint, record.sha256, record.metrics, step=record.step
        )
        session.lineage.finish(record.run_id, "FINISHED")
    told = replace(record, told=True)
    write_json(folder / "stage.json", asdict(replace(told, skipped=False)))
    return told


def _placement(config: Config, session: Session) -> Placement:
    if session.options.workers == 0 or session.cluster is None:
        return Placement(workers=0)
    return place(session.options.workers, config, session.cluster, session.options.least_workers)


def best_epoch(result: FitResult, stage: Stage) -> int:
    """The epoch with the highest value of the stage's metric, of those whose weights are kept; the earliest of equals.

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
    """Copy the best epoch's checkpoint and write the record last: a stage is finished when its record says so."""
    best = best_epoch(result, stage)
    source = location(result.checkpoints[best])
    target = folder / "checkpoint_best.pth"
    if isinstance(target, Path):
        fetch(source, target)
    else:
        target.write_bytes(source.read_bytes())
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
        told=False,
    )
    write_json(folder / "stage.json", asdict(record))
    return record


class Keeper:
    """Pass a training's records on to MLflow, the folder and the screen."""

    def __init__(self, lineage: Lineage, run_id: str, ui: Ui, folder: Location) -> None:
        self._lineage = lineage
        self._run_id = run_id
        self._ui = ui
        self._folder = folder
        stored = folder / "transfer.json"  # only the first attempt tells of it
        self.transfer: dict[str, Any] = _without_lists(read_json(stored)) if stored.is_file() else {}
        self.dashboard = StageDashboard(lineage, run_id, folder, ui.note)
        self._notes_file = folder / "notes.txt"
        # Told again after a restart: the attempt before may have ended between writing a note and delivering it.
        self._notes = self._notes_file.read_text() if self._notes_file.is_file() else ""
        self._notes_delivered = not self._notes
        self._notes_written = True
        self._handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "step": self._stepped,
            "epoch": self._epoch_done,
            "scores": self._scores,
            "transfer": self._transferred,
            "note": self._noted,
        }

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        handler = self._handlers.get(kind)
        if handler is not None:
            handler(values)
        self._ui.record(kind, values)

    def make_up(self, stored: FitResult) -> None:
        """Deliver what is known of epochs that an attempt stored, but was killed before it told of them."""
        told = epochs_told(self._folder)
        for epoch, metrics in sorted(stored.epochs.items()):
            if epoch not in told:
                step = stored.steps[epoch]
                text = f"metrics of epoch {epoch + 1} recorded only when the stage went on"
                self._noted({"step": step, "text": text})
                scores = self._scores_file(epoch)
                if scores.is_file():
                    self._deliver_scores(epoch, read_json(scores))
                self._epoch_done({"epoch": epoch, "step": step, "metrics": metrics})

    @contextlib.contextmanager
    def notes_delivered(self) -> Iterator[None]:
        """Deliver the notes on leaving, also of a training that fails, whose error is then the one that is raised."""
        try:
            yield
        except BaseException:
            with beside_a_failure("the notes of the training could not be delivered"):
                self.deliver_notes()
            raise
        self.deliver_notes()

    def deliver_notes(self) -> None:
        """Bring the notes in MLflow up to date. Not at every note: each time it is the whole file."""
        if not self._notes_delivered:
            self._lineage.log_text(self._run_id, self._notes, "notes.txt")
            self._notes_delivered = True
        if not self._notes_written:
            self._write_notes()

    def _stepped(self, values: dict[str, Any]) -> None:
        self._metrics(values)
        self.dashboard.step(values)

    def _epoch_done(self, values: dict[str, Any]) -> None:
        self._metrics(values)
        self.dashboard.epoch(values)

    def _metrics(self, values: dict[str, Any]) -> None:
        self._lineage.log_metrics(self._run_id, values["metrics"], int(values["step"]))
        self.deliver_notes()

    def _noted(self, values: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        step = f" step {values['step']}" if "step" in values else ""
        self._notes += f"{now}{step}: {' '.join(str(values['text']).split())}\n"
        self._notes_delivered = False
        self._write_notes()

    def _write_notes(self) -> None:
        """A storage that stumbles is what notes tell of: they are kept here and written with the next record."""
        try:
            write_bytes(self._notes_file, self._notes.encode())
            self._notes_written = True
        except (MotipError, OSError) as error:
            self._notes_written = False
            _log.warning("notes.txt cannot be written yet: %s", str(error).splitlines()[0])

    def _scores(self, values: dict[str, Any]) -> None:
        write_json(self._scores_file(values["epoch"]), values["scores"])  # before MLflow, which may refuse
        self._deliver_scores(values["epoch"], values["scores"])

    def _scores_file(self, epoch: int) -> Location:
        return self._folder / "scores" / f"epoch_{epoch:03d}.json"

    def _deliver_scores(self, epoch: int, scores: dict[str, Any]) -> None:
        self._lineage.log_dict(self._run_id, scores, f"scores/epoch_{epoch:03d}.json")
        own = {source: Scores.from_json(each) for source, each in scores.items()}
        header, rows = score_rows({"": own})
        self._lineage.log_table(self._run_id, header, rows, f"evaluation/epoch_{epoch:03d}.json")

    def _transferred(self, values: dict[str, Any]) -> None:
        self.transfer = _without_lists(values)
        write_json(self._folder / "transfer.json", values)
        self._lineage.log_dict(self._run_id, values, "transfer.json")


def _without_lists(transfer: dict[str, Any]) -> dict[str, Any]:
    """A transfer report without its lines for each tensor."""
    return {key: value for key, value in transfer.items() if key not in ("file", "model")}
