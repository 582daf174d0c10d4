"""Many trainings of one stage on Ray Tune: who runs when, which end early, and what is left behind (nothing).

Tune decides and this file is the only one that knows it. A trial is a process that starts a stage's own training on
workers of its own and ends by itself: where ASHA gives a trial up, it is told so instead of being killed, because
workers whose driver was killed hold their CPUs and GPUs for minutes. What is known of the trials is kept by the
caller, so nothing of Tune's own files is needed to go on after an interruption.
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
from motip.train.ray_train import Placement, place
from motip.tune.searcher import Ask, Told

_log = logging.getLogger(__name__)

DECODER_CPUS = 0.5
"""CPUs that a decoding actor should have where trials run side by side."""
WAIT_S = 60.0
"""A trial whose workers have not said a word for so long says what it waits for; also how often progress is told."""

Source = Callable[[Sequence[Told]], Ask | None]
"""The next training, given all so far (also those that run); None where there are no more."""


class RunTrial(Protocol):
    """One training, in a process of its own; must be picklable."""

    def __call__(self, ask: Ask, report: Report) -> Told: ...


class Watch(Protocol):
    """Told in the driver what happens."""

    def asked(self, told: Told) -> None: ...
    def ended(self, told: Told) -> None: ...
    def said(self, text: str) -> None: ...
    def progress(self, known: Sequence[Told], running: dict[str, str]) -> None: ...


@dataclass(frozen=True)
class Room:
    """How many trials run side by side, how each is laid out, and the arithmetic in words."""

    at_once: int
    placement: Placement
    sentence: str


def room(workers: int, config: Config, cluster: Cluster, wanted: int | None = None) -> Room:
    """Divide a cluster among trials, or refuse with the arithmetic what could only wait for ever.

    With GPUs a trial takes one for each worker. Without, it takes a CPU for each worker and half a CPU for each
    decoding actor; where not even one trial has that much, a single one shares what there is.

    Args:
        workers: training workers of each trial.
        wanted: trials that must fit at once; None takes as many as do.

    Raises:
        MotipError: not even one trial fits, or fewer than wanted.
    """
    if workers < 1:
        raise MotipError(
            "a trial has at least one worker of its own",
            where="--workers-per-trial",
            found=workers,
            expected="1 or more",
        )
    try:
        alone = place(workers, config, cluster)
    except MotipError as error:
        raise MotipError(
            f"not even one trial fits: {error.what}",
            where="--workers-per-trial",
            found=error.found,
            expected=error.expected,
            fix="lower --workers-per-trial, or add nodes",
        ) from None
    cpus = workers * (1 + DECODER_CPUS * alone.decoders)
    fit_cpus = math.floor(cluster.cpus / cpus + 1e-9)
    parts = [f"{cluster.cpus:g} CPUs / ({workers} x (1 + {alone.decoders} x {DECODER_CPUS:g}) per trial) = {fit_cpus}"]
    fitting = fit_cpus
    if alone.gpu:
        fit_gpus = math.floor(cluster.gpus / workers)
        parts.append(f"{cluster.gpus:g} GPUs / ({workers} x 1 per trial) = {fit_gpus}")
        fitting = min(fit_cpus, fit_gpus)
    at_once = max(1, fitting)
    sentence = "; ".join(parts) + (f": {at_once} at once" if fitting else ": 1 at once, sharing what there is")
    if wanted is not None and wanted > at_once:
        raise MotipError(
            "so many trials do not fit at once",
            where="--at-once",
            found=wanted,
            expected=f"at most {at_once}: {sentence}",
            fix="lower --at-once or --workers-per-trial, or add nodes",
        )
    at_once = at_once if wanted is None else max(1, wanted)
    together = place(workers * at_once, config, cluster)
    return Room(at_once, replace(together, workers=workers, runs=at_once), sentence)


class Report:
    """A trial's way to the driver.

    Attributes:
        pruned: the trial was given up; others were better after as many epochs.
    """

    def __init__(self, board: Any, key: str, needs: str) -> None:
        self._board = board
        self._key = key
        self._needs = needs
        self._timer = threading.Timer(WAIT_S, self._waits)
        self._timer.daemon = True
        self._timer.start()
        self.pruned = False

    def value(self, epochs: int, value: float, of: int) -> None:
        """Tell the value after so many of the trial's epochs.

        Raises:
            Stopped: the trial is given up.
        """
        import ray
        import ray.tune

        ray.tune.report({"epochs": epochs, "value": value, "of": of})
        # Tune has decided by now: it lets go of a report after the scheduler has seen it.
        self.pruned = bool(ray.get(self._board.is_pruned.remote(self._key)))
        if self.pruned:
            raise Stopped

    def say(self, text: str) -> None:
        import ray

        ray.get(self._board.say.remote(f"trial {self._key}: {text}"))

    def at(self, position: str) -> None:
        """How far the training is; shown now and then. The first word ends the wait for workers."""
        import ray

        self._timer.cancel()
        ray.get(self._board.at.remote(self._key, position))

    def close(self) -> None:
        self._timer.cancel()

    def _waits(self) -> None:
        import ray

        free = {name: f"{amount:g}" for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        have = ", ".join(f"{amount} {name}" for name, amount in sorted(free.items())) or "none"
        self.say(f"has waited {WAIT_S:.0f} s for its workers; it needs {self._needs}; free now: {have}")


class _Board:
    """Between the driver and its trials."""

    def __init__(self) -> None:
        self._pruned: set[str] = set()
        self._said: list[str] = []
        self._at: dict[str, str] = {}
        self._ended: dict[str, Told] = {}

    def prune(self, key: str) -> None:
        self._pruned.add(key)

    def is_pruned(self, key: str) -> bool:
        return key in self._pruned

    def say(self, text: str) -> None:
        self._said.append(text)

    def at(self, key: str, position: str) -> None:
        self._at[key] = position

    def end(self, key: str, told: Told) -> None:
        self._ended[key] = told
        self._at.pop(key, None)

    def ending(self, key: str) -> Told | None:
        self._at.pop(key, None)
        return self._ended.get(key)

    def drain(self) -> tuple[list[str], dict[str, str]]:
        said, self._said = self._said, []
        return said, dict(self._at)


def search(
    source: Source,
    run_trial: RunTrial,
    room: Room,
    watch: Watch,
    *,
    known: Sequence[Told] = (),
    prune: Prune | None = None,
    longest: int = 1,
) -> list[Told]:
    """Run trainings until the source has no more; returns all, those known before included.

    Args:
        known: trials of an earlier call that ended; ASHA compares with them too.
        prune: ASHA; None lets every trial come to its end.
        longest: epochs of the longest trial.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; trials that ran are not in the end states.
    """
    import ray
    from ray import tune
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    first = source(known)
    if first is None:
        return list(known)
    os.environ.update(_QUIET)
    here = ray.get_runtime_context().get_node_id()
    beside = NodeAffinitySchedulingStrategy(here, soft=False)
    board: Any = ray.remote(_Board).options(num_cpus=0, scheduling_strategy=beside).remote()
    driver = _driver_types()
    asker = driver.Asker(_after(first, source), board, watch, room.at_once, list(known))
    folder = tempfile.mkdtemp(prefix="motip_tune_")
    try:
        scheduler = None if prune is None else driver.Rungs(board, prune, longest, known)
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_trial, run_trial=run_trial, board=board, needs=_needs(room.placement)),
                # On the driver's own node, where MLflow's database and local storage are; it costs no CPU.
                tune.PlacementGroupFactory([{_node_resource(here): 0.001}]),
            ),
            tune_config=tune.TuneConfig(search_alg=asker, scheduler=scheduler, num_samples=-1, reuse_actors=False),
            run_config=tune.RunConfig(
                name="sweep", storage_path=folder, verbose=0, callbacks=[driver.Teller(board, watch, asker)]
            ),
        )
        with _sigterm_as_interrupt(), _quiet_tune():
            tuner.fit()
    finally:
        ray.kill(board)
        shutil.rmtree(folder, ignore_errors=True)
    if asker.live or not asker.finished:
        raise KeyboardInterrupt
    return list(asker.known)


def _after(first: Ask, source: Source) -> Source:
    waiting = [first]
    return lambda known: waiting.pop() if waiting else source(known)


_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # records are kept in MLflow and beside the checkpoints
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails has no metric
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def _trial(config: dict[str, Any], run_trial: RunTrial, board: Any, needs: str) -> None:
    """What a trial's process runs."""
    import ray

    # As `connect` sets them for the driver; on a cluster that was joined, processes do not inherit them.
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ask = Ask(config["key"], json.loads(config["values"]), config["seed"])
    report = Report(board, ask.key, needs)
    try:
        told = run_trial(ask, report)
    except MotipError as error:
        told = Told(ask, "failed", message=" ".join(str(error).split()))
    except Exception as error:
        _log.exception("trial %s failed", ask.key)
        last = traceback.format_exc().strip().splitlines()[-3:]
        told = Told(ask, "failed", message=f"{type(error).__name__}: {error} ({' | '.join(map(str.strip, last))})")
    finally:
        report.close()
    ray.get(board.end.remote(ask.key, told))


def _driver_types() -> Any:
    """The classes that Tune calls in the driver, made here so that importing this file does not import Ray."""
    import ray
    from ray import tune
    from ray.tune.schedulers import AsyncHyperBandScheduler
    from ray.tune.search import Searcher

    class Asker(Searcher):
        """Hands out what the source asks for, as many at once as there is room for."""

        def __init__(self, source: Source, board: Any, watch: Watch, at_once: int, known: list[Told]) -> None:
            super().__init__(metric="value", mode="max")
            self._source, self._board, self._watch, self._at_once = source, board, watch, at_once
            self.known = known
            self.live: dict[str, Told] = {}
            self.finished = False

        def suggest(self, trial_id: str) -> Any:
            if len(self.live) >= self._at_once:
                return None
            ask = self._source(self.known)
            if ask is None:
                self.finished = True
                return Searcher.FINISHED
            told = Told(ask)
            self.known.append(told)
            self.live[trial_id] = told
            self._watch.asked(told)
            return {"key": ask.key, "values": json.dumps(ask.values), "seed": ask.seed}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            told = self.live.pop(trial_id)
            ending = ray.get(self._board.ending.remote(told.ask.key))
            if ending is None:
                told.status, told.message = "failed", "its process ended without a word (killed, or out of memory?)"
            else:
                told.status, told.history, told.message = ending.status, ending.history, ending.message
            self._watch.ended(told)

        # The caller's records are what a sweep goes on from, not Tune's.
        def save(self, checkpoint_path: str) -> None:
            with open(checkpoint_path, "w") as file:
                file.write("")

        def restore(self, checkpoint_path: str) -> None:
            raise NotImplementedError("a sweep goes on from the records of its trials")

        def __getstate__(self) -> dict[str, Any]:
            return {}

        def __deepcopy__(self, memo: Any) -> Asker:
            return self

    class Rungs(AsyncHyperBandScheduler):
        """ASHA that tells a trial to end instead of killing it, and knows trials by their key."""

        def __init__(self, board: Any, prune: Prune, longest: int, known: Sequence[Told]) -> None:
            super().__init__(
                time_attr="epochs",
                metric="value",
                mode="max",
                max_t=max(longest, prune.first),
                grace_period=prune.first,
                reduction_factor=prune.reduction,
                stop_last_trials=False,
            )
            self._board = board
            for told in known:
                named: Any = SimpleNamespace(trial_id=told.ask.key)
                super().on_trial_add(_NOBODY, named)
                for epochs, value in told.best_so_far().items():
                    super().on_trial_result(_NOBODY, named, {"epochs": epochs, "value": value})

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_add(tune_controller, _by_key(trial))

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision = super().on_trial_result(tune_controller, _by_key(trial), result)
            # The hand-set setting is what all others are judged by: it is trained to its end.
            hand_set = trial.config.get("values") == "{}"
            if decision == self.STOP and result["epochs"] < result["of"] and not hand_set:
                ray.get(self._board.prune.remote(trial.config["key"]))
            return str(self.CONTINUE)

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            super().on_trial_complete(tune_controller, _by_key(trial), result or {})

        def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_remove(tune_controller, _by_key(trial))

        def __getstate__(self) -> dict[str, Any]:
            return {}

        def __deepcopy__(self, memo: Any) -> Rungs:
            return self

        def save(self, checkpoint_path: str) -> None:
            with open(checkpoint_path, "w") as file:
                file.write("")

    class Teller(tune.Callback):
        """Passes on what the trials say, and now and then how far they are."""

        def __init__(self, board: Any, watch: Watch, asker: Asker) -> None:
            self._board, self._watch, self._asker = board, watch, asker
            self._told = self._looked = time.monotonic()

        def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
            now = time.monotonic()
            if now - self._looked >= 1.0:
                self._looked = now
                self._look(now)

        def on_experiment_end(self, trials: Any, **info: Any) -> None:
            self._look(time.monotonic())

        def _look(self, now: float) -> None:
            said, running = ray.get(self._board.drain.remote())
            for text in said:
                self._watch.said(text)
            if now - self._told >= WAIT_S and self._asker.live:
                self._told = now
                self._watch.progress(self._asker.known, running)

        def __getstate__(self) -> dict[str, Any]:
            return {}

        def __deepcopy__(self, memo: Any) -> Teller:
            return self

    return SimpleNamespace(Asker=Asker, Rungs=Rungs, Teller=Teller)


_NOBODY: Any = None
"""ASHA takes Tune's controller and does not look at it."""


def _by_key(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config["key"])


def _needs(placement: Placement) -> str:
    gpu = " and 1 GPU" if placement.gpu else ""
    text = f"{placement.workers} x ({placement.cpus:g} CPU{gpu}) for workers"
    decoders = placement.workers * placement.decoders
    return text + (f", {decoders} x {placement.decoder_cpus:g} CPU for decoding" if decoders else "")


def _node_resource(node_id: str) -> str:
    """The resource that only this node has."""
    import ray

    own = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    return next(name for name in own["Resources"] if name.startswith("node:") and name != "node:__internal_head__")


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """`ray job stop` sends SIGTERM; Tune listens for SIGUSR1, upon which it ends its trials and returns."""
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
    """Tune's own log speaks of its files, which nobody needs, and repeats what is shown already."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
