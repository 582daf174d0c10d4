"""Which setting is called best and how the evidence reads; the picture of a sweep."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from motip.config.sweep_file import Choices, Range, SweepFile
from motip.errors import MotipError
from motip.tune.decision import evidence, favourite, judge
from motip.tune.searcher import Ask, Told
from motip.tune.sweep_plot import Shown, sweep_figure
from motip.tune.sweep_records import read_trials, write_trial

SPACE: dict[str, Range | Choices] = {
    "LR": Range(low=1e-4, high=1e-2, log=True),
    "sample_intervals": Choices(choices=([1], [1, 2])),
}
HAND_SET = {"LR": 7e-4, "sample_intervals": [1, 2]}


def told(key: str, value: float | None, status: str = "finished", seed: int | None = None) -> Told:
    values = {} if key.startswith("000") else {"LR": 1e-3, "sample_intervals": [1]}
    return Told(Ask(key, values, seed), status, {} if value is None else {2: value - 1, 4: value})


TRIALS = [told("000", 40.0), told("001", 46.0), told("002", 47.0, "pruned"), told("003", None, "failed")]


def repeats(best: float, hand_set: float) -> list[Told]:
    found = []
    for seed in (30, 31):
        found += [told(f"001-seed{seed}", best, seed=seed), told(f"000-seed{seed}", hand_set, seed=seed)]
    return found


def test_the_favourite_came_to_its_end() -> None:
    assert favourite(TRIALS).ask.key == "001"
    assert favourite([told("000", 40.0), told("001", 40.0)]).ask.key == "000", "the earliest of equals"
    with pytest.raises(MotipError, match="no trial of the sweep was finished"):
        favourite(TRIALS[2:])


def test_a_winner_that_holds_up() -> None:
    verdict = judge(TRIALS, repeats(44.0, 42.0), 29)
    assert verdict.better and verdict.chosen == {"LR": 1e-3, "sample_intervals": [1]}
    assert verdict.best.all == [46.0, 44.0, 44.0] and verdict.best.seed == 29
    assert verdict.best.mean == pytest.approx(44.6667, abs=1e-3) and verdict.best.unchosen == 44.0


def test_a_winner_by_luck_is_not_called_best() -> None:
    # 46 against 40 with the seed it was chosen by; worse with the others.
    verdict = judge(TRIALS, repeats(41.0, 42.0), 29)
    assert verdict.best.mean > verdict.hand_set.mean
    assert not verdict.better and verdict.chosen == {}


def test_the_hand_set_setting_may_win() -> None:
    verdict = judge([told("000", 48.0), told("001", 46.0)], [told("000-seed30", 47.0, seed=30)], 29)
    assert verdict.best.key == "000" and verdict.chosen == {}


def test_without_a_confirmation_nothing_is_called_best() -> None:
    failed = [told("001-seed30", None, "failed", 30)]
    with pytest.raises(MotipError, match="trial 001 could not be confirmed"):
        judge(TRIALS, failed, 29)


def test_evidence_says_what_was_compared() -> None:
    verdict = judge(TRIALS, repeats(44.0, 42.0), 29)
    lines = evidence(
        verdict,
        TRIALS,
        SweepFile(space=SPACE, set={"EPOCHS": 4}),
        stage="BDD-Foundation",
        metric="HOTA",
        videos=15,
        hand_set=HAND_SET,
        digests={"sweep": "abc"},
        date=datetime(2026, 3, 1, tzinfo=UTC),
    )
    text = "\n".join(lines)
    for part in (
        "2026-03-01",
        "HOTA in percent on 15 locked validation videos",
        "4: 2 finished, 1 pruned, 1 failed; TPE, seed 0, ASHA from epoch 1, reduction 2, EPOCHS 4",
        "trial 001: 46.00 (seed 29), 44.00 (seed 30), 44.00 (seed 31): 44.67 ± 1.15",
        "trial 000: 40.00 (seed 29), 42.00 (seed 30), 42.00 (seed 31): 41.33 ± 1.15",
        "LR 0.0007, sample_intervals [1, 2]",
        "+2.00 over hand-set, on seeds that the setting was not chosen by",
        "sweep     abc",
        "--set 'LR=0.001' --set 'sample_intervals=[1]'",
    ):
        assert part in text, part


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    for each in (*TRIALS, told("001-seed30", 44.0, seed=30)):
        write_trial(tmp_path, each, run_id="r")
    write_trial(tmp_path, TRIALS[0])
    (tmp_path / "trials" / "000-abc").mkdir()
    (tmp_path / "trials" / "000-abc" / "config.json").write_text("{}")
    back = read_trials(tmp_path)
    assert {each.ask.key: each for each in back} == {
        each.ask.key: each for each in (*TRIALS, told("001-seed30", 44.0, seed=30))
    }
    assert '"run_id": "r"' in (tmp_path / "trials" / "000.json").read_text()


def test_the_picture_takes_what_sweeps_hold(tmp_path: Path) -> None:
    trials = [
        Shown("000", {"LR": 5e-5, "sample_intervals": [4]}, 40.0, "finished", (41.0,)),  # outside the space
        Shown("001", {"LR": 1e-3, "sample_intervals": [1]}, 46.0, "finished", (44.0, 45.0)),
        Shown("002", {"LR": None, "sample_intervals": [1, 2]}, 30.0, "pruned"),
        Shown("003", {"LR": 1e-2, "sample_intervals": [1]}, None, "failed"),
    ]
    figure = sweep_figure(trials, SPACE, title="t", metric="HOTA", hand_set="000", best="001")
    left, right = figure.axes
    across = [np.asarray(line.get_xdata(), float) for line in left.lines]
    upright = [places for places in across if np.ptp(places) == 0]
    assert len(left.lines) - len(upright) == 3, "one line for each trial with a score"
    assert right.get_xscale() == "log" and right.get_xlabel() == "LR"
    heights = np.concatenate([np.asarray(line.get_ydata(), float) for line in left.lines])
    assert heights.min() >= 0 and heights.max() <= 1
    figure.savefig(tmp_path / "sweep.png", dpi=50)
    assert matplotlib.image.imread(tmp_path / "sweep.png").std() > 0.02
    only_lists: dict[str, Range | Choices] = {"sample_intervals": SPACE["sample_intervals"]}
    figure = sweep_figure(trials[:2], only_lists, title="t", metric="HOTA", hand_set="000", best="000")
    assert figure.axes[1].get_xlabel() == "trial"
