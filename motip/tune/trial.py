"""One trial of a sweep: the stage's training with some values changed, as a child run of the sweep's MLflow run."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from motip.config import Config, Curriculum, Stage
from motip.config.yaml_chain import with_values
from motip.curriculum.failure import log_exceptions, mark_run_failed
from motip.curriculum.options import Options
from motip.curriculum.stage import start_stage_run
from motip.curriculum.stage_inputs import stage_job
from motip.curriculum.stage_readers import StageReaders
from motip.data.manifest import Manifest
from motip.errors import MotipError
from motip.events import EpochDone, Event
from motip.lineage import Lineage
from motip.stage_folder import StageFolder, SweepFolder
from motip.storage.paths import Location, files_under
from motip.train.preemption import Stopped
from motip.train.ray_train import ResourcePlan, completed, fit
from motip.train.stage_job import Parent, StageJob
from motip.tune.trial_records import TrialResult, TrialSpec, read_record, read_trial, write_trial

CHECKPOINT_LIMITS = {"CHECKPOINTS_KEPT": 1, "EPOCH_CHECKPOINTS_KEPT": 1}
"""Of a trial only the newest checkpoint, to resume from, and the best epoch's are needed."""

PRUNED_TAG = "motip.pruned"
TRIAL_TAG = "motip.trial"

Report = Callable[[int, float, int], None]
"""Reports the best value after so many of so many epochs to the scheduler; may raise Stopped: the trial is pruned."""


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

    def channel_name(self, key: str) -> str:
        """Name of a trial's run channel, through which it is requested to stop."""
        return f"trial {key} of {self.sweep_run}"

    def __call__(self, spec: TrialSpec, report: Report) -> None:
        """Train with these values; afterwards the status in the trial's record is `pruned`, `finished` or `failed`.

        Raises:
            Stopped: stopped without being pruned; the record stays `running`.
            MotipError: the trial failed.
        """
        sweep = SweepFolder(self.folder)
        result = read_trial(sweep, spec)
        try:
            self._attempt(sweep, result, report)
        except Exception as error:
            if isinstance(error, MotipError):
                result.status, result.message = "failed", " ".join(str(error).split())
            else:  # the status stays `running`: the same command repeats the trial
                last = " | ".join(map(str.strip, traceback.format_exc().strip().splitlines()[-3:]))
                result.message = f"{type(error).__name__}: {error} ({last})"
            with log_exceptions(f"the record of trial {spec.key} could not be written"):
                write_trial(sweep, result)
            raise

    def _attempt(self, sweep: SweepFolder, result: TrialResult, report: Report) -> None:
        """Train to the end or until pruned; completes the result and writes it."""
        # job
        begin, spec = time.monotonic(), result.spec
        stage = self.stage.model_copy(update={"config": trial_config(self.stage.config, spec)})
        job, train = stage_job(self.curriculum, stage, self.parent, self.manifest, self.options)

        # MLflow run and folder
        folder = sweep.trial(spec.key, job.inputs)
        folder.complete_log()
        run_id = start_stage_run(
            self.lineage,
            self.sweep_run,
            stage,
            job,
            train,
            folder,
            name=f"{stage.name} trial {spec.key}",
            tags={"motip.kind": "trial", "motip.stage": stage.name, TRIAL_TAG: spec.key},
        )
        write_trial(sweep, result, run_id=run_id, inputs=job.inputs)

        # training
        try:
            self._train(job, folder, run_id, _EpochReader(sweep, result, stage, report))
        except BaseException as error:
            self.lineage.catch_up(run_id)
            mark_run_failed(self.lineage, run_id, error)
            raise
        self._record_end(run_id, result, stage.config.EPOCHS, folder)
        seconds = read_record(sweep, spec.key).get("seconds", 0.0) + time.monotonic() - begin
        write_trial(sweep, result, seconds=seconds)

    def _train(self, job: StageJob, folder: StageFolder, run_id: str, epochs: _EpochReader) -> None:
        """Train; sets the result's status. The events of earlier attempts are reported too, so that ASHA compares other
        trials with them and may prune this one."""
        result = epochs.result
        readers = StageReaders(self.lineage, run_id, folder, _NoConsole(), epochs.read)
        try:
            fit(job, self.resources, str(folder), readers.catch_up, self.channel_name(result.spec.key))
        except Stopped:
            if not epochs.stopped:
                raise
        readers.finish()
        # A stop request after the last epoch has no effect.
        trained = max(completed(str(folder)).epochs, default=-1) + 1
        result.status = "finished" if trained == job.config["EPOCHS"] else "pruned"
        if result.status == "finished" and result.value is None:
            raise MotipError(
                f"no epoch of the trial has the metric {self.stage.best}",
                where="metric of the sweep file",
                expected="one that a stage's validation scores have",
            )

    def _record_end(self, run_id: str, result: TrialResult, epochs: int, folder: StageFolder) -> None:
        """Log the best epoch's metrics and end the run; drops the checkpoints of a pruned trial."""
        best = next(epoch for epoch, value in sorted(result.history.items()) if value == result.value)
        metrics = completed(str(folder)).epochs.get(best - 1, {self.stage.best: result.history[best]})
        self.lineage.log_metrics(run_id, {f"best_{name}": value for name, value in metrics.items()}, best)
        if result.status == "pruned":
            after = max(result.history)
            self.lineage.set_tags(run_id, {PRUNED_TAG: f"after epoch {after} of {epochs}: others were better by then"})
            drop_weights(folder.path)
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


class _EpochReader:
    """Reader of a trial's event log: keeps the value of every validated epoch and reports it to the scheduler.

    Attributes:
        stopped: the scheduler pruned the trial.
    """

    def __init__(self, sweep: SweepFolder, result: TrialResult, stage: Stage, report: Report) -> None:
        self.result = result
        self.stopped = False
        self._sweep, self._stage, self._report = sweep, stage, report

    def read(self, event: Event) -> None:
        if not isinstance(event, EpochDone) or self._stage.best not in event.metrics:
            return
        trained = event.epoch + 1
        self.result.history[trained] = event.metrics[self._stage.best]
        write_trial(self._sweep, self.result)
        best = self.result.best_so_far().get(trained)
        if best is not None and not self.stopped:
            try:
                self._report(trained, best, self._stage.config.EPOCHS)
            except Stopped:
                self.stopped = True
                raise


class _NoConsole:
    """The sweep's driver shows the notes and positions of its trials."""

    def event(self, event: Event) -> None:
        """Nothing is shown."""
