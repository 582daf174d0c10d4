"""Suggestions, concurrency and pruning of a sweep, without Ray; tests/cluster/test_sweep.py runs one on Ray."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from motip.cluster import Cluster
from motip.config import Config, load_config
from motip.config.sweep_file import Choices, Prune, Range, SweepFile
from motip.errors import MotipError
from motip.tune import ray_tune
from motip.tune.ray_tune import plan_concurrency
from motip.tune.searcher import TrialResult, TrialSpec, suggest

SPACE: dict[str, Range | Choices] = {
    "LR": Range(low=1e-5, high=1e-2, log=True),
    "LR_DROP": Range(low=2, high=8, step=2),
    "sample_intervals": Choices(choices=([1], [1, 2], [1, 2, 3])),
}
BASELINE_VALUES = {"LR": 7e-4, "LR_DROP": None, "sample_intervals": [1, 2, 3]}


def score(values: dict[str, Any]) -> float:
    """Best at LR 10^-3.5 with the shortest list."""
    return 40 - 10 * (math.log10(values["LR"]) + 3.5) ** 2 - 3 * len(values["sample_intervals"])


def searched(sweep: SweepFile, count: int) -> list[TrialResult]:
    """The baseline and `count` - 1 suggested trials, pruned below 25."""
    trials = [TrialResult(TrialSpec("000", {}), "finished", {2: 20.0, 4: 30.0})]
    for number in range(1, count):
        values = suggest(sweep, BASELINE_VALUES, trials, number)
        assert values is not None
        value = score(values)
        history = {2: value - 5} if value < 25 else {2: value - 5, 4: value}
        spec = TrialSpec(f"{number:03d}", values)
        trials.append(TrialResult(spec, "pruned" if value < 25 else "finished", history))
    return trials


def test_suggestions_are_inside_the_space_and_rounded() -> None:
    trials = searched(SweepFile(space=SPACE), 12)[1:]
    assert len(trials) == 11
    for trial in trials:
        values = trial.spec.values
        assert list(values) == list(SPACE)
        assert all(SPACE[key].contains(value) for key, value in values.items())
        assert isinstance(values["LR_DROP"], int)
        assert float(f"{values['LR']:.3g}") == values["LR"]


def test_suggestions_are_deterministic_and_unique() -> None:
    sweep = SweepFile(space=SPACE)
    trials = searched(sweep, 9)
    assert [trial.spec.values for trial in searched(sweep, 9)] == [trial.spec.values for trial in trials]
    assert suggest(sweep, BASELINE_VALUES, trials, 9) == suggest(sweep, BASELINE_VALUES, list(trials), 9)
    assert suggest(SweepFile(space=SPACE, seed=1), BASELINE_VALUES, trials[:1], 1) != trials[1].spec.values
    settings = [str(trial.spec.values) for trial in trials]
    assert len(set(settings)) == len(settings)


def test_tpe_samples_near_good_trials_and_random_search_does_not() -> None:
    def distance(method: Literal["tpe", "random"]) -> float:
        late = searched(SweepFile(space=SPACE, search=method), 30)[15:]
        return sum(abs(math.log10(trial.spec.values["LR"]) + 3.5) for trial in late) / len(late)

    assert distance("tpe") < 0.7 * distance("random")


def test_settings_of_running_trials_are_not_suggested_again() -> None:
    sweep = SweepFile(space={"sample_intervals": SPACE["sample_intervals"]})
    trials = [TrialResult(TrialSpec("000", {}))]  # the baseline has [1, 2, 3]
    found = []
    for number in (1, 2):
        values = suggest(sweep, BASELINE_VALUES, trials, number)
        assert values is not None
        found.append(values["sample_intervals"])
        trials.append(TrialResult(TrialSpec(str(number), values)))
    assert sorted(found) == [[1], [1, 2]]
    assert suggest(sweep, BASELINE_VALUES, trials, 3) is None, "the space is exhausted"


def test_suggestions_continue_after_failed_trials() -> None:
    sweep = SweepFile(space=SPACE, startup=1)
    good = TrialResult(TrialSpec("001", {"LR": 1e-3, "LR_DROP": 2, "sample_intervals": [1]}), "finished", {1: 40.0})
    failed = [
        TrialResult(TrialSpec(f"{n:03d}", {"LR": 1e-5 * n, "LR_DROP": 8, "sample_intervals": [1]}), "failed")
        for n in (2, 3)
    ]
    assert suggest(sweep, BASELINE_VALUES, [good, *failed], 4) is not None


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


class Asha:
    """The scheduler with a channel that records which trials are pruned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, earlier: list[TrialResult], prune: Prune, longest: int) -> None:
        self.pruned: list[str] = []
        channel = SimpleNamespace(prune=SimpleNamespace(remote=self.pruned.append))
        monkeypatch.setattr("ray.get", lambda value: value)
        self.scheduler = ray_tune._tune_types().CooperativeASHA(channel, prune, longest, earlier)

    def report(self, key: str, epochs: int, value: float, of: int = 8) -> str:
        trial = SimpleNamespace(trial_id=f"tune-{key}", config={"key": key})
        if key not in self.scheduler._trial_info:
            self.scheduler.on_trial_add(None, trial)
        return str(self.scheduler.on_trial_result(None, trial, {"epochs": epochs, "value": value, "of": of}))


def test_the_worse_half_is_pruned_without_being_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    asha = Asha(monkeypatch, [], Prune(first=2, reduction=2), 8)
    for key, value in (("a", 10.0), ("b", 20.0), ("c", 5.0), ("d", 30.0)):
        assert asha.report(key, 2, value) == "CONTINUE"
    assert asha.pruned == ["c"]
    asha.report("b", 4, 21.0)
    asha.report("d", 4, 20.0)
    assert asha.pruned == ["c", "d"]
    asha.report("e", 8, 1.0)
    assert asha.pruned == ["c", "d"], "a trial at its last epoch is not pruned"


def test_trials_of_an_earlier_run_are_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = [
        TrialResult(TrialSpec("000", {}), "finished", {2: 30.0, 4: 28.0, 8: 35.0}),
        TrialResult(TrialSpec("001", {}), "pruned", {2: 10.0}),
    ]
    asha = Asha(monkeypatch, earlier, Prune(first=2, reduction=2), 8)
    asha.report("002", 2, 15.0)
    asha.report("003", 2, 25.0)
    assert asha.pruned == ["002"]
    # The best value so far is compared, not the last epoch's: a stage keeps its best epoch's weights.
    asha.report("003", 4, 29.0)
    assert asha.pruned == ["002", "003"]


def test_a_resumed_trial_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = TrialResult(TrialSpec("001", {}), "running", {2: 20.0})
    finished = TrialResult(TrialSpec("000", {}), "finished", {2: 30.0})
    asha = Asha(monkeypatch, [finished, interrupted], Prune(first=2), 8)
    asha.report("001", 2, 20.0)
    recorded = {milestone: dict(values) for milestone, values in asha.scheduler._brackets[0]._rungs}
    assert recorded[2.0] == {"000": 30.0, "001": 20.0}


def test_best_so_far_skips_nan() -> None:
    result = TrialResult(TrialSpec("0", {}), history={6: 5.0, 2: 3.0, 4: math.nan, 8: 4.0})
    assert result.best_so_far() == {2: 3.0, 4: 3.0, 6: 5.0, 8: 5.0}
    assert result.value == 5.0 and TrialResult(TrialSpec("0", {})).value is None


def test_integer_choices_equal_the_float_values_of_a_key() -> None:
    """1 in the sweep file is the baseline's 1.0: neither an error nor a setting to train twice."""
    sweep = SweepFile(space={"MAX_CLIP_NORM": Choices(choices=(0.1, 1, 5))})
    trials = [TrialResult(TrialSpec("000", {}), "finished", {2: 20.0})]
    for number in (1, 2):
        values = suggest(sweep, {"MAX_CLIP_NORM": 1.0}, trials, number)
        assert values is not None and values["MAX_CLIP_NORM"] != 1
        trials.append(TrialResult(TrialSpec(f"{number:03d}", values), "finished", {2: 20.0 + number}))
    assert suggest(sweep, {"MAX_CLIP_NORM": 1.0}, trials, 3) is None
