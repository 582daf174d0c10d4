"""One trial of a sweep: the stage's training with some values changed, as a child run of the sweep's MLflow run."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from motip.config import Config, Curriculum, Stage
from motip.config.yaml_chain import with_values
from motip.curriculum.failure import log_exceptions, mark_run_failed
from motip.curriculum.records import Options
from motip.curriculum.stage_inputs import RESUMABLE_KEYS, datasets, job_facts, stage_job
from motip.curriculum.stage_recorder import StageRecorder
from motip.data.manifest import Manifest, entries_digest
from motip.errors import MotipError
from motip.lineage import Lineage
from motip.storage.paths import Location, files_under, location, write_json
from motip.train.preemption import Stopped
from motip.train.ray_train import ResourcePlan, completed, fit
from motip.train.stage_job import Parent, StageJob
from motip.tune.trial_records import TrialResult, TrialSpec, read_record, read_trial, write_trial

if TYPE_CHECKING:
    from motip.tune.ray_tune import TrialReporter

CHECKPOINT_LIMITS = {"CHECKPOINTS_KEPT": 1, "EPOCH_CHECKPOINTS_KEPT": 1}
"""Of a trial only the newest checkpoint, to resume from, and the best epoch's are needed."""

PRUNED_TAG = "motip.pruned"
TRIAL_TAG = "motip.trial"


@dataclass(frozen=True)
class TrialRunner:
    """Runs a trial in its process; picklable.

    Attributes:
        stage: the sweep file's `set:` values are in its configuration, the sweep's metric is its `best`.
        sweep_run: parent MLflow run of the trials.
        folder: of the sweep.
    """

    curriculum: Curriculum
    stage: Stage
    parent: Parent | None
    manifest: Manifest
    options: Options
    lineage: Lineage
    sweep_run: str
    folder: str
    resources: ResourcePlan

    def __call__(self, spec: TrialSpec, reporter: TrialReporter) -> None:
        """Train with these values; the trial's record says `pruned`, `finished` or `failed` afterwards.

        Raises:
            Stopped: stopped without being pruned; the record stays `running`.
            MotipError: the trial failed.
        """
        sweep_folder = location(self.folder)
        result = read_trial(sweep_folder, spec)
        try:
            self._attempt(sweep_folder, result, reporter)
        except Exception as error:
            result.message = " ".join(str(error).split())
            if isinstance(error, MotipError):
                result.status = "failed"
            else:  # not final: the same command repeats the trial
                last = " | ".join(map(str.strip, traceback.format_exc().strip().splitlines()[-3:]))
                result.message = f"{type(error).__name__}: {error} ({last})"
            with log_exceptions(f"the record of trial {spec.key} could not be written"):
                write_trial(sweep_folder, result)
            raise

    def _attempt(self, sweep_folder: Location, result: TrialResult, reporter: TrialReporter) -> None:
        # configuration, and the record of an interrupted attempt
        begin = time.monotonic()
        spec, earlier = result.spec, read_record(sweep_folder, result.spec.key)
        result.status, result.message = "running", ""
        config = trial_config(self.stage.config, spec)
        stage = self.stage.model_copy(update={"config": config})
        job, train = stage_job(self.curriculum, stage, self.parent, self.manifest, self.options)

        # MLflow run and folder
        run_id = self.lineage.start_stage(
            self.sweep_run,
            f"{self.stage.name} trial {spec.key}",
            config.to_dict(),
            entries_digest([*train, *job.val]),
            None if self.parent is None else self.parent.to_dict(),
            datasets=datasets(train, job.val),
            tags={"motip.kind": "trial", "motip.stage": self.stage.name, TRIAL_TAG: spec.key},
            resume_run_id=earlier.get("run_id"),
            resumable_keys=RESUMABLE_KEYS,
        )
        write_trial(sweep_folder, result, run_id=run_id, inputs=job.inputs)
        folder = sweep_folder / "trials" / f"{spec.key}-{job.inputs[:12]}"
        write_json(folder / "stage.json", {"status": "running", "inputs": job.inputs, "run_id": run_id})
        write_json(folder / "config.json", config.to_dict())
        write_json(folder / "job.json", job_facts(job))

        # training
        recorder = _TrialRecorder(
            self.lineage,
            run_id,
            reporter,
            folder,
            result=result,
            metric=self.stage.best,
            epochs=config.EPOCHS,
            sweep_folder=sweep_folder,
        )
        try:
            self._train(job, folder, recorder, reporter, result)
        except BaseException as error:
            mark_run_failed(self.lineage, run_id, error)
            raise
        self._record_end(run_id, result, config.EPOCHS, folder)
        write_trial(sweep_folder, result, seconds=earlier.get("seconds", 0.0) + time.monotonic() - begin)

    def _train(
        self, job: StageJob, folder: Location, recorder: _TrialRecorder, reporter: TrialReporter, result: TrialResult
    ) -> None:
        """Train to the end or until pruned; fills in the result's status and history."""
        try:
            with recorder.notes_delivered():
                recorder.backfill(completed(str(folder)))
                self._report_earlier_epochs(job, folder, reporter, result)
                fit(job, self.resources, str(folder), recorder)
            result.status = "finished"
        except Stopped:
            if not reporter.pruned:
                raise
            result.status = "pruned"
        recorder.dashboard.finish()
        if self._restore_history(folder, result) == job.config["EPOCHS"]:
            result.status = "finished"  # the pruning request arrived after the last epoch
        if result.status == "finished" and result.value is None:
            raise MotipError(
                f"no epoch of the trial has the metric {self.stage.best}",
                where="metric of the sweep file",
                expected="one that a stage's validation scores have",
            )

    def _report_earlier_epochs(
        self, job: StageJob, folder: Location, reporter: TrialReporter, result: TrialResult
    ) -> None:
        """Report the epochs of an interrupted attempt: ASHA compares other trials with them and may prune this one.

        Raises:
            Stopped: the trial is pruned.
        """
        self._restore_history(folder, result)
        for epochs, value in result.best_so_far().items():
            reporter.report_value(epochs, value, job.config["EPOCHS"])

    def _restore_history(self, folder: Location, result: TrialResult) -> int:
        """Complete the history from the checkpoints, which cover all attempts; returns the number of epochs done."""
        epochs = completed(str(folder)).epochs
        for epoch, metrics in epochs.items():
            if self.stage.best in metrics:
                result.history[epoch + 1] = metrics[self.stage.best]
        return max(epochs, default=-1) + 1

    def _record_end(self, run_id: str, result: TrialResult, epochs: int, folder: Location) -> None:
        """Log the best epoch's metrics and end the run; drops the checkpoints of a pruned trial."""
        best = next(epoch for epoch, value in sorted(result.history.items()) if value == result.value)
        metrics = completed(str(folder)).epochs.get(best - 1, {self.stage.best: result.history[best]})
        self.lineage.log_metrics(run_id, {f"best_{name}": value for name, value in metrics.items()}, best)
        if result.status == "pruned":
            after = max(result.history)
            self.lineage.set_tags(run_id, {PRUNED_TAG: f"after epoch {after} of {epochs}: others were better by then"})
            drop_weights(folder)
        self.lineage.finish(run_id, "KILLED" if result.status == "pruned" else "FINISHED")


def trial_config(config: Config, spec: TrialSpec) -> Config:
    """The configuration of a trial: the base with the trial's values and seed, and the checkpoint limits."""
    seed = {} if spec.seed is None else {"SEED": spec.seed}
    return with_values(config, {**spec.values, **CHECKPOINT_LIMITS, **seed}, f"trial {spec.key}")


def drop_weights(folder: Location) -> None:
    """Remove the checkpoints of an ended trial; its scores stay."""
    for path in files_under(folder):
        if path.name.endswith(".pth"):
            path.unlink(missing_ok=True)


class _TrialRecorder(StageRecorder):
    """Records a stage's events, and reports the value of every validated epoch to the sweep."""

    def __init__(
        self,
        lineage: Lineage,
        run_id: str,
        reporter: TrialReporter,
        folder: Location,
        *,
        result: TrialResult,
        metric: str,
        epochs: int,
        sweep_folder: Location,
    ) -> None:
        super().__init__(lineage, run_id, _TrialUi(reporter), folder)
        self._reporter, self._result, self._metric, self._epochs = reporter, result, metric, epochs
        self._sweep_folder = sweep_folder

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        super().__call__(kind, values)
        if kind == "step":
            position = f"epoch {values['epoch'] + 1}/{self._epochs}, step {values['index'] + 1}/{values['of']}"
            self._reporter.report_position(position)
        elif kind == "epoch" and self._metric in values["metrics"]:
            trained = values["epoch"] + 1
            self._result.history[trained] = float(values["metrics"][self._metric])
            write_trial(self._sweep_folder, self._result)
            best = self._result.best_so_far().get(trained)
            if best is not None:
                self._reporter.report_value(trained, best, self._epochs)


class _TrialUi:
    """Sends a training's notes to the sweep's driver and ignores its other events."""

    def __init__(self, reporter: TrialReporter) -> None:
        self.note = reporter.log

    def record(self, kind: str, values: dict[str, Any]) -> None:
        if kind == "note":
            self.note(str(values["text"]))
