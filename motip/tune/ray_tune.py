"""Trial scheduling on Ray Tune: concurrency, ASHA pruning, clean-up. The only module that imports `ray.tune`.

A trial is a process that trains a stage on its own workers. A pruned trial is requested to stop instead of being
killed, because workers whose driver was killed hold their CPUs and GPUs for minutes. The caller stores the trials'
results, so resuming after an interruption needs none of Tune's files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Protocol

from motip.cluster import Cluster
from motip.config import Config
from motip.config.sweep_file import Prune
from motip.errors import MotipError
from motip.train.preemption import Stopped
from motip.train.ray_train import ResourcePlan, plan_resources
from motip.tune.searcher import TrialResult, TrialSpec

_log = logging.getLogger(__name__)

DECODER_CPUS = 0.5
"""CPUs that a decoding actor should have if trials run concurrently."""
STATUS_INTERVAL_S = 60.0
"""Seconds without output after which a trial logs what it waits for; also the interval of progress lines."""

NextTrial = Callable[[Sequence[TrialResult]], TrialSpec | None]
"""The next training, given all so far (running ones included); None to end the search."""


class RunTrial(Protocol):
    """One training, in a separate process; must be picklable."""

    def __call__(self, spec: TrialSpec, reporter: TrialReporter) -> TrialResult: ...


class SweepObserver(Protocol):
    """Callbacks in the driver."""

    def trial_started(self, result: TrialResult) -> None: ...
    def trial_ended(self, result: TrialResult) -> None: ...
    def message(self, text: str) -> None: ...
    def progress(self, trials: Sequence[TrialResult], running: dict[str, str]) -> None: ...


@dataclass(frozen=True)
class ConcurrencyPlan:
    """Number of concurrent trials, the resources of each, and the calculation as text."""

    max_concurrent_trials: int
    resources: ResourcePlan
    calculation: str


def plan_concurrency(workers: int, config: Config, cluster: Cluster, requested: int | None = None) -> ConcurrencyPlan:
    """Divide a cluster among trials; raise, with the calculation, for a request that would wait forever.

    With GPUs a trial takes one per worker. Without, it takes a CPU per worker and half a CPU per decoding actor; if
    even a single trial exceeds that, it runs alone and shares the CPUs.

    Args:
        workers: training workers of each trial.
        requested: trials that must fit concurrently; None for as many as fit.

    Raises:
        MotipError: a single trial does not fit, or fewer trials than requested.
    """
    # one trial
    if workers < 1:
        raise MotipError(
            "a trial needs at least one worker",
            where="--workers-per-trial",
            found=workers,
            expected="1 or more",
        )
    try:
        alone = plan_resources(workers, config, cluster)
    except MotipError as error:
        raise MotipError(
            f"a single trial does not fit: {error.what}",
            where="--workers-per-trial",
            found=error.found,
            expected=error.expected,
            fix="lower --workers-per-trial, or add nodes",
        ) from None

    # trials that fit, by CPUs and by GPUs
    cpus = workers * (1 + DECODER_CPUS * alone.decoders)
    fit_cpus = math.floor(cluster.cpus / cpus + 1e-9)
    parts = [f"{cluster.cpus:g} CPUs / ({workers} x (1 + {alone.decoders} x {DECODER_CPUS:g}) per trial) = {fit_cpus}"]
    fitting = fit_cpus
    if alone.gpu:
        fit_gpus = math.floor(cluster.gpus / workers)
        parts.append(f"{cluster.gpus:g} GPUs / ({workers} x 1 per trial) = {fit_gpus}")
        fitting = min(fit_cpus, fit_gpus)
    concurrent = max(1, fitting)
    calculation = "; ".join(parts) + (
        f": {concurrent} concurrently" if fitting else ": 1 concurrently, sharing the CPUs"
    )
    if requested is not None and requested > concurrent:
        raise MotipError(
            "so many trials do not fit concurrently",
            where="--at-once",
            found=requested,
            expected=f"at most {concurrent}: {calculation}",
            fix="lower --at-once or --workers-per-trial, or add nodes",
        )

    # resources of each trial
    concurrent = concurrent if requested is None else max(1, requested)
    together = plan_resources(workers * concurrent, config, cluster)
    return ConcurrencyPlan(concurrent, replace(together, workers=workers, concurrent_runs=concurrent), calculation)


class TrialReporter:
    """Reports from a trial's process to the driver.

    Attributes:
        pruned: ASHA stopped the trial; others were better after as many epochs.
    """

    def __init__(self, channel: Any, key: str, resources: str) -> None:
        self._channel = channel
        self._key = key
        self._resources = resources
        self._timer = threading.Timer(STATUS_INTERVAL_S, self._log_waiting)
        self._timer.daemon = True
        self._timer.start()
        self.pruned = False

    def report_value(self, epochs: int, value: float, of: int) -> None:
        """Report the value after `epochs` of the trial's `of` epochs.

        Raises:
            Stopped: the trial was pruned.
        """
        import ray
        import ray.tune

        ray.tune.report({"epochs": epochs, "value": value, "of": of})
        # Tune's report returns after the scheduler has processed it, so the decision is already available.
        self.pruned = bool(ray.get(self._channel.is_pruned.remote(self._key)))
        if self.pruned:
            raise Stopped

    def log(self, text: str) -> None:
        import ray

        ray.get(self._channel.log.remote(f"trial {self._key}: {text}"))

    def report_position(self, position: str) -> None:
        """Report the training's position, for progress lines. The first call ends the wait for workers."""
        import ray

        self._timer.cancel()
        ray.get(self._channel.set_position.remote(self._key, position))

    def close(self) -> None:
        self._timer.cancel()

    def _log_waiting(self) -> None:
        import ray

        free = {name: f"{amount:g}" for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        have = ", ".join(f"{amount} {name}" for name, amount in sorted(free.items())) or "none"
        self.log(f"has waited {STATUS_INTERVAL_S:.0f} s for its workers; it needs {self._resources}; free now: {have}")


class _TrialChannel:
    """Actor that carries messages, positions and results from the trials to the driver, and pruning requests back."""

    def __init__(self) -> None:
        self._pruned: set[str] = set()
        self._messages: list[str] = []
        self._positions: dict[str, str] = {}
        self._results: dict[str, TrialResult] = {}

    def prune(self, key: str) -> None:
        self._pruned.add(key)

    def is_pruned(self, key: str) -> bool:
        return key in self._pruned

    def log(self, text: str) -> None:
        self._messages.append(text)

    def set_position(self, key: str, position: str) -> None:
        self._positions[key] = position

    def set_result(self, key: str, result: TrialResult) -> None:
        self._results[key] = result
        self._positions.pop(key, None)

    def result(self, key: str) -> TrialResult | None:
        self._positions.pop(key, None)
        return self._results.get(key)

    def drain(self) -> tuple[list[str], dict[str, str]]:
        """Messages since the last call, and the position of each running trial."""
        messages, self._messages = self._messages, []
        return messages, dict(self._positions)


def search(
    next_trial: NextTrial,
    run_trial: RunTrial,
    concurrency: ConcurrencyPlan,
    observer: SweepObserver,
    *,
    earlier: Sequence[TrialResult] = (),
    prune: Prune | None = None,
    longest: int = 1,
) -> list[TrialResult]:
    """Run trials until `next_trial` returns None; returns all results, earlier ones included.

    Args:
        earlier: trials that ended in an earlier run; ASHA compares with them too.
        prune: ASHA; None trains every trial to its end.
        longest: epochs of the longest trial.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; running trials have no final status.
    """
    import ray
    from ray import tune
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    first = next_trial(earlier)
    if first is None:
        return list(earlier)

    # channel to the trials
    os.environ.update(_TUNE_ENVIRONMENT)
    here = ray.get_runtime_context().get_node_id()
    same_node = NodeAffinitySchedulingStrategy(here, soft=False)
    channel: Any = ray.remote(_TrialChannel).options(num_cpus=0, scheduling_strategy=same_node).remote()

    # searcher, scheduler and tuner
    types = _tune_types()
    limit = concurrency.max_concurrent_trials
    searcher = types.TrialSearcher(_starting_with(first, next_trial), channel, observer, limit, list(earlier))
    folder = tempfile.mkdtemp(prefix="motip_tune_")
    try:
        scheduler = None if prune is None else types.CooperativeASHA(channel, prune, longest, earlier)
        callback = types.ProgressCallback(channel, observer, searcher)
        resources = _resources_text(concurrency.resources)
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_trial, run_trial=run_trial, channel=channel, resources=resources),
                # On the driver's node, where MLflow's database and local storage are; it costs no CPU.
                tune.PlacementGroupFactory([{_node_resource(here): 0.001}]),
            ),
            tune_config=tune.TuneConfig(search_alg=searcher, scheduler=scheduler, num_samples=-1, reuse_actors=False),
            run_config=tune.RunConfig(name="sweep", storage_path=folder, verbose=0, callbacks=[callback]),
        )
        # run
        with _sigterm_as_interrupt(), _quiet_tune():
            tuner.fit()
    finally:
        ray.kill(channel)
        shutil.rmtree(folder, ignore_errors=True)
    if searcher.running or not searcher.finished:
        raise KeyboardInterrupt
    return list(searcher.trials)


def _starting_with(first: TrialSpec, next_trial: NextTrial) -> NextTrial:
    pending = [first]
    return lambda trials: pending.pop() if pending else next_trial(trials)


_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # records are kept in MLflow and beside the checkpoints
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails has no metric
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def _trial(config: dict[str, Any], run_trial: RunTrial, channel: Any, resources: str) -> None:
    """Entry point of a trial's process."""
    import ray

    # As `connect` sets them for the driver; processes on a joined cluster do not inherit them.
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    spec = TrialSpec(config["key"], json.loads(config["values"]), config["seed"])
    reporter = TrialReporter(channel, spec.key, resources)
    try:
        result = run_trial(spec, reporter)
    except MotipError as error:
        result = TrialResult(spec, "failed", message=" ".join(str(error).split()))
    except Exception as error:
        _log.exception("trial %s failed", spec.key)
        last = " | ".join(map(str.strip, traceback.format_exc().strip().splitlines()[-3:]))
        result = TrialResult(spec, "failed", message=f"{type(error).__name__}: {error} ({last})")
    finally:
        reporter.close()
    ray.get(channel.set_result.remote(spec.key, result))


def _tune_types() -> Any:
    """Subclasses of Tune's interfaces, defined here so that importing this module does not import Ray."""
    import ray
    from ray import tune
    from ray.tune.schedulers import AsyncHyperBandScheduler
    from ray.tune.search import Searcher

    class TrialSearcher(Searcher):
        """Starts the trials that `next_trial` returns, at most `limit` concurrently."""

        def __init__(
            self,
            next_trial: NextTrial,
            channel: Any,
            observer: SweepObserver,
            limit: int,
            trials: list[TrialResult],
        ) -> None:
            super().__init__(metric="value", mode="max")
            self._next_trial, self._channel, self._observer, self._limit = next_trial, channel, observer, limit
            self.trials = trials
            self.running: dict[str, TrialResult] = {}
            self.finished = False

        def suggest(self, trial_id: str) -> Any:
            if len(self.running) >= self._limit:
                return None
            spec = self._next_trial(self.trials)
            if spec is None:
                self.finished = True
                return Searcher.FINISHED
            result = TrialResult(spec)
            self.trials.append(result)
            self.running[trial_id] = result
            self._observer.trial_started(result)
            return {"key": spec.key, "values": json.dumps(spec.values), "seed": spec.seed}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            trial = self.running.pop(trial_id)
            final = ray.get(self._channel.result.remote(trial.spec.key))
            if final is None:
                trial.status = "failed"
                trial.message = "the trial process exited without a result (killed or out of memory?)"
            else:
                trial.status, trial.history, trial.message = final.status, final.history, final.message
            self._observer.trial_ended(trial)

        # A sweep resumes from the caller's records, not from Tune's state.
        def save(self, checkpoint_path: str) -> None:
            with open(checkpoint_path, "w") as file:
                file.write("")

        def restore(self, checkpoint_path: str) -> None:
            raise NotImplementedError("a sweep resumes from the records of its trials")

        def __getstate__(self) -> dict[str, Any]:
            return {}

        def __deepcopy__(self, memo: Any) -> TrialSearcher:
            return self

    # ASHA scheduler

    class CooperativeASHA(AsyncHyperBandScheduler):
        """ASHA that requests a trial to stop instead of killing it, and identifies trials by their key."""

        def __init__(self, channel: Any, prune: Prune, longest: int, earlier: Sequence[TrialResult]) -> None:
            super().__init__(
                time_attr="epochs",
                metric="value",
                mode="max",
                max_t=max(longest, prune.first),
                grace_period=prune.first,
                reduction_factor=prune.reduction,
                stop_last_trials=False,
            )
            self._channel = channel
            for result in earlier:
                by_key: Any = SimpleNamespace(trial_id=result.spec.key)
                super().on_trial_add(_NO_CONTROLLER, by_key)
                for epochs, value in result.best_so_far().items():
                    super().on_trial_result(_NO_CONTROLLER, by_key, {"epochs": epochs, "value": value})

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_add(tune_controller, _by_key(trial))

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision = super().on_trial_result(tune_controller, _by_key(trial), result)
            # The baseline is never pruned: all other trials are compared with it.
            baseline = trial.config.get("values") == "{}"
            if decision == self.STOP and result["epochs"] < result["of"] and not baseline:
                ray.get(self._channel.prune.remote(trial.config["key"]))
            return str(self.CONTINUE)

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            super().on_trial_complete(tune_controller, _by_key(trial), result or {})

        def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_remove(tune_controller, _by_key(trial))

        def __getstate__(self) -> dict[str, Any]:
            return {}

        def __deepcopy__(self, memo: Any) -> CooperativeASHA:
            return self

        def save(self, checkpoint_path: str) -> None:
            with open(checkpoint_path, "w") as file:
                file.write("")

    # progress lines

    class ProgressCallback(tune.Callback):
        """Forwards the trials' messages to the observer every second, and their progress every STATUS_INTERVAL_S."""

        def __init__(self, channel: Any, observer: SweepObserver, searcher: TrialSearcher) -> None:
            self._channel, self._observer, self._searcher = channel, observer, searcher
            self._last_progress = self._last_poll = time.monotonic()

        def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
            now = time.monotonic()
            if now - self._last_poll >= 1.0:
                self._last_poll = now
                self._poll(now)

        def on_experiment_end(self, trials: Any, **info: Any) -> None:
            self._poll(time.monotonic())

        def _poll(self, now: float) -> None:
            messages, running = ray.get(self._channel.drain.remote())
            for text in messages:
                self._observer.message(text)
            if now - self._last_progress >= STATUS_INTERVAL_S and self._searcher.running:
                self._last_progress = now
                self._observer.progress(self._searcher.trials, running)

        def __getstate__(self) -> dict[str, Any]:
            return {}

        def __deepcopy__(self, memo: Any) -> ProgressCallback:
            return self

    return SimpleNamespace(
        TrialSearcher=TrialSearcher, CooperativeASHA=CooperativeASHA, ProgressCallback=ProgressCallback
    )


_NO_CONTROLLER: Any = None
"""ASHA's methods take Tune's controller as an argument and do not use it."""


def _by_key(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config["key"])


def _resources_text(resources: ResourcePlan) -> str:
    gpu = " and 1 GPU" if resources.gpu else ""
    text = f"{resources.workers} x ({resources.cpus:g} CPU{gpu}) for workers"
    decoders = resources.workers * resources.decoders
    return text + (f", {decoders} x {resources.decoder_cpus:g} CPU for decoding" if decoders else "")


def _node_resource(node_id: str) -> str:
    """Name of the resource that only this node has."""
    import ray

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


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Limit Tune's log to errors: the rest names temporary files and repeats the progress lines."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
