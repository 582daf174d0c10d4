"""Folders of stages and sweeps: locks, records, damaged records, records of version 0.1, listings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from motip.errors import MotipError
from motip.stage_folder import (
    InUse,
    JobFacts,
    StageFolder,
    StageRecord,
    SweepFolder,
    best_first,
    epoch_file,
    epoch_folder,
    evaluation_folder,
    scores_file,
    stage_folders,
)
from motip.storage.driver_process import this_driver
from motip.storage.paths import Location, sha256, write_bytes, write_json


def record(folder: Location, content: bytes = b"weights") -> StageRecord:
    """The record of a stage whose checkpoint is written."""
    stage = StageFolder(folder)
    write_bytes(stage.best, content)
    return StageRecord(
        stage="ground",
        inputs="abc",
        checkpoint=str(stage.best),
        sha256=sha256(stage.best),
        best_epoch=1,
        step=20,
        metrics={"HOTA": 50.0},
        run_id="run-7",
        parent_sha256=None,
        data_digest="d",
        videos=2,
        frames=30,
        epochs=3,
        seconds=1.5,
        transfer={"summary": "all"},
    )


def _other_process(statements: str, folder: Path) -> Popen[str]:
    """A process that runs statements with the stage's folder as `stage`, prints a line and lives until its input."""
    start = "import sys; from motip.stage_folder import *; stage = StageFolder(sys.argv[1])"
    code = f"{start}\n{statements}\nprint('done', flush=True)\nsys.stdin.read()"
    return Popen([sys.executable, "-c", code, str(folder)], stdin=PIPE, stdout=PIPE, text=True)


# ------------------------------------------------------------------------------------------------------------- records


def test_record_is_read_as_it_was_written(folder: Location) -> None:
    stage = StageFolder(folder)
    assert not stage.exists() and stage.record() is None and stage.run_id() is None and stage.state() == {}
    written = record(folder)
    stage.start("run-7", "curriculum-1", inputs="abc")
    assert stage.exists() and stage.record() is None and stage.run_id() == "run-7"
    stage.write_record(written)
    assert stage.record() == written
    finished = stage.finished("abc")
    assert finished is not None and finished.skipped and finished.step == 20
    assert stage.finished("other inputs") is None
    write_bytes(stage.best, b"changed")
    assert stage.finished("abc") is None, "its weights are trained again"
    assert [str(each) for each in stage_folders(folder.parent)] == [str(folder)]


def test_record_of_a_moved_storage_names_the_checkpoint_beside_it(tmp_path: Path) -> None:
    StageFolder(tmp_path / "before").write_record(record(tmp_path / "before"))
    (tmp_path / "before").rename(tmp_path / "after")
    moved = StageFolder(tmp_path / "after")
    found = moved.finished("abc")
    assert found is not None and found.checkpoint == str(moved.best)


@pytest.mark.parametrize(
    ("changes", "wrong"), [({"step": "many"}, "step"), ({"sha256": None, "videos": []}, "sha256, videos")]
)
def test_damaged_record_is_an_error(tmp_path: Path, changes: dict[str, object], wrong: str) -> None:
    stage = StageFolder(tmp_path)
    stage.write_record(record(tmp_path))
    write_json(stage.state_path, {**stage.state(), **changes})
    with pytest.raises(MotipError, match=f"has no {wrong}") as caught:
        stage.record()
    assert str(tmp_path) in str(caught.value.where) and "not trained again" in str(caught.value.fix)
    stored = {key: value for key, value in stage.state().items() if key not in changes}
    write_json(stage.state_path, stored)
    with pytest.raises(MotipError, match=f"has no {wrong}"):
        stage.finished("abc")
    stage.state_path.write_text('{"status": "fin')  # type: ignore[union-attr]
    with pytest.raises(MotipError, match="not a JSON file"):
        stage.record()


@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        ({}, False),
        ({"told": True}, False),
        ({"told": False}, True),
        ({"mlflow_synced": True}, False),
        ({"mlflow_synced": False}, True),
    ],
)
def test_records_of_version_0_1_are_accepted(tmp_path: Path, keys: dict[str, bool], missing: bool) -> None:
    stage = StageFolder(tmp_path)
    written = record(tmp_path)
    stage.write_record(written)
    stored = {**stage.state(), **keys}
    del stored["transfer"]
    write_json(stage.state_path, stored)
    found = stage.record()
    assert found is not None and found.transfer == {} and found.metrics == written.metrics
    assert stage.not_in_mlflow() is missing


def test_job_files(folder: Location) -> None:
    stage = StageFolder(folder)
    assert stage.config() == {} and stage.facts() == JobFacts()
    facts = JobFacts("ground", "MOTA", {"bdd": {"car": ["car", "taxi"]}}, {"bdd": "bdd100k"}, ["bdd"])
    stage.write_job({"EPOCHS": 3}, facts)
    assert stage.config() == {"EPOCHS": 3} and stage.facts() == facts


# --------------------------------------------------------------------------------------------------------------- locks


def test_lock_is_taken_released_and_taken_again(folder: Location) -> None:
    stage = StageFolder(folder)
    stage.acquire("curriculum-1")
    assert stage.state() == {"status": "running", "driver": this_driver(), "curriculum_run": "curriculum-1"}
    stage.acquire("curriculum-2")  # by the same process
    assert stage.state()["curriculum_run"] == "curriculum-2"
    stage.start("run-7", inputs="abc")
    stage.release()
    assert "driver" not in stage.state() and stage.run_id() == "run-7"
    stage.release()


def test_of_two_simultaneous_starts_one_gets_the_lock(tmp_path: Path) -> None:
    attempt = """
sys.stdin.readline()
try:
    stage.acquire()
    print("acquired", flush=True)
except InUse:
    print("refused", flush=True)
"""
    processes = [_other_process(attempt, tmp_path / "stage") for _ in range(2)]
    for each in processes:
        each.stdin.write("go\n")  # type: ignore[union-attr]
        each.stdin.flush()  # type: ignore[union-attr]
    printed = sorted(each.stdout.readline().strip() for each in processes)  # type: ignore[union-attr]
    for each in processes:
        each.communicate(timeout=30)
    assert printed == ["acquired", "refused"]
    StageFolder(tmp_path / "stage").acquire()  # both have ended


def test_lock_of_another_process_is_an_error_until_it_ends(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    with _other_process("stage.acquire('its curriculum')", tmp_path) as other:
        assert other.stdout is not None and other.stdout.readline() == "done\n"
        message = rf"(?s)this stage is running already.*process {other.pid} of this machine"
        with pytest.raises(InUse, match=message) as refused:
            stage.acquire("another curriculum")
        with pytest.raises(InUse):
            stage.acquire_unless_finished("abc")
        stage.release()  # of a lock of another process: no-op
        assert stage.state()["curriculum_run"] == "its curriculum"
        other.communicate("\n", timeout=30)
    assert refused.value.parent_run_id == "its curriculum"
    stage.acquire()


def test_stage_that_another_process_finished_meanwhile_is_not_locked(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    stage.write_record(record(tmp_path))
    before = stage.state_path.read_text()
    done = stage.acquire_unless_finished("abc")
    assert done is not None and done.skipped and stage.state_path.read_text() == before
    write_bytes(stage.best, b"other")
    assert stage.acquire_unless_finished("abc") is None
    assert stage.state()["status"] == "running"


def test_sweeps_are_locked_too(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    with _other_process("SweepFolder(sys.argv[1]).acquire()", tmp_path) as other:
        assert other.stdout is not None and other.stdout.readline() == "done\n"
        with pytest.raises(InUse, match="this sweep is running already"):
            sweep.acquire()
        other.communicate("\n", timeout=30)
    assert json.loads((tmp_path / "sweep.json").read_text())["status"] == "running"


# ------------------------------------------------------------------------------------------------------------ listings


def test_unfinished_epochs_are_not_listed(folder: Location) -> None:
    stage = StageFolder(folder)
    assert stage.checkpoints().latest() is None and stage.checkpoints().epochs == []
    for epoch, step in ((0, 10), (1, 20)):
        write_bytes(folder / epoch_folder(epoch) / epoch_file(epoch), b"weights")
        if epoch == 0:
            write_json(folder / epoch_folder(epoch) / "metrics.json", {"epoch": 0, "step": step, "metrics": {"a": 1}})
    found = stage.checkpoints()
    assert [(each.epoch, each.step, each.metrics) for each in found.epochs] == [(0, 10, {"a": 1})]
    latest = found.latest()
    assert latest is not None and latest.name == "checkpoint_0.pth"


def test_best_epochs() -> None:
    values = {0: {"HOTA": 1.0}, 1: {"HOTA": 3.0}, 2: {"HOTA": float("nan")}, 3: {}, 4: {"HOTA": 3.0}}
    assert best_first(values, "HOTA") == [1, 4, 0]


def test_files_of_a_sweep(folder: Location) -> None:
    sweep = SweepFolder(folder)
    assert sweep.trial_records() == []
    for key in ("b", "a"):
        write_json(sweep.trial_record(key), {})
        sweep.trial(key, "0123456789abcdef").start("run")
    assert [path.name for path in sweep.trial_records()] == ["a.json", "b.json"]
    assert sweep.trial("a", "0123456789abcdef").path == folder / "trials" / "a-0123456789ab"
    assert sorted(each.path.name for each in stage_folders(folder)) == ["a-0123456789ab", "b-0123456789ab"]


def test_folder_of_an_evaluation(tmp_path: Path) -> None:
    digest = "0123456789abcdef" * 4
    assert evaluation_folder(str(tmp_path), digest) == tmp_path / "evaluations" / "0123456789ab"
    assert scores_file("val") == "scores_val.json"
