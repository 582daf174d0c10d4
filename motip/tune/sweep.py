"""Sweep over one stage: search, confirmation with further seeds, decision, and the tuned values as an overlay file."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from motip.cluster import Cluster
from motip.config import Stage
from motip.config.curriculum_file import tuned_file
from motip.config.sweep_file import Prune, SweepFile, baseline_values, check_sweep
from motip.config.tuned import overlay_text
from motip.config.yaml_chain import with_values
from motip.curriculum.failure import log_exceptions, mark_run_failed
from motip.curriculum.stage import Session
from motip.curriculum.stage_inputs import NON_IDENTITY_KEYS, stage_job
from motip.data.manifest import entries_digest
from motip.errors import MotipError
from motip.lineage.provenance import provenance
from motip.stage_folder import SweepFolder
from motip.storage.atomic import digest
from motip.storage.paths import Location, absolute, location, write_bytes, write_json
from motip.train.stage_job import EpochPlans, Parent, StageJob
from motip.tune.concurrency import ConcurrencyPlan, plan_concurrency
from motip.tune.decision import SweepDecision, best_trial, decide, report_lines, setting_text
from motip.tune.sweep_log import SweepLog
from motip.tune.sweep_plot import trials_figure
from motip.tune.trial import TrialRunner, drop_weights
from motip.tune.trial_records import BASELINE, Trial, read_trials

FORMAT = 1
"""Part of every sweep's identity; incremented when the meaning of the search space changes."""


@dataclass(frozen=True)
class Tuning:
    """Settings of a sweep that come from the command line.

    Attributes:
        workers: training workers of each trial.
        trials: number of settings, baseline included; None for the sweep file's number.
        max_concurrent_trials: trials that must run concurrently; None for as many as fit.
        overlay: file for the tuned values; None for a path by the stage's name.
    """

    workers: int = 1
    trials: int | None = None
    max_concurrent_trials: int | None = None
    overlay: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep.

    Attributes:
        values: overrides for the stage's configuration; empty if the baseline is kept.
        overlay: file with these values.
    """

    stage: str
    metric: str
    decision: SweepDecision
    values: dict[str, Any]
    trials: tuple[Trial, ...]
    repeats: tuple[Trial, ...]
    folder: Location
    overlay: Location
    figure: Location
    run_id: str

    def summary(self) -> str:
        """The last line that a sweep logs."""
        best, own = self.decision.best, self.decision.baseline
        if not self.values:
            found = f"the baseline is kept ({self.metric} {own.mean:.2f}; best trial {best.key} {best.mean:.2f})"
        else:
            found = f"{setting_text(self.values)}: {self.metric} {best.mean:.2f}, baseline {own.mean:.2f}"
        return f"tuned {self.stage}: {found}; values: {self.overlay}; figure: {self.figure}"


@dataclass(frozen=True)
class _SweepRun:
    """State that the steps of one sweep share.

    Attributes:
        stage: as in :class:`motip.tune.trial.TrialRunner`.
        baseline: the configuration's values for the searched keys.
        run_id: MLflow run of the sweep.
    """

    session: Session
    stage: Stage
    sweep: SweepFile
    baseline: dict[str, Any]
    concurrency: ConcurrencyPlan
    runner: TrialRunner
    folder: SweepFolder
    run_id: str


def tune_stage(session: Session, stage: Stage, parent: Parent | None, tuning: Tuning) -> SweepResult:
    """Run the stage's sweep, or resume an interrupted one.

    Raises:
        MotipError: the sweep does not fit the stage or the cluster, or no trial finished.
        KeyboardInterrupt: interrupted; the same command resumes it.
    """
    # stage and identity of the sweep
    sweep, concurrency = check_tuning(stage, tuning, session.cluster)
    base = stage.model_copy(
        update={
            "config": with_values(stage.config, sweep.set, "set: of the sweep file"),
            "best": sweep.metric or stage.best,
        }
    )
    job, train = stage_job(session.curriculum, base, parent, session.manifest, session.options)
    EpochPlans(job, base.config, tuning.workers)(0)  # fail here, before the trials start, if no clip can be trained
    identity = _identity(job, sweep, tuning.workers)
    sweeps = absolute(session.options.storage) / "sweeps" / session.curriculum.name
    folder = SweepFolder(sweeps / stage.name / identity[:12])
    data = entries_digest([*train, *job.val])
    with _sweep_run(session, stage, sweep, identity, data, folder) as run_id:
        # search and confirmation
        runner = TrialRunner(
            curriculum=session.curriculum,
            stage=base,
            parent=parent,
            manifest=session.manifest,
            options=session.options,
            lineage=session.lineage,
            sweep_run=run_id,
            folder=str(folder),
            resources=concurrency.resources,
        )
        baseline = baseline_values(base.config, sweep.space)
        run = _SweepRun(session, base, sweep, baseline, concurrency, runner, folder, run_id)
        count = tuning.trials or sweep.trials
        session.ui.note(
            f"{stage.name}: sweep over {', '.join(sweep.space)}; {count} trials of {tuning.workers} "
            f"worker{'s' if tuning.workers != 1 else ''} each; {concurrency.calculation}; into {folder}"
        )
        trials = _search(run, count)
        repeats = _confirm(run, trials)

        # decision, written as an overlay
        decision = decide(trials, repeats, base.config.SEED)
        git = provenance()["git"]
        code = f"{git['commit'] or 'unknown'}{' with changes' if git['dirty'] else ''}"
        lines = report_lines(
            decision,
            trials,
            sweep,
            stage=stage.name,
            metric=base.best,
            videos=len(job.val),
            baseline=baseline,
            digests={"sweep": identity, "data": data, "code": code},
        )
        overlay = _overlay_location(session, stage, tuning)
        text = overlay_text(decision.values, lines)
        write_bytes(overlay, text.encode())
        write_bytes(folder.path / "tuned.yaml", text.encode())

        # figure and MLflow
        title, best = f"{stage.name}, sweep", decision.best.key
        figure = trials_figure(trials, repeats, sweep.space, baseline, title=title, metric=base.best, best=best)
        result = SweepResult(
            stage=stage.name,
            metric=base.best,
            decision=decision,
            values=decision.values,
            trials=tuple(trials),
            repeats=tuple(repeats),
            folder=folder.path,
            overlay=overlay,
            figure=_save_figure(run, figure),
            run_id=run_id,
        )
        _record_result(run, result, text)
    drop_weights(folder.path / "trials", keep=best)
    return result


def check_tuning(stage: Stage, tuning: Tuning, cluster: Cluster | None) -> tuple[SweepFile, ConcurrencyPlan]:
    """Check a sweep against its stage and the cluster, before anything is converted or trained.

    Raises:
        MotipError: it does not fit, with the calculation.
    """
    sweep = stage.sweep
    if sweep is None or cluster is None:
        raise MotipError(
            "a sweep requires a sweep file and Ray workers",
            where=f"stage {stage.name}",
            fix="give the stage a line `sweep: FILE`, and --workers-per-trial 1 or more",
        )
    check_sweep(sweep, stage.config, f"sweep of stage {stage.name}")
    without_effect = sorted(set(sweep.space) & NON_IDENTITY_KEYS)
    if without_effect:
        raise MotipError(
            f"{without_effect[0]} cannot be searched: it changes speed or paths, not the result",
            where=f"sweep of stage {stage.name}",
        )
    config = with_values(stage.config, sweep.set, "set: of the sweep file")
    return sweep, plan_concurrency(tuning.workers, config, cluster, tuning.max_concurrent_trials)


def _identity(job: StageJob, sweep: SweepFile, workers: int) -> str:
    """Hex digest of what all trials have in common; `trials` and `confirm` may change within a sweep."""
    search_settings = sweep.model_dump(mode="json", include={"search", "seed", "startup", "space", "prune"})
    return digest({"format": FORMAT, "stage": job.inputs, "sweep": search_settings, "workers": workers})


@contextlib.contextmanager
def _sweep_run(
    session: Session, stage: Stage, sweep: SweepFile, identity: str, data: str, folder: SweepFolder
) -> Iterator[str]:
    """Lock the sweep for this process and open its MLflow run; an exception in the body ends the run."""
    tags = {"mlflow.parentRunId": session.run_id} if session.run_id else {}
    tags |= {"motip.stage": stage.name, "motip.data.sha256": data, "motip.config": session.options.config_path}
    # By alias: a digest of this identifies the run, also one of version 0.1.
    facts = {"identity": identity, "stage": stage.name, "sweep": sweep.model_dump(mode="json", by_alias=True)}
    lineage, run_id = session.lineage, ""
    folder.acquire(session.run_id)
    try:
        run_id = lineage.start_curriculum(f"{stage.name} sweep", facts, tags, reopen_finished=True, kind="sweep")
        folder.start(run_id, session.run_id, identity=identity)
        yield run_id
    except BaseException as error:
        if run_id and isinstance(error, KeyboardInterrupt):
            with log_exceptions("the interrupted trials could not be marked in MLflow"):
                for trial in read_trials(folder):
                    if trial.status == "running" and trial.run_id:
                        mark_run_failed(lineage, trial.run_id, error)
        if run_id:
            mark_run_failed(lineage, run_id, error)
        with log_exceptions(f"{folder} stays locked until this process exits"):
            folder.release()
        raise


# ---------------------------------------------------------------------------------------- search and confirmation


def _search(run: _SweepRun, count: int) -> list[Trial]:
    """Train the baseline and the suggested settings, `count` in all; resumes and returns earlier trials too."""
    # records of earlier attempts
    written = [trial for trial in read_trials(run.folder) if trial.seed is None]
    # A failed baseline is repeated too: without it no trial can be compared.
    repeated = {BASELINE: ("running", "failed")}
    pending = [trial for trial in written if trial.status in repeated.get(trial.key, ("running",))]
    earlier = [trial for trial in written if trial not in pending]
    if written:
        run.session.ui.note(f"resuming: {len(earlier)} trials ended, {len(pending)} were interrupted")

    # trials
    trials = _run_trials(run, count, pending if written else [Trial(BASELINE)], earlier, run.sweep.prune)
    first = next(trial for trial in trials if trial.key == BASELINE)
    if first.status == "failed":
        raise MotipError(
            f"the baseline cannot be trained: {first.message}",
            where=f"trial {BASELINE} in {run.folder}",
            fix="train the stage without a sweep first (ray_jobs/train.py), then run the same command again",
        )
    return sorted(trials, key=lambda trial: trial.key)


def _confirm(run: _SweepRun, trials: Sequence[Trial]) -> list[Trial]:
    """Train the best trial's setting, and if configured the baseline, with further seeds and without pruning."""
    best = best_trial(trials)
    settings = [best]
    if run.sweep.confirm.baseline and best.key != BASELINE:
        settings.append(Trial(BASELINE))
    seed = run.stage.config.SEED
    seeds = range(seed + 1, seed + 1 + run.sweep.confirm.seeds)
    written = {trial.key: trial for trial in read_trials(run.folder)}
    repeats = [written.get((new := setting.repetition(each)).key, new) for each in seeds for setting in settings]
    missing = [trial for trial in repeats if trial.status != "finished"]
    if missing:
        run.session.ui.note(
            f"trial {best.key} is best so far, {best.value:.2f}; repeated with seeds "
            f"{', '.join(map(str, seeds))}{', and so is the baseline' if len(settings) > 1 else ''}"
        )
    return _run_trials(run, len(repeats), missing, [trial for trial in repeats if trial.status == "finished"])


def _run_trials(
    run: _SweepRun, count: int, pending: Sequence[Trial], earlier: Sequence[Trial], prune: Prune | None = None
) -> list[Trial]:
    """Run the pending trials, then suggested ones until there are `count`; returns the earlier ones too."""
    from motip.tune import ray_tune  # loads Ray

    log = SweepLog(run.session.ui, run.folder, count, len(earlier), run.stage.config.EPOCHS)
    space = ray_tune.SearchSpace(run.sweep, run.baseline)
    searcher = ray_tune.TrialSearch(space, log, count, pending, earlier)
    return ray_tune.search(searcher, run.runner, run.concurrency, prune)


# -------------------------------------------------------------------------------------------------------- result


def _overlay_location(session: Session, stage: Stage, tuning: Tuning) -> Location:
    """Path of the overlay: the command line's, else the stage's `tuned:`, else under configs/tuned/ by stage name.

    In a submitted job a relative path is under the storage, since the job's working directory is temporary.
    """
    own = "/".join(dict.fromkeys([session.curriculum.name, stage.name]))  # one name if they are equal
    named = Path(tuning.overlay or stage.tuned or f"configs/tuned/{own}.yaml").expanduser()
    if named.is_absolute():
        return named
    if "working_dir_files" in Path.cwd().parts:
        return location(session.options.storage) / str(named)
    if tuning.overlay is None and stage.tuned:
        return tuned_file(stage.tuned, Path(session.options.config_path)).resolve()
    return Path.cwd() / named


def _save_figure(run: _SweepRun, figure: Figure) -> Location:
    """Save the figure in the sweep's folder and in MLflow."""
    path, png = run.folder.path / "sweep.png", io.BytesIO()
    figure.savefig(png, dpi=110)
    write_bytes(path, png.getvalue())
    run.session.lineage.log_artifact(run.run_id, path)
    return path


def _record_result(run: _SweepRun, result: SweepResult, text: str) -> None:
    """Log the trials, the values and the decision to MLflow, end the run, and write `sweep.json`."""
    lineage, run_id, decision = run.session.lineage, run.run_id, result.decision

    # table of trials, and the overlay
    header = ["trial", "status", *run.baseline, "seed", "epochs", result.metric, "run"]
    rows = []
    for trial in (*result.trials, *result.repeats):
        values, seed = (run.baseline | trial.values).values(), trial.seed or decision.best.seed
        rows.append([trial.key, trial.status, *values, seed, trial.epochs, trial.value, trial.run_id])
    lineage.log_table(run_id, header, rows, "trials.json")
    lineage.log_text(run_id, text, "tuned.yaml")

    # metrics and tags
    best_so_far = 0.0
    for number, trial in enumerate(result.trials):
        if trial.value is not None:
            best_so_far = max(best_so_far, trial.value)
            lineage.log_metrics(run_id, {"trial": trial.value, "best_so_far": best_so_far}, number)
    counts = Counter(trial.status for trial in result.trials)
    lineage.log_metrics(
        run_id,
        {
            f"best_{result.metric}": decision.best.mean,
            f"baseline_{result.metric}": decision.baseline.mean,
            **{f"trials_{status}": float(counts[status]) for status in ("finished", "pruned", "failed")},
        },
        len(result.trials),
    )
    lineage.set_tags(run_id, {"motip.sweep.result": result.summary()})
    lineage.finish(run_id, "FINISHED")

    # record on disk
    write_json(
        run.folder.state_path,
        {
            "status": "finished",
            "run_id": run_id,
            "best": decision.best.key,
            "values": result.values,
            "better": decision.better,
            "overlay": str(result.overlay),
        },
    )
