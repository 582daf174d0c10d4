"""One trial of a sweep: the stage's training with some values changed, as a child run of the sweep's MLflow run."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from motip.config import Curriculum, Stage
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
from motip.tune.trial_records import Trial, read_trial, write_trial

_CHECKPOINT_LIMITS = {"CHECKPOINTS_KEPT": 1, "EPOCH_CHECKPOINTS_KEPT": 1}
"""Of a trial only the newest checkpoint, to resume from, and the best epoch's are needed."""

_PRUNED_TAG = "motip.pruned"
_TRIAL_TAG = "motip.trial"

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

    def __call__(self, key: str, report: Report) -> None:
        """Train the trial of a record, whose status is `pruned`, `finished` or `failed` afterwards.

        Raises:
            Stopped: stopped without being pruned; the record stays `running`.
            MotipError: the trial failed.
        """
        sweep = SweepFolder(self.folder)
        trial = read_trial(sweep, key)
        try:
            self._attempt(sweep, trial, report)
        except Exception as error:
            trial.status, trial.message = "failed", " ".join(str(error).split())
            if trial.inputs and not trial.run_id:
                trial.status = "running"  # not started, such as while MLflow is away: the same command repeats it
            elif not isinstance(error, MotipError):
                last = " | ".join(map(str.strip, traceback.format_exc().strip().splitlines()[-3:]))
                # Not its final status: the same command repeats the trial.
                trial.status, trial.message = "running", f"{type(error).__name__}: {error} ({last})"
            with log_exceptions(f"the record of trial {key} could not be written"):
                write_trial(sweep, trial)
            raise

    def _attempt(self, sweep: SweepFolder, trial: Trial, report: Report) -> None:
        """Train to the end or until pruned, and write the result."""
        # job
        begin = time.monotonic()
        seed = {} if trial.seed is None else {"SEED": trial.seed}
        config = with_values(self.stage.config, {**trial.values, **_CHECKPOINT_LIMITS, **seed}, f"trial {trial.key}")
        stage = self.stage.model_copy(update={"config": config})
        job, train = stage_job(self.curriculum, stage, self.parent, self.manifest, self.options)

        # MLflow run and folder
        trial.inputs, trial.run_id = job.inputs, ""
        folder = trial.folder(sweep)
        folder.complete_log()
        trial.run_id = start_stage_run(
            self.lineage,
            self.sweep_run,
            stage,
            job,
            train,
            folder,
            name=f"{stage.name} trial {trial.key}",
            tags={"motip.kind": "trial", "motip.stage": stage.name, _TRIAL_TAG: trial.key},
        )
        write_trial(sweep, trial)

        # training
        try:
            self._train(job, folder, _EpochReader(sweep, trial, stage, report))
        except BaseException as error:
            self.lineage.catch_up(trial.run_id)
            mark_run_failed(self.lineage, trial.run_id, error)
            raise
        self._record_end(trial, config.EPOCHS, folder)
        trial.seconds += time.monotonic() - begin
        write_trial(sweep, trial)

    def _train(self, job: StageJob, folder: StageFolder, epochs: _EpochReader) -> None:
        """Train and set the status. The events of earlier attempts are reported too, so that ASHA compares other trials
        with them and may prune this one."""
        trial = epochs.trial
        readers = StageReaders(self.lineage, trial.run_id, folder, _NoConsole(), epochs.read)
        try:
            fit(job, self.resources, str(folder), readers.catch_up, self.channel_name(trial.key))
        except Stopped:
            if not epochs.stopped:
                raise
        finally:
            readers.flush()
        readers.finish()
        done = completed(str(folder)).epochs
        for epoch, metrics in done.items():
            if self.stage.best in metrics:  # of an event that could not be read
                trial.history.setdefault(epoch + 1, metrics[self.stage.best])
        # A stop request after the last epoch has no effect.
        trained = max(done, default=-1) + 1
        trial.status = "finished" if trained == job.config["EPOCHS"] else "pruned"
        if trial.status == "finished" and trial.value is None:
            raise MotipError(
                f"no epoch of the trial has the metric {self.stage.best}",
                where="metric of the sweep file",
                expected="one that a stage's validation scores have",
            )

    def _record_end(self, trial: Trial, epochs: int, folder: StageFolder) -> None:
        """Log the best epoch's metrics and end the run; drops the checkpoints of a pruned trial."""
        best = next(epoch for epoch, value in sorted(trial.history.items()) if value == trial.value)
        metrics = completed(str(folder)).epochs.get(best - 1, {self.stage.best: trial.history[best]})
        self.lineage.log_metrics(trial.run_id, {f"best_{name}": value for name, value in metrics.items()}, best)
        pruned = trial.status == "pruned"
        if pruned:
            after = f"after epoch {trial.epochs} of {epochs}: others were better by then"
            self.lineage.set_tags(trial.run_id, {_PRUNED_TAG: after})
            drop_weights(folder.path)
        self.lineage.finish(trial.run_id, "KILLED" if pruned else "FINISHED")


def drop_weights(folder: Location, keep: str = "") -> None:
    """Remove the checkpoints of ended trials below a folder, except of the trial with the key `keep`; scores stay."""
    for path in files_under(folder):
        if path.name.endswith(".pth") and path.parent.parent.name.rpartition("-")[0] != keep:
            path.unlink(missing_ok=True)


class _EpochReader:
    """Reader of a trial's event log: keeps the value of every validated epoch and reports it to the scheduler.

    Attributes:
        stopped: the scheduler pruned the trial.
    """

    def __init__(self, sweep: SweepFolder, trial: Trial, stage: Stage, report: Report) -> None:
        self.trial = trial
        self.stopped = False
        self._sweep, self._stage, self._report = sweep, stage, report

    def read(self, event: Event) -> None:
        if not isinstance(event, EpochDone) or self._stage.best not in event.metrics:
            return
        trained = event.epoch + 1
        self.trial.history[trained] = event.metrics[self._stage.best]
        write_trial(self._sweep, self.trial)
        best = self.trial.best_so_far().get(trained)
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
