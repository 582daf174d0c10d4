"""Console lines of a sweep, from the records and event logs of its trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from motip.events import Note, StepLogged
from motip.stage_folder import SweepFolder
from motip.tune import sweep_log
from motip.tune.sweep_log import SweepLog
from motip.tune.trial_records import Trial, read_trial, write_trial
from tests.helpers.small_curriculum import QuietUi


@pytest.fixture
def ui() -> QuietUi:
    return QuietUi()


@pytest.fixture
def log(ui: QuietUi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepLog:
    found = SweepLog(ui, SweepFolder(tmp_path), 4, 1, epochs=6)
    found._interval_s = 0.0
    monkeypatch.setattr(sweep_log, "STATUS_INTERVAL_S", 0.0)
    return found


def test_notes_and_positions_of_running_trials_are_shown(log: SweepLog, ui: QuietUi, tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    best, resumed = Trial("000", history={2: 40.0}), Trial("001", {"LR": 1e-3, "EPOCHS": 8}, inputs="abc", run_id="r")
    events = resumed.folder(sweep).log()
    events.send(Note("of an earlier attempt"))
    log.trial_started(resumed)
    log.poll([best], lambda: "it needs 1 CPU; free now: none")
    events.send(Note("a worker was lost"))
    events.send(StepLogged(2, 4, 9, 13, {}))
    log.poll([best], lambda: "")
    assert ui.notes == [
        "trial 001 resumes: LR 0.001, EPOCHS 8",
        "trial 001: has waited 0 s for its workers; it needs 1 CPU; free now: none",
        "1 of 4 done; workers are starting; best so far trial 000, 40.00",
        "trial 001: a worker was lost",
        "1 of 4 done; trial 001 at epoch 3/8, step 5/9; best so far trial 000, 40.00",
    ]


def test_the_last_notes_of_a_trial_come_before_its_end(log: SweepLog, ui: QuietUi, tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    log.trial_started(Trial("002", seed=30))
    assert read_trial(sweep, "002").status == "running", "its record precedes its process"
    ended = Trial("002", {}, 30, "pruned", {1: 5.0}, inputs="abc")
    ended.folder(sweep).log().send(Note("last"))
    write_trial(sweep, ended)
    assert log.trial_ended("002") == ended
    expected = "trial 002 pruned after 1 epoch: others were better by then, best 5.00 (2 of 4 done)"
    assert ui.notes == ["trial 002 starts: baseline, seed 30", "trial 002: last", expected]


@pytest.mark.parametrize("message", ["", "RuntimeError: CUDA error"])
def test_a_trial_whose_process_died_has_failed_and_is_repeated(message: str, log: SweepLog, tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    log.trial_started(Trial("001", message="of an earlier attempt"))
    write_trial(sweep, Trial("001", history={1: 5.0}, message=message))
    trial = log.trial_ended("001")
    assert trial.status == "failed"
    assert trial.message == (message or "the trial process exited without a result (killed or out of memory?)")
    assert read_trial(sweep, "001").status == "running"
