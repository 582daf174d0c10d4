"""Suggestions, concurrency and pruning of a sweep, without Ray; tests/cluster/test_sweep.py runs one on Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from motip.cluster import Cluster
from motip.config import Config, load_config
from motip.config.sweep_file import Choices, Prune, Range, SweepFile
from motip.errors import MotipError
from motip.tune.concurrency import plan_concurrency
from motip.tune.ray_tune import CooperativeASHA, TrialSearch
from motip.tune.search_space import SearchSpace
from motip.tune.trial_records import BASELINE, Trial

SPACE: dict[str, Range | Choices] = {
    "LR": Range(low=1e-5, high=1e-2, log=True),
    "LR_DROP": Range(low=2, high=8, step=2),
    "sample_intervals": Choices(choices=([1], [1, 2], [1, 2, 3])),
}
BASELINE_VALUES = {"LR": 7e-4, "LR_DROP": None, "sample_intervals": [1, 2, 3]}


def score(values: dict[str, Any]) -> float:
    """Best at LR 10^-3.5 with the shortest list."""
    rate = values.get("LR", 1e-3)
    return 40 - 10 * (math.log10(rate) + 3.5) ** 2 - 3 * len(values.get("sample_intervals", ()))


class Sweep:
    """Runs the trials of a `TrialSearch` as Tune would: concurrently at most `limit`, pruned below 25.

    Attributes:
        notes: messages of the searcher.
    """

    def __init__(
        self,
        sweep: SweepFile,
        count: int,
        earlier: Sequence[Trial] = (),
        pending: Sequence[Trial] | None = None,
        baseline: dict[str, Any] = BASELINE_VALUES,
    ) -> None:
        self.notes: list[str] = []
        first = [Trial(BASELINE)] if pending is None and not earlier else pending or []
        log: Any = self
        self.searcher = TrialSearch(SearchSpace(sweep, baseline), log, count, first, earlier)
        self._epochs: dict[str, dict[int, float]] = {}

    def trial_started(self, trial: Trial) -> None: ...

    def trial_ended(self, key: str) -> Trial:
        history = self._epochs[key]
        status = "finished" if len(history) == 2 else "pruned"
        return replace(self.searcher.trials[key], status=status, history=history)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self) -> bool:
        """Start the next trial; False at the end."""
        return bool(self.searcher.suggest(f"tune-{len(self.searcher.trials)}") != "FINISHED")

    def finish_all(self) -> None:
        for tune_id, trial in list(self.searcher.running.items()):
            value = 30.0 if trial.key == BASELINE else score(trial.values)
            self._epochs[trial.key] = {2: value - 5} if value < 25 else {2: value - 5, 4: value}
            for number, each in enumerate(self._epochs[trial.key].values(), start=1):
                self.searcher.on_trial_result(tune_id, {"value": each, "training_iteration": number})
            self.searcher.on_trial_complete(tune_id)

    def run(self) -> list[Trial]:
        while self.start():
            self.finish_all()
        return list(self.searcher.trials.values())

    @property
    def started(self) -> list[dict[str, Any]]:
        return [trial.values for trial in self.searcher.running.values()]


def test_suggestions_are_inside_the_space_and_rounded() -> None:
    trials = Sweep(SweepFile(space=SPACE), 12).run()
    assert [trial.key for trial in trials] == [f"{number:03d}" for number in range(12)]
    assert trials[0].values == {}
    for trial in trials[1:]:
        values = trial.values
        assert list(values) == list(SPACE)
        assert all(SPACE[key].contains(value) for key, value in values.items())
        assert isinstance(values["LR_DROP"], int)
        assert float(f"{values['LR']:.3g}") == values["LR"]


def test_suggestions_are_deterministic_and_unique() -> None:
    first, again = Sweep(SweepFile(space=SPACE), 9).run(), Sweep(SweepFile(space=SPACE), 9).run()
    assert first == again
    other = Sweep(SweepFile(space=SPACE, seed=1), 2).run()
    assert other[1].values != first[1].values
    assert len({str(trial.values) for trial in first}) == 9


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_a_resumed_sweep_continues_the_same_study(method: Literal["tpe", "random"]) -> None:
    sweep = SweepFile(space=SPACE, search=method, startup=4)
    trials = Sweep(sweep, 9).run()
    interrupted = Trial(trials[4].key, trials[4].values)
    earlier = [trial for trial in trials if trial.key != interrupted.key]
    resumed = Sweep(sweep, 12, earlier, [interrupted])
    assert [trial.key for trial in resumed.run()[8:]] == ["004", "009", "010", "011"]
    assert resumed.searcher.trials["004"].values == interrupted.values, (
        "an interrupted trial is repeated with its own values"
    )
    assert len({str(trial.values) for trial in resumed.searcher.trials.values()}) == 12
    stored = {(trial.state.name, trial.value) for trial in resumed.searcher._study._ot_study.trials[:8]}
    values = {("PRUNED" if trial.status == "pruned" else "COMPLETE", trial.value) for trial in earlier[1:]}
    assert stored - {("COMPLETE", score(interrupted.values)), ("PRUNED", score(interrupted.values) - 5)} == values


def test_tpe_samples_near_good_trials_and_random_search_does_not() -> None:
    def distance(method: Literal["tpe", "random"]) -> float:
        sweeps = [Sweep(SweepFile(space=SPACE, search=method, seed=seed), 30) for seed in range(4)]
        late = [trial for sweep in sweeps for trial in sweep.run()[15:]]
        return sum(abs(math.log10(trial.values["LR"]) + 3.5) for trial in late) / len(late)

    assert distance("tpe") < 0.7 * distance("random")


@pytest.mark.parametrize("startup", [1, 5])
def test_settings_of_running_trials_are_not_suggested_again(startup: int) -> None:
    sweep = Sweep(SweepFile(space={"sample_intervals": SPACE["sample_intervals"]}, startup=startup), 9)
    while sweep.start():
        pass
    assert sorted(str(values.get("sample_intervals")) for values in sweep.started) == ["None", "[1, 2]", "[1]"]
    assert sweep.notes == ["the search space is exhausted after 3 settings"]
    sweep.finish_all()
    assert not sweep.start() and len(sweep.notes) == 1


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_every_setting_of_a_finite_space_is_found(method: Literal["tpe", "random"]) -> None:
    space: dict[str, Range | Choices] = {"LR_DROP": SPACE["LR_DROP"], "sample_intervals": SPACE["sample_intervals"]}
    sweep = Sweep(SweepFile(space={**space, "LR": Choices(choices=(1e-3, 1e-2))}, search=method), 100)
    assert len(sweep.run()) == 4 * 3 * 2 + 1, "the baseline is outside"
    assert sweep.notes == ["the search space is exhausted after 25 settings"]


def test_a_baseline_inside_the_space_is_part_of_the_study() -> None:
    sweep = Sweep(SweepFile(space=SPACE), 1, baseline={**BASELINE_VALUES, "LR_DROP": 4})
    assert sweep.run()[0].values == {}
    (stored,) = sweep.searcher._study._ot_study.trials
    assert stored.params == {"LR": 7e-4, "LR_DROP": 4, "sample_intervals": "[1, 2, 3]"} and stored.value == 30.0


def test_repetitions_are_not_part_of_the_study() -> None:
    specs = [Trial("000-seed30", {}, 30), Trial("001-seed30", {"LR": 1e-3}, 30)]
    sweep = Sweep(SweepFile(space=SPACE), 2, pending=specs)
    assert sweep.start() and sweep.start() and not sweep.start()
    assert list(sweep.searcher.running.values()) == specs and sweep.notes == []
    assert sweep.searcher._study._ot_study.trials == []


def test_suggestions_continue_after_failed_trials() -> None:
    sweep = SweepFile(space=SPACE, startup=1)
    good = Trial("001", {"LR": 1e-3, "LR_DROP": 2, "sample_intervals": [1]}, None, "finished", {1: 40.0})
    failed = [
        Trial(f"{n:03d}", {"LR": 1e-5 * n, "LR_DROP": 8, "sample_intervals": [1]}, status="failed") for n in (2, 3)
    ]
    assert [trial.key for trial in Sweep(sweep, 5, [good, *failed]).run()[3:]] == ["004", "005"]


def test_no_trial_starts_after_a_failed_baseline() -> None:
    failed = Trial(BASELINE, status="failed")
    assert not Sweep(SweepFile(space=SPACE), 5, [failed]).start()


# ------------------------------------------------------------------------------------------------- concurrency


@pytest.fixture(scope="module")
def tiny(repo_root: Path) -> Config:
    return load_config(repo_root / "configs/demo/motip_tiny.yaml")


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "trials"),
    [
        (2, 0, 1, 1),  # one worker and half a CPU for its decoder
        (4, 0, 1, 2),
        (16, 0, 1, 10),
        (16, 0, 4, 2),
        (2, 0, 2, 1),  # less than 0.5 CPUs per decoding actor, but a single trial runs
        (64, 8, 1, 8),
        (64, 8, 3, 2),
        (4, 8, 1, 2),  # GPUs for eight, CPUs for two
    ],
)
def test_concurrency_follows_from_cpus_and_gpus(tiny: Config, cpus: int, gpus: int, workers: int, trials: int) -> None:
    found = plan_concurrency(workers, tiny, Cluster(cpus, gpus, 1, True))
    assert found.max_concurrent_trials == trials == found.resources.concurrent_runs
    assert f"{cpus} CPUs / ({workers} x (1 + 1 x 0.5) per trial)" in found.calculation
    resources = found.resources
    assert resources.workers == workers and resources.gpu == (gpus > 0)
    reserved = trials * workers * (resources.cpus + resources.decoders * resources.decoder_cpus)
    assert reserved <= cpus, "all trials together fit the cluster"


def test_fewer_concurrent_trials_get_more_cpus_each(tiny: Config) -> None:
    most, fewer = (plan_concurrency(1, tiny, Cluster(6, 0, 1, True), requested) for requested in (None, 2))
    assert (most.max_concurrent_trials, fewer.max_concurrent_trials) == (4, 2)
    assert fewer.resources.cpus > most.resources.cpus


def test_trials_that_fit_the_total_fit_every_node(tiny: Config) -> None:
    found = plan_concurrency(1, tiny, Cluster(3, 0, 3, True, (1.0, 1.0, 1.0)))
    assert found.max_concurrent_trials == 2 and found.resources.cpus == found.resources.decoder_cpus == 0.5


@pytest.mark.parametrize(
    ("cluster", "workers", "requested", "words"),
    [
        (Cluster(2, 0, 1, True), 0, None, ["--workers-per-trial", "1 or more"]),
        (Cluster(2, 0, 1, True), 40, None, ["a single trial does not fit", "2 CPUs", "40 workers x"]),
        (Cluster(32, 4, 1, True), 5, None, ["more training workers than GPUs", "at most 4", "--workers-per-trial"]),
        (Cluster(2, 0, 1, True), 1, 2, ["--at-once", "at most 1: 2 CPUs / (1 x (1 + 1 x 0.5) per trial) = 1"]),
        (Cluster(32, 4, 1, True), 2, 3, ["--at-once", "4 GPUs / (2 x 1 per trial) = 2"]),
    ],
)
def test_too_many_trials_or_workers_are_an_error_with_the_calculation(
    tiny: Config, cluster: Cluster, workers: int, requested: int | None, words: list[str]
) -> None:
    config = tiny.replaced(DEVICE="auto")
    with pytest.raises(MotipError) as caught:
        plan_concurrency(workers, config, cluster, requested)
    text = caught.value.render()
    assert [word for word in words if word not in text] == [], text


# ----------------------------------------------------------------------------------------------------- pruning


NO_CONTROLLER: Any = None


class Asha:
    """The scheduler, and the keys of the trials that it stopped."""

    def __init__(self, earlier: list[Trial], prune: Prune) -> None:
        self.pruned: list[str] = []
        self.scheduler = CooperativeASHA(self.pruned.append, prune, earlier)

    def report(self, key: str, epochs: int, value: float, of: int = 8) -> str:
        trial: Any = SimpleNamespace(trial_id=f"tune-{key}", config={"key": key})
        if trial.trial_id not in self.scheduler._trial_info:
            self.scheduler.on_trial_add(NO_CONTROLLER, trial)
        report = {"epochs": epochs, "value": value, "of": of}
        return self.scheduler.on_trial_result(NO_CONTROLLER, trial, report)


def test_the_worse_half_is_pruned_without_being_killed() -> None:
    asha = Asha([], Prune(first=2, reduction=2))
    for key, value in (("a", 10.0), ("b", 20.0), ("c", 5.0), ("d", 30.0)):
        assert asha.report(key, 2, value) == "CONTINUE"
    assert asha.pruned == ["c"]
    asha.report("b", 4, 21.0)
    asha.report("d", 4, 20.0)
    assert asha.pruned == ["c", "d"]
    asha.report("e", 8, 1.0)
    asha.report(BASELINE, 2, 1.0)
    assert asha.pruned == ["c", "d"], "neither a trial at its last epoch nor the baseline is pruned"


def test_trials_of_an_earlier_run_are_compared_with() -> None:
    earlier = [
        Trial("000", status="finished", history={2: 30.0, 4: 28.0, 8: 35.0}),
        Trial("001", status="pruned", history={2: 10.0}),
    ]
    asha = Asha(earlier, Prune(first=2, reduction=2))
    asha.report("002", 2, 15.0)
    asha.report("003", 2, 25.0)
    assert asha.pruned == ["002"]
    # The best value so far is compared, not the last epoch's: a stage keeps its best epoch's weights.
    asha.report("003", 4, 29.0)
    assert asha.pruned == ["002", "003"]


def test_a_resumed_trial_is_counted_once() -> None:
    interrupted = Trial("001", status="running", history={2: 20.0})
    finished = Trial("000", status="finished", history={2: 30.0})
    asha = Asha([finished, interrupted], Prune(first=2))
    asha.report("001", 2, 20.0)
    recorded = {milestone: dict(values) for milestone, values in asha.scheduler._brackets[0]._rungs}
    assert recorded[2.0] == {"000": 30.0, "tune-001": 20.0}


def test_best_so_far_skips_nan() -> None:
    result = Trial("0", history={6: 5.0, 2: 3.0, 4: math.nan, 8: 4.0})
    assert result.best_so_far() == {2: 3.0, 4: 3.0, 6: 5.0, 8: 5.0}
    assert result.value == 5.0 and Trial("0").value is None


def test_integer_choices_equal_the_float_values_of_a_key() -> None:
    """1 in the sweep file is the baseline's 1.0: neither an error nor a setting to train twice."""
    space: dict[str, Range | Choices] = {"MAX_CLIP_NORM": Choices(choices=(0.1, 1, 5))}
    sweep = Sweep(SweepFile(space=space), 9, baseline={"MAX_CLIP_NORM": 1.0})
    while sweep.start():
        pass
    assert sorted(values.get("MAX_CLIP_NORM", 0) for values in sweep.started) == [0, 0.1, 5]
