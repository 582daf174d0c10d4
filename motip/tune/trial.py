"""One trial of a sweep: a stage's own training with some values changed, as a child run of the sweep."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from motip.config import Config, Curriculum, Stage
from motip.config.yaml_chain import with_values
from motip.curriculum.failure import beside_a_failure, tell_failure
from motip.curriculum.records import Options
from motip.curriculum.stage import Keeper
from motip.curriculum.stage_inputs import PACE_ONLY, datasets, job_facts, stage_job
from motip.data.manifest import Manifest, entries_digest
from motip.errors import MotipError
from motip.lineage import Lineage
from motip.storage.paths import Location, files_under, location, size_and_time, write_json
from motip.train.preemption import Stopped
from motip.train.ray_train import Placement, completed, fit
from motip.train.stage_job import Parent, StageJob
from motip.tune.ray_tune import Report
from motip.tune.searcher import Ask, Told
from motip.tune.sweep_records import read_trial, write_trial

KEPT = {"CHECKPOINTS_KEPT": 1, "EPOCH_CHECKPOINTS_KEPT": 1}
"""A trial is there for its score: the newest position to go on from, and its best epoch."""

PRUNED_TAG = "motip.pruned"
TRIAL_TAG = "motip.trial"


@dataclass(frozen=True)
class TrialRunner:
    """Runs trials in processes of their own; plain data, so that it travels there.

    Attributes:
        stage: with the values that hold for every trial in its configuration, and the sweep's metric as `best`.
        sweep_run: MLflow run that the trials are children of.
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
    placement: Placement

    def __call__(self, ask: Ask, report: Report) -> Told:
        """Train with these values; `pruned`, `finished` or `failed`.

        Raises:
            Stopped: it was told to end for another reason than its score; the record stays `running`.
        """
        begin = time.monotonic()
        place = location(self.folder)
        earlier = read_trial(place, ask.key)
        told = Told(ask, history={int(epoch): value for epoch, value in earlier.get("history", {}).items()})
        try:
            config = trial_config(self.stage.config, ask)
            stage = self.stage.model_copy(update={"config": config})
            job, train = stage_job(self.curriculum, stage, self.parent, self.manifest, self.options)
        except MotipError as error:
            told.status, told.message = "failed", " ".join(str(error).split())
            write_trial(place, told)
            return told
        parent = None if self.parent is None else _as_dict(self.parent)
        run_id = self.lineage.start_stage(
            self.sweep_run,
            f"{self.stage.name} trial {ask.key}",
            config.to_dict(),
            entries_digest([*train, *job.val]),
            parent,
            datasets=datasets(train, job.val),
            tags={"motip.kind": "trial", "motip.stage": self.stage.name, TRIAL_TAG: ask.key},
            resume_run_id=earlier.get("run_id"),
            free=PACE_ONLY,
        )
        write_trial(place, told, run_id=run_id, inputs=job.inputs)
        own = place / "trials" / f"{ask.key}-{job.inputs[:12]}"
        write_json(own / "stage.json", {"status": "running", "inputs": job.inputs, "run_id": run_id})
        write_json(own / "config.json", config.to_dict())
        write_json(own / "job.json", job_facts(job))
        keeper = _TrialKeeper(self.lineage, run_id, report, own, told, self.stage.best, config.EPOCHS, place)
        try:
            told = self._train(job, own, keeper, report, told)
        except BaseException as error:
            if isinstance(error, MotipError):
                told.status, told.message = "failed", " ".join(str(error).split())
                with beside_a_failure(f"the record of trial {ask.key} could not be written"):
                    write_trial(place, told, seconds=time.monotonic() - begin)
            tell_failure(self.lineage, run_id, error)
            raise
        self._tell_ending(run_id, told, config.EPOCHS, own)
        seconds = float(earlier.get("seconds", 0.0)) + time.monotonic() - begin
        write_trial(place, told, seconds=seconds)
        return told

    def _train(self, job: StageJob, own: Location, keeper: _TrialKeeper, report: Report, told: Told) -> Told:
        try:
            with keeper.notes_delivered():
                keeper.make_up(completed(str(own)))
                self._tell_again(job, own, report, told)
                fit(job, self.placement, str(own), keeper)
            told.status = "finished"
        except Stopped:
            if not report.pruned:
                raise
            told.status = "pruned"
        keeper.dashboard.finish()
        if self._recall(own, told) == job.config["EPOCHS"]:
            told.status = "finished"  # the word to end came after its last epoch
        if told.status == "finished" and told.value is None:
            raise MotipError(
                f"no epoch of the trial has the metric {self.stage.best}",
                where="metric of the sweep file",
                expected="one that a stage's validation scores have",
            )
        return told

    def _tell_again(self, job: StageJob, own: Location, report: Report, told: Told) -> None:
        """What the trial reached before it was cut off: others are judged by it, and it may be given up right away.

        Raises:
            Stopped: so it is.
        """
        self._recall(own, told)
        for epochs, value in told.best_so_far().items():
            report.value(epochs, value, job.config["EPOCHS"])

    def _recall(self, own: Location, told: Told) -> int:
        """Complete the history from the checkpoints, which know all attempts; returns how many epochs are done."""
        epochs = completed(str(own)).epochs
        for epoch, metrics in epochs.items():
            if self.stage.best in metrics:
                told.history[epoch + 1] = metrics[self.stage.best]
        return max(epochs, default=-1) + 1

    def _tell_ending(self, run_id: str, told: Told, epochs: int, own: Location) -> None:
        best = next(epoch for epoch, value in sorted(told.history.items()) if value == told.value)
        metrics = completed(str(own)).epochs.get(best - 1, {self.stage.best: told.history[best]})
        self.lineage.log_metrics(run_id, {f"best_{name}": value for name, value in metrics.items()}, best)
        if told.status == "pruned":
            after = max(told.history)
            self.lineage.set_tags(run_id, {PRUNED_TAG: f"after epoch {after} of {epochs}: others were better by then"})
            drop_weights(own)
        self.lineage.finish(run_id, "KILLED" if told.status == "pruned" else "FINISHED")


def trial_config(config: Config, ask: Ask) -> Config:
    """The configuration of a trial: the base with its values, its seed, and no more checkpoints than needed."""
    seed = {} if ask.seed is None else {"SEED": ask.seed}
    return with_values(config, {**ask.values, **KEPT, **seed}, f"trial {ask.key}")


def drop_weights(folder: Location) -> int:
    """Remove the checkpoints of a trial that is over; what it scored stays. Returns bytes freed."""
    freed = 0
    for path in files_under(folder):
        if path.name.endswith(".pth"):
            freed += size_and_time(path)[0]
            path.unlink(missing_ok=True)
    return freed


def _as_dict(parent: Parent) -> dict[str, str | None]:
    return {"path": parent.path, "sha256": parent.sha256, "run_id": parent.run_id}


class _TrialKeeper(Keeper):
    """Keeps what a stage keeps, and tells the sweep the value of every validated epoch."""

    def __init__(
        self,
        lineage: Lineage,
        run_id: str,
        report: Report,
        own: Location,
        told: Told,
        metric: str,
        epochs: int,
        sweep_folder: Location,
    ) -> None:
        super().__init__(lineage, run_id, _TrialUi(report), own)
        self._report, self._told, self._metric, self._epochs = report, told, metric, epochs
        self._sweep_folder = sweep_folder

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        super().__call__(kind, values)
        if kind == "step":
            self._report.at(f"epoch {values['epoch'] + 1}/{self._epochs}, step {values['index'] + 1}/{values['of']}")
        elif kind == "epoch" and self._metric in values["metrics"]:
            trained = values["epoch"] + 1
            self._told.history[trained] = float(values["metrics"][self._metric])
            write_trial(self._sweep_folder, self._told)
            best = self._told.best_so_far().get(trained)
            if best is not None:
                self._report.value(trained, best, self._epochs)


class _TrialUi:
    """What a stage shows, said through the sweep where it matters there."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def note(self, text: str) -> None:
        self._report.say(text)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        if kind == "note":
            self._report.say(str(values["text"]))

    def converting(self, phase: str, done: int, total: int) -> None:
        """A trial converts nothing."""

    def converted(self, report: Any) -> None:
        """A trial converts nothing."""

    def stage_begins(self, stage: Any, job: Any, folder: str) -> None:
        """The sweep says so."""

    def stage_ends(self, record: Any) -> None:
        """The sweep says so."""
