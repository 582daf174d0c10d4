"""What a sweep tries next, how many trials fit at once, and which are given up; Ray itself is in tests/cluster."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from motip.cluster import Cluster
from motip.config import Config, load_config
from motip.config.sweep_file import Choices, Prune, Range, SweepFile
from motip.errors import MotipError
from motip.tune import ray_tune as search_module
from motip.tune.ray_tune import room
from motip.tune.searcher import Ask, Told, suggest

SPACE: dict[str, Range | Choices] = {
    "LR": Range(low=1e-5, high=1e-2, log=True),
    "LR_DROP": Range(low=2, high=8, step=2),
    "sample_intervals": Choices(choices=([1], [1, 2], [1, 2, 3])),
}
HAND_SET = {"LR": 7e-4, "LR_DROP": None, "sample_intervals": [1, 2, 3]}


def score(values: dict[str, Any]) -> float:
    """Best at LR 10^-3.5 with the shortest list."""
    return 40 - 10 * (math.log10(values["LR"]) + 3.5) ** 2 - 3 * len(values["sample_intervals"])


def searched(sweep: SweepFile, trials: int) -> list[Told]:
    known = [Told(Ask("000", {}), "finished", {2: 20.0, 4: 30.0})]
    for number in range(1, trials):
        values = suggest(sweep, HAND_SET, known, number)
        assert values is not None
        value = score(values)
        history = {2: value - 5} if value < 25 else {2: value - 5, 4: value}
        known.append(Told(Ask(f"{number:03d}", values), "pruned" if value < 25 else "finished", history))
    return known


def test_suggestions_stay_in_the_space_and_come_readable() -> None:
    for told in searched(SweepFile(space=SPACE), 12)[1:]:
        values = told.ask.values
        assert list(values) == list(SPACE)
        assert all(SPACE[key].contains(value) for key, value in values.items())
        assert isinstance(values["LR_DROP"], int)
        assert float(f"{values['LR']:.3g}") == values["LR"]


def test_the_same_results_give_the_same_suggestion_and_none_twice() -> None:
    sweep = SweepFile(space=SPACE)
    known = searched(sweep, 9)
    assert [told.ask.values for told in searched(sweep, 9)] == [told.ask.values for told in known]
    assert suggest(sweep, HAND_SET, known, 9) == suggest(sweep, HAND_SET, list(known), 9)
    assert suggest(SweepFile(space=SPACE, seed=1), HAND_SET, known[:1], 1) != known[1].ask.values
    settings = [str(told.ask.values) for told in known]
    assert len(set(settings)) == len(settings)


def test_tpe_goes_where_trials_were_good_and_random_search_does_not() -> None:
    def far(method: str) -> float:
        late = searched(SweepFile(space=SPACE, search=method), 30)[15:]
        return sum(abs(math.log10(told.ask.values["LR"]) + 3.5) for told in late) / len(late)

    assert far("tpe") < 0.7 * far("random")


def test_trials_that_run_are_not_suggested_again() -> None:
    sweep = SweepFile(space={"sample_intervals": SPACE["sample_intervals"]})
    known = [Told(Ask("000", {}))]  # the hand-set one is [1, 2, 3]
    found = []
    for number in (1, 2):
        values = suggest(sweep, HAND_SET, known, number)
        assert values is not None
        found.append(values["sample_intervals"])
        known.append(Told(Ask(str(number), values)))
    assert sorted(found) == [[1], [1, 2]]
    assert suggest(sweep, HAND_SET, known, 3) is None, "all settings of the space are tried"


def test_a_failed_trial_is_no_evidence_for_its_neighbourhood() -> None:
    sweep = SweepFile(space=SPACE, startup=1)
    good = [Told(Ask("001", {"LR": 1e-3, "LR_DROP": 2, "sample_intervals": [1]}), "finished", {1: 40.0})]
    failed = [Told(Ask(f"{n:03d}", {"LR": 1e-5 * n, "LR_DROP": 8, "sample_intervals": [1]}), "failed") for n in (2, 3)]
    assert suggest(sweep, HAND_SET, good + failed, 4) is not None


# ---------------------------------------------------------------------------------------------- how many at once


@pytest.fixture(scope="module")
def tiny(repo_root: Path) -> Config:
    return load_config(repo_root / "configs/demo/motip_tiny.yaml")


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "at_once"),
    [
        (2, 0, 1, 1),  # one worker and half a CPU for its decoder
        (4, 0, 1, 2),
        (16, 0, 1, 10),
        (16, 0, 4, 2),
        (2, 0, 2, 1),  # less than it should have, but alone it runs
        (64, 8, 1, 8),
        (64, 8, 3, 2),
        (4, 8, 1, 2),  # GPUs for eight, CPUs to feed two
    ],
)
def test_how_many_trials_fit(tiny: Config, cpus: int, gpus: int, workers: int, at_once: int) -> None:
    found = room(workers, tiny, Cluster(cpus, gpus, 1, True))
    assert found.at_once == at_once == found.placement.runs
    assert f"{cpus} CPUs / ({workers} x (1 + 1 x 0.5) per trial)" in found.sentence
    placement = found.placement
    assert placement.workers == workers and placement.gpu == (gpus > 0)
    taken = at_once * workers * (placement.cpus + placement.decoders * placement.decoder_cpus)
    assert taken <= cpus, "what the trials reserve together is there"


def test_fewer_at_once_can_be_asked_for_and_get_more_each(tiny: Config) -> None:
    most, fewer = (room(1, tiny, Cluster(6, 0, 1, True), wanted) for wanted in (None, 2))
    assert (most.at_once, fewer.at_once) == (4, 2)
    assert fewer.placement.cpus > most.placement.cpus


def test_trials_that_fit_by_the_sum_fit_node_by_node(tiny: Config) -> None:
    found = room(1, tiny, Cluster(3, 0, 3, True, (1.0, 1.0, 1.0)))
    assert found.at_once == 2 and found.placement.cpus == found.placement.decoder_cpus == 0.5


@pytest.mark.parametrize(
    ("cluster", "workers", "wanted", "words"),
    [
        (Cluster(2, 0, 1, True), 0, None, ["--workers-per-trial", "1 or more"]),
        (
            Cluster(2, 0, 1, True),
            40,
            None,
            ["not even one trial fits", "2 CPUs", "40 workers x"],
        ),
        (Cluster(32, 4, 1, True), 5, None, ["more training workers than GPUs", "at most 4", "--workers-per-trial"]),
        (Cluster(2, 0, 1, True), 1, 2, ["--at-once", "at most 1: 2 CPUs / (1 x (1 + 1 x 0.5) per trial) = 1"]),
        (Cluster(32, 4, 1, True), 2, 3, ["--at-once", "4 GPUs / (2 x 1 per trial) = 2"]),
    ],
)
def test_what_cannot_run_is_refused_with_the_arithmetic(
    tiny: Config, cluster: Cluster, workers: int, wanted: int | None, words: list[str]
) -> None:
    config = tiny.replaced(DEVICE="auto")
    with pytest.raises(MotipError) as caught:
        room(workers, config, cluster, wanted)
    said = caught.value.render()
    assert [word for word in words if word not in said] == [], said


# ---------------------------------------------------------------------------------------------- which are given up


class Asha:
    """The scheduler with a board that remembers whom it was told to give up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, known: list[Told], prune: Prune, longest: int) -> None:
        self.pruned: list[str] = []
        board = SimpleNamespace(prune=SimpleNamespace(remote=self.pruned.append))
        monkeypatch.setattr("ray.get", lambda value: value)
        self.rungs = search_module._driver_types().Rungs(board, prune, longest, known)

    def report(self, key: str, epochs: int, value: float, of: int = 8) -> str:
        trial = SimpleNamespace(trial_id=f"tune-{key}", config={"key": key})
        if key not in self.rungs._trial_info:
            self.rungs.on_trial_add(None, trial)
        return str(self.rungs.on_trial_result(None, trial, {"epochs": epochs, "value": value, "of": of}))


def test_the_worse_half_is_given_up_but_never_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    asha = Asha(monkeypatch, [], Prune(first=2, reduction=2), 8)
    for key, value in (("a", 10.0), ("b", 20.0), ("c", 5.0), ("d", 30.0)):
        assert asha.report(key, 2, value) == "CONTINUE"
    assert asha.pruned == ["c"]
    asha.report("b", 4, 21.0)
    asha.report("d", 4, 20.0)
    assert asha.pruned == ["c", "d"]
    asha.report("e", 8, 1.0)
    assert asha.pruned == ["c", "d"], "a trial at its last epoch ends by itself"


def test_rungs_remember_trials_of_an_earlier_run(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [
        Told(Ask("000", {}), "finished", {2: 30.0, 4: 28.0, 8: 35.0}),
        Told(Ask("001", {}), "pruned", {2: 10.0}),
    ]
    asha = Asha(monkeypatch, known, Prune(first=2, reduction=2), 8)
    asha.report("002", 2, 15.0)
    asha.report("003", 2, 25.0)
    assert asha.pruned == ["002"]
    # Best so far, not the last epoch: a stage keeps its best epoch's weights too.
    asha.report("003", 4, 29.0)
    assert asha.pruned == ["002", "003"]


def test_a_trial_that_goes_on_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off = Told(Ask("001", {}), "running", {2: 20.0})
    asha = Asha(monkeypatch, [Told(Ask("000", {}), "finished", {2: 30.0}), cut_off], Prune(first=2), 8)
    asha.report("001", 2, 20.0)
    rung = {milestone: dict(recorded) for milestone, recorded in asha.rungs._brackets[0]._rungs}
    assert rung[2.0] == {"000": 30.0, "001": 20.0}


def test_the_best_value_so_far() -> None:
    told = Told(Ask("0", {}), history={6: 5.0, 2: 3.0, 4: math.nan, 8: 4.0})
    assert told.best_so_far() == {2: 3.0, 4: 3.0, 6: 5.0, 8: 5.0}
    assert told.value == 5.0 and Told(Ask("0", {})).value is None


def test_whole_choices_of_a_float_key_are_found_again() -> None:
    """1 in the sweep file is the hand-set 1.0: neither an error nor a setting to try twice."""
    sweep = SweepFile(space={"MAX_CLIP_NORM": Choices(choices=(0.1, 1, 5))})
    known = [Told(Ask("000", {}), "finished", {2: 20.0})]
    for number in (1, 2):
        values = suggest(sweep, {"MAX_CLIP_NORM": 1.0}, known, number)
        assert values is not None and values["MAX_CLIP_NORM"] != 1
        known.append(Told(Ask(f"{number:03d}", values), "finished", {2: 20.0 + number}))
    assert suggest(sweep, {"MAX_CLIP_NORM": 1.0}, known, 3) is None
