"""Decision of a sweep, its report, trial records and figure."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from motip.config.sweep_file import Choices, Range, SweepFile
from motip.errors import MotipError
from motip.stage_folder import SweepFolder
from motip.tune.decision import SweepDecision, best_trial, decide, report_lines
from motip.tune.sweep_plot import trials_figure
from motip.tune.trial_records import Trial, read_trials, write_trial

SPACE: dict[str, Range | Choices] = {
    "LR": Range(low=1e-4, high=1e-2, log=True),
    "sample_intervals": Choices(choices=([1], [1, 2])),
}
BASELINE_VALUES = {"LR": 7e-4, "sample_intervals": [1, 2]}


def trial(key: str, value: float | None, status: str = "finished", seed: int | None = None) -> Trial:
    values = {} if key.startswith("000") else {"LR": 1e-3, "sample_intervals": [1]}
    return Trial(key, values, seed, status, {} if value is None else {2: value - 1, 4: value})


TRIALS = [trial("000", 40.0), trial("001", 46.0), trial("002", 47.0, "pruned"), trial("003", None, "failed")]


def repeats(best: float, baseline: float) -> list[Trial]:
    found = []
    for seed in (30, 31):
        found += [trial(f"001-seed{seed}", best, seed=seed), trial(f"000-seed{seed}", baseline, seed=seed)]
    return found


def test_only_finished_trials_can_be_the_best() -> None:
    assert best_trial(TRIALS).key == "001"
    assert best_trial([trial("000", 40.0), trial("001", 40.0)]).key == "000", "the earliest of equals"
    with pytest.raises(MotipError, match="no trial of the sweep was finished"):
        best_trial(TRIALS[2:])


def test_a_trial_that_is_better_on_further_seeds_replaces_the_baseline() -> None:
    decision = decide(TRIALS, repeats(44.0, 42.0), 29)
    assert decision.better and decision.values == {"LR": 1e-3, "sample_intervals": [1]}
    assert decision.best.all_values == [46.0, 44.0, 44.0] and decision.best.seed == 29
    assert decision.best.mean == pytest.approx(44.6667, abs=1e-3) and decision.best.repeat_mean == 44.0


def test_a_trial_that_is_worse_on_further_seeds_does_not_replace_the_baseline() -> None:
    # 46 against 40 with the seed of the search; worse with the others.
    decision = decide(TRIALS, repeats(41.0, 42.0), 29)
    assert decision.best.mean > decision.baseline.mean
    assert not decision.better and decision.values == {}


def test_a_difference_within_the_spread_of_the_seeds_does_not_replace_the_baseline() -> None:
    """44 and 48 against 45 and 41: variance 8 in both, t quantile of 2 degrees of freedom 2.92."""

    def decided(best: tuple[float, ...], baseline: tuple[float, ...]) -> SweepDecision:
        further = [trial(f"001-seed{30 + n}", value, seed=30 + n) for n, value in enumerate(best)]
        further += [trial(f"000-seed{30 + n}", value, seed=30 + n) for n, value in enumerate(baseline)]
        return decide(TRIALS, further, 29)

    decision = decided((44.0, 48.0), (45.0, 41.0))
    assert decision.difference == 3.0 and decision.margin == pytest.approx(2.92 * math.sqrt(8), abs=1e-3)
    assert not decision.better and decision.values == {}
    assert decided((47.0, 48.0), (41.0, 40.0)).better
    # one further seed: the largest difference within a setting, here 46 - 43
    assert decided((43.0,), (39.0,)).margin == pytest.approx(3.0)
    assert decided((43.0,), (39.0,)).better and not decided((43.0,), (41.0,)).better
    # without repetitions of the baseline, its one value adds no spread
    assert decided((45.0, 47.0), ()).margin == pytest.approx(6.3138 * math.sqrt(3), abs=1e-3)
    assert not decided((40.0, 40.0), (40.0, 40.0)).better, "equal means keep the baseline"


def test_a_failed_repetition_does_not_count() -> None:
    stopped = trial("001-seed31", 90.0, "failed", seed=31)
    assert decide(TRIALS, [*repeats(44.0, 42.0)[:2], stopped], 29).best.repeat_values == {30: 44.0}


def test_the_baseline_may_be_the_best_trial() -> None:
    decision = decide([trial("000", 48.0), trial("001", 46.0)], [trial("000-seed30", 47.0, seed=30)], 29)
    assert decision.best.key == "000" and decision.values == {}


def test_failed_confirmation_is_an_error() -> None:
    failed = [trial("001-seed30", None, "failed", 30)]
    with pytest.raises(MotipError, match="trial 001 could not be confirmed"):
        decide(TRIALS, failed, 29)


def test_report_lines_show_the_comparison() -> None:
    decision = decide(TRIALS, repeats(44.0, 42.0), 29)
    lines = report_lines(
        decision,
        TRIALS,
        SweepFile(space=SPACE, set={"EPOCHS": 4}),
        stage="BDD-Foundation",
        metric="HOTA",
        videos=15,
        baseline=BASELINE_VALUES,
        digests={"sweep": "abc"},
        date=datetime(2026, 3, 1, tzinfo=UTC),
    )
    text = "\n".join(lines)
    for part in (
        "2026-03-01",
        "HOTA in percent on 15 locked validation videos",
        "4: 2 finished, 1 pruned, 1 failed; TPE, seed 0, ASHA from epoch 1, reduction 2, EPOCHS 4",
        "trial 001: 46.00 (seed 29), 44.00 (seed 30), 44.00 (seed 31): 44.67 ± 1.15",
        "baseline  trial 000: 40.00 (seed 29), 42.00 (seed 30), 42.00 (seed 31): 41.33 ± 1.15",
        "LR 0.0007, sample_intervals [1, 2]",
        "+2.00 over the baseline, on seeds not used for selection",
        "margin    0.00 had to be exceeded: 95% quantile of t times the standard error from the spread of the seeds",
        "sweep     abc",
        "--set 'LR=0.001' --set 'sample_intervals=[1]'",
    ):
        assert part in text, part


def test_trial_records_are_read_back_unchanged(tmp_path: Path) -> None:
    sweep, trials = SweepFolder(tmp_path), [*TRIALS, trial("001-seed30", 44.0, seed=30)]
    for each in trials:
        write_trial(sweep, replace(each, run_id="r", inputs="abc", seconds=1.5))
    (tmp_path / "trials" / "000-abc").mkdir()
    (tmp_path / "trials" / "000-abc" / "config.json").write_text("{}")
    found = read_trials(sweep)
    assert [each.key for each in found] == ["000", "001", "001-seed30", "002", "003"]
    assert {each.key: replace(each, run_id="", inputs="", seconds=0.0) for each in found} == {
        each.key: each for each in trials
    }
    assert '"run_id": "r"' in (tmp_path / "trials" / "000.json").read_text()


def test_a_record_of_an_interrupted_trial_of_version_0_1_is_read(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    record = '{"history": {}, "key": "001", "message": "", "seed": null, "status": "running", "values": {"LR": 1e-3}}'
    (tmp_path / "trials" / "001.json").write_text(record)
    assert read_trials(SweepFolder(tmp_path)) == [Trial("001", {"LR": 1e-3})]


def test_figure_draws_values_outside_the_space_none_pruned_and_failed_trials(tmp_path: Path) -> None:
    baseline = {"LR": 5e-5, "sample_intervals": [4]}  # outside the space

    def plotted(key: str, value: float | None, status: str = "finished", seed: int | None = None, **values: Any) -> Any:
        return Trial(key, values, seed, status, {} if value is None else {1: value})

    trials = [
        plotted("000", 40.0),
        plotted("001", 46.0, LR=1e-3, sample_intervals=[1]),
        plotted("002", 30.0, "pruned", LR=None, sample_intervals=[1, 2]),
        plotted("003", None, "failed", LR=1e-2, sample_intervals=[1]),
    ]
    further = [plotted("000-seed30", 41.0), plotted("001-seed30", 44.0), plotted("001-seed31", 45.0)]
    figure = trials_figure(trials, further, SPACE, baseline, title="t", metric="HOTA", best="001")
    left, right = figure.axes
    x_values = [np.asarray(line.get_xdata(), float) for line in left.lines]
    vertical = [values for values in x_values if np.ptp(values) == 0]
    assert len(left.lines) - len(vertical) == 3, "one line for each trial with a score"
    assert right.get_xscale() == "log" and right.get_xlabel() == "LR"
    heights = np.concatenate([np.asarray(line.get_ydata(), float) for line in left.lines])
    assert heights.min() >= 0 and heights.max() <= 1
    figure.savefig(tmp_path / "sweep.png", dpi=50)
    assert matplotlib.image.imread(tmp_path / "sweep.png").std() > 0.02
    only_lists: dict[str, Range | Choices] = {"sample_intervals": SPACE["sample_intervals"]}
    figure = trials_figure(trials[:2], [], only_lists, baseline, title="t", metric="HOTA", best="000")
    assert figure.axes[1].get_xlabel() == "trial"
