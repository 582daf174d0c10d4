"""Trials of a sweep on Ray Tune: Optuna's suggestions, ASHA, clean-up. The only module that imports `ray.tune`.

A trial is a process that trains a stage on its own workers. A pruned trial is requested to stop instead of being
killed, because workers whose driver was killed hold their CPUs and GPUs for minutes. The trials write their own
records, so resuming after an interruption needs none of Tune's files. Callers import this module when a sweep begins,
since it loads Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from motip.config.sweep_file import Prune
from motip.errors import MotipError
from motip.train.ray_train import ResourcePlan, request_stop
from motip.tune.concurrency import ConcurrencyPlan
from motip.tune.search_space import SearchSpace
from motip.tune.sweep_log import SweepLog
from motip.tune.trial import TrialRunner
from motip.tune.trial_records import BASELINE, Trial

_log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 200
"""Samples per suggestion; if all of them were tried before, the space counts as exhausted."""
_MAX_EPOCHS = 1_000_000
"""Upper bound of ASHA's epochs, more than any training has."""

_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # records are kept in MLflow and beside the checkpoints
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails has no metric
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def search(
    searcher: TrialSearch,
    runner: TrialRunner,
    concurrency: ConcurrencyPlan,
    prune: Prune | None = None,
) -> list[Trial]:
    """Run the searcher's trials; returns all results, earlier ones included.

    Args:
        runner: trains a trial, and writes its result to the trial's record.
        prune: ASHA, which compares with earlier trials too; None trains every trial to its end.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; running trials have no final status.
    """
    if searcher.is_done():
        return list(searcher.trials.values())

    # trials, on the driver's node, where MLflow's database and local storage are; they cost no CPU there
    os.environ.update(_TUNE_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # the rest names temporary files and repeats progress lines
    here = ray.get_runtime_context().get_node_id()
    trial = tune.with_resources(
        tune.with_parameters(_trial, runner=runner), tune.PlacementGroupFactory([{_node_resource(here): 0.001}])
    )
    scheduler = None
    if prune is not None:
        scheduler = CooperativeASHA(lambda key: request_stop(runner.channel_name(key)), prune, searcher.trials.values())

    # run
    folder = tempfile.mkdtemp(prefix="motip_tune_")
    callback = ProgressCallback(searcher, _resources_text(concurrency.resources))
    try:
        tuner = tune.Tuner(
            trial,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=concurrency.max_concurrent_trials,
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(name="sweep", storage_path=folder, verbose=0, callbacks=[callback]),
        )
        with _sigterm_as_interrupt():
            tuner.fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if searcher.running or not searcher.is_done():
        raise KeyboardInterrupt
    return list(searcher.trials.values())


def _trial(config: dict[str, Any], runner: TrialRunner) -> None:
    """Entry point of a trial's process."""
    # As `connect` sets them for the driver; processes on a joined cluster do not inherit them.
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

    def report(epochs: int, value: float, of: int) -> None:
        tune.report({"epochs": epochs, "value": value, "of": of})

    try:
        runner(config["key"], report)
    except MotipError:
        pass  # it is in the trial's record
    except Exception:
        _log.exception("trial %s failed", config["key"])


class _InDriver:
    """State that stays in the driver: Tune copies and saves its parts, but a sweep resumes from its trials' records."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()


class TrialSearch(_InDriver, Searcher):
    """Starts the pending trials, then settings suggested by Optuna, none of them twice.

    Args:
        count: number of trials in all; a pending one is always started.
        pending: trials to start first: the baseline, interrupted ones, repetitions.
        earlier: trials that ended; the study has their values.

    Attributes:
        trials: all trials by key, in the order of their start.
        running: trials without a final status, by Tune's id.
    """

    def __init__(
        self,
        space: SearchSpace,
        log: SweepLog,
        count: int,
        pending: Sequence[Trial],
        earlier: Sequence[Trial],
    ) -> None:
        super().__init__(metric="value", mode="max")
        self.trials = {trial.key: trial for trial in earlier}
        self.running: dict[str, Trial] = {}
        self._space, self.log, self._count, self._pending = space, log, count, list(pending)
        self._in_study: dict[str, str] = {}  # Tune's id to the id in the study
        self._exhausted = False
        points = [point for trial in pending if (point := self._parameters(trial)) is not None]
        self._study = OptunaSearch(
            space.distributions(),
            metric="value",
            mode="max",
            points_to_evaluate=points,
            sampler=space.sampler(len(earlier)),
        )
        for trial in earlier:
            self._add_to_study(trial)

    def is_done(self) -> bool:
        """No trial is left to start; an exhausted space is logged once."""
        if BASELINE in self.trials and self.trials[BASELINE].status == "failed":
            return True  # no trial can be compared
        if self._pending:
            return False
        if len(self.trials) >= self._count or self._exhausted:
            return True
        return len(self._tried()) >= self._space.sweep.size() and self._exhaust()

    def suggest(self, trial_id: str) -> Any:
        """Tune's configuration of the next trial, or `FINISHED`."""
        trial = None if self.is_done() else self._next(trial_id)
        if trial is None:
            return Searcher.FINISHED
        self.log.trial_started(trial)
        self.running[trial_id] = self.trials[trial.key] = trial
        return {"key": trial.key}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self._in_study and "value" in result:
            self._study.on_trial_result(self._in_study[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        key = self.running.pop(trial_id).key
        trial = self.trials[key] = self.log.trial_ended(key)
        if trial_id in self._in_study:
            # Without a value and an error the study counts a trial as pruned.
            value = trial.value if trial.status == "finished" else None
            self._study.on_trial_complete(self._in_study[trial_id], {"value": value}, trial.status == "failed")

    def _next(self, trial_id: str) -> Trial | None:
        if self._pending:
            trial = self._pending.pop(0)
            if self._parameters(trial) is not None:
                self._in_study[trial_id] = trial_id
                self._study.suggest(trial_id)  # the study's queued point of this trial
            return trial
        number = 1 + max(int(trial.key) for trial in self.trials.values())
        tried = self._tried()
        for attempt in range(_MAX_ATTEMPTS):
            in_study = f"{trial_id}-{attempt}"
            values = self._space.values(self._study.suggest(in_study) or {})
            if self._space.parameters(values) not in tried:
                self._in_study[trial_id] = in_study
                return Trial(f"{number:03d}", values)
            # A duplicate stays open in the study, which makes TPE sample elsewhere.
        self._exhaust()
        return None

    def _tried(self) -> list[dict[str, Any]]:
        """The different settings inside the space of all trials so far."""
        tried: list[dict[str, Any]] = []
        for trial in self.trials.values():
            point = self._parameters(trial)
            if point is not None and point not in tried:
                tried.append(point)
        return tried

    def _exhaust(self) -> bool:
        self._exhausted = True
        self.log.note(f"the search space is exhausted after {len(self.trials)} settings")
        return True

    def _parameters(self, trial: Trial) -> dict[str, Any] | None:
        """The trial's point in the study; None for a baseline outside the space, and for a repetition."""
        return None if trial.seed is not None else self._space.parameters(trial.values)

    def _add_to_study(self, trial: Trial) -> None:
        point, rising = self._parameters(trial), list(trial.best_so_far().values())
        if point is None:
            return
        if trial.status not in ("finished", "pruned") or not rising:
            self._study.add_evaluated_point(point, 0.0, error=True)
            return
        # Tune counts the reports of a running trial from 1, this list begins at 0.
        reports = [rising[0], *rising]
        self._study.add_evaluated_point(point, rising[-1], pruned=trial.status == "pruned", intermediate_values=reports)


class CooperativeASHA(_InDriver, AsyncHyperBandScheduler):
    """ASHA that requests a trial to stop instead of killing it.

    Args:
        stop: requests the trial of a key to stop.
        earlier: ended trials, which running ones are compared with too.
    """

    def __init__(self, stop: Callable[[str], None], prune: Prune, earlier: Iterable[Trial]) -> None:
        super().__init__(
            time_attr="epochs",
            metric="value",
            mode="max",
            max_t=_MAX_EPOCHS,
            grace_period=prune.first,
            reduction_factor=prune.reduction,
            stop_last_trials=False,
        )
        self._stop = stop
        controller: Any = None  # an argument of ASHA's methods, which do not use it
        for result in earlier:
            # An interrupted trial reports its epochs again when it resumes.
            if result.status != "running":
                ended: Any = SimpleNamespace(trial_id=result.key)
                super().on_trial_add(controller, ended)
                for epochs, value in result.best_so_far().items():
                    super().on_trial_result(controller, ended, {"epochs": epochs, "value": value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        # The baseline is never pruned: all other trials are compared with it.
        key = trial.config["key"]
        if decision == self.STOP and result["epochs"] < result["of"] and key != BASELINE:
            self._stop(key)
        return str(self.CONTINUE)


class ProgressCallback(_InDriver, tune.Callback):
    """Shows the progress of the trials while they run.

    Args:
        resources: of a trial.
    """

    def __init__(self, searcher: TrialSearch, resources: str) -> None:
        self._searcher, self._resources = searcher, resources

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self._searcher.log.poll(self._searcher.trials.values(), self._needed_and_free)

    def _needed_and_free(self) -> str:
        free = {name: f"{amount:g}" for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        have = ", ".join(f"{amount} {name}" for name, amount in sorted(free.items())) or "none"
        return f"it needs {self._resources}; free now: {have}"


def _resources_text(resources: ResourcePlan) -> str:
    gpu = " and 1 GPU" if resources.gpu else ""
    text = f"{resources.workers} x ({resources.cpus:g} CPU{gpu}) for workers"
    decoders = resources.workers * resources.decoders
    return text + (f", {decoders} x {resources.decoder_cpus:g} CPU for decoding" if decoders else "")


def _node_resource(node_id: str) -> str:
    """Name of the resource that only this node has."""
    own = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    return next(name for name in own["Resources"] if name.startswith("node:") and name != "node:__internal_head__")


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Forward SIGTERM, sent by `ray job stop`, as SIGUSR1, upon which Tune ends its trials and returns."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
