"""End of a stage: kills, failures and simultaneous starts lose no result and repeat no work."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
from motip.curriculum.records import InUse, acquire_lock, release_lock

from motip.curriculum import stage as stage_module
from motip.errors import MotipError, exit_on_error, find_motip_error
from motip.lineage import Lineage
from tests.helpers.null_lineage import NullLineage
from tests.helpers.small_curriculum import CURRICULUM, QuietUi, run, write_files


def one_stage(folder: Path) -> Path:
    """A curriculum file with the first stage alone."""
    path = write_files(folder)
    lines = CURRICULUM.splitlines()
    kept = lines[: lines.index("stages:") + 2]
    path.write_text("\n".join([*kept, "domains: {score: none}"]) + "\n")
    return path


def test_a_result_missing_in_mlflow_is_recorded_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 between writing the stage record and recording the result in MLflow."""
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = Lineage(storage=storage)
    real, calls = Lineage.log_stage_result, []

    def dies(self: Lineage, *arguments: Any, **named: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("power cut")
        real(self, *arguments, **named)

    monkeypatch.setattr(Lineage, "log_stage_result", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        run(path, storage, lineage=lineage)
    (stored,) = (storage / "curricula").rglob("stage.json")
    run_id = json.loads(stored.read_text())["run_id"]
    client = lineage._store.client()
    assert "best_HOTA" not in client.get_run(run_id).data.metrics

    again, ui, _ = run(path, storage, lineage=lineage)
    assert ui.begun == [] and again.records[0].skipped
    recorded = client.get_run(run_id)
    assert recorded.info.status == "FINISHED" and "best_HOTA" in recorded.data.metrics
    alias = client.get_model_version_by_alias("motip-curriculum", "bdd-foundation")
    assert alias.run_id == run_id
    run(path, storage, lineage=lineage)
    assert len(calls) == 2, "recorded once"


def test_an_interrupted_stage_resumes_with_other_resumable_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys about speed and timeouts may change between two attempts."""
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = Lineage(storage=storage)
    monkeypatch.setattr(QuietUi, "record", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(path, storage, lineage=lineage)
    monkeypatch.undo()
    result, _, _ = run(path, storage, lineage=lineage, overrides=("NUM_WORKERS=2", "PROGRESS_TIMEOUT_S=7200"))
    runs = lineage._store.client().search_runs([lineage._store.experiment_id], "tags.motip.stage = 'BDD-Foundation'")
    assert [each.info.run_id for each in runs] == [result.records[0].run_id]
    assert runs[0].info.status == "FINISHED"
    assert any("NUM_WORKERS 1 -> 2" in value for key, value in runs[0].data.tags.items() if "resumed" in key)


def test_a_stage_in_training_by_another_process_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    monkeypatch.setattr(QuietUi, "record", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(path, storage)
    monkeypatch.undo()
    (stored,) = (storage / "curricula").rglob("stage.json")
    waits = (
        "import sys; from motip.lineage.driver_process import this_driver; "
        "print(this_driver(), flush=True); sys.stdin.read()"
    )
    with Popen([sys.executable, "-c", waits], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        driver = other.stdout.readline().strip()
        stored.write_text(json.dumps({**json.loads(stored.read_text()), "driver": driver}))
        with pytest.raises(MotipError, match=f"running already(.|\n)*process {other.pid} of this machine"):
            run(path, storage)
        other.stdin.close()
        other.wait(30)
    result, _, _ = run(path, storage)
    assert not result.records[0].skipped


def _interrupt(self: QuietUi, kind: str, values: dict[str, Any]) -> None:
    raise KeyboardInterrupt


def test_a_result_refused_by_mlflow_is_noted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    run(path, storage)
    (stored,) = (storage / "curricula").rglob("stage.json")
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "told": False, "run_id": "gone"}))

    def refuses(self: NullLineage, *arguments: Any, **named: Any) -> None:
        raise MotipError("MLflow refuses: run gone was deleted")

    monkeypatch.setattr(NullLineage, "log_stage_result", refuses)
    result, ui, _ = run(path, storage)
    assert result.records[0].skipped and [note for note in ui.notes if "missing in MLflow: MLflow refuses" in note]
    _, again, _ = run(path, storage)
    assert not [note for note in again.notes if "missing in MLflow" in note]


def test_of_two_simultaneous_starts_one_gets_the_lock(tmp_path: Path) -> None:
    """Both find the lock free, one gets it. After a failure the lock is released while the process lives."""
    path = tmp_path / "stage.json"
    start = f"""
import sys, pathlib
from motip.curriculum.records import InUse, acquire_lock
sys.stdin.readline()
try:
    acquire_lock(pathlib.Path({str(path)!r}), "stage")
    print("acquired", flush=True)
except InUse:
    print("refused", flush=True)
sys.stdin.read()
"""
    processes = [Popen([sys.executable, "-c", start], stdin=PIPE, stdout=PIPE, text=True) for _ in range(2)]
    for each in processes:
        each.stdin.write("go\n")  # type: ignore[union-attr]
        each.stdin.flush()  # type: ignore[union-attr]
    printed = sorted(each.stdout.readline().strip() for each in processes)  # type: ignore[union-attr]
    for each in processes:
        each.communicate(timeout=30)
    assert printed == ["acquired", "refused"]
    acquire_lock(path, "stage")
    release_lock(path)
    assert "driver" not in json.loads(path.read_text())


def delete_runs(lineage: Lineage) -> None:
    """Delete the runs in MLflow and the folder of their artifacts: later entries are refused."""
    for each in lineage._find_runs(""):
        lineage._store.client().delete_run(each.info.run_id)
    artifacts = lineage._store.folder / "artifacts"
    shutil.rmtree(artifacts)
    artifacts.write_text("no folder")


@pytest.mark.parametrize("failure", [RuntimeError("CUDA error: device-side assert"), KeyboardInterrupt()])
def test_the_original_error_is_raised_if_it_cannot_be_recorded(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow refuses, and the stage record was truncated by a full disk."""
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = Lineage(storage=storage)

    def fails(job: Any, placement: Any, folder: str, on_record: Any) -> None:
        on_record("note", {"text": "a worker was lost"})
        delete_runs(lineage)
        (Path(folder) / "stage.json").write_text("")
        raise failure

    monkeypatch.setattr(stage_module, "fit", fails)
    with pytest.raises(type(failure)) as caught:
        run(path, storage, lineage=lineage)
    assert caught.value is failure and find_motip_error(failure) is None
    refused = [message for message in caplog.messages if "MLflow refuses" in message]
    assert len(refused) == 3 and "set aside" in refused[0], "notes, stage, curriculum"
    assert any("stays locked" in message and "not a JSON file" in message for message in caplog.messages)


def test_ctrl_c_keeps_its_exit_code_if_mlflow_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = Lineage(storage=storage)

    def interrupt(self: QuietUi, kind: str, values: dict[str, Any]) -> None:
        delete_runs(lineage)
        raise KeyboardInterrupt

    monkeypatch.setattr(QuietUi, "record", interrupt)
    with pytest.raises(SystemExit) as end, exit_on_error():
        run(path, storage, lineage=lineage)
    assert end.value.code == 130


def test_undeliverable_notes_of_a_successful_training_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow refuses them, and a full disk prevents setting them aside."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = Lineage(storage=storage)

    def ends(job: Any, placement: Any, folder: str, on_record: Any) -> None:
        on_record("note", {"text": "a worker was lost"})
        delete_runs(lineage)
        monkeypatch.setattr(shutil, "copyfile", full)

    monkeypatch.setattr(stage_module, "fit", ends)
    with pytest.raises(MotipError, match="cannot be spooled: No space left"):
        run(path, storage, lineage=lineage)


@pytest.mark.parametrize("shared", [False, True])
def test_a_curriculum_refused_a_stage_ends_only_its_own_run(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_driver: str
) -> None:
    """Two simultaneous starts may share the curriculum's run; the process that trains still needs it."""
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = Lineage(storage=storage)
    monkeypatch.setattr(QuietUi, "record", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(path, storage, lineage=lineage)
    (stored,) = (storage / "curricula").rglob("stage.json")
    record = json.loads(stored.read_text())
    (curriculum,) = lineage._find_runs("tags.`motip.kind` = 'curriculum'")
    assert record["curriculum_run"] == curriculum.info.run_id
    stored.write_text(
        json.dumps({**record, "driver": other_driver, **({} if shared else {"curriculum_run": "another"})})
    )
    with pytest.raises(InUse):
        run(path, storage, lineage=lineage)
    (curriculum,) = lineage._find_runs("tags.`motip.kind` = 'curriculum'")
    assert curriculum.info.status == ("RUNNING" if shared else "KILLED")


def test_the_lock_names_the_curriculum_run_before_the_stage_has_one(tmp_path: Path) -> None:
    code = f"""
import pathlib
from motip.curriculum.records import acquire_lock
acquire_lock(pathlib.Path({str(tmp_path / "stage.json")!r}), "stage", parent_run_id="its curriculum")
print(flush=True)
input()
"""
    with Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True) as other:
        other.stdout.readline()  # type: ignore[union-attr]
        with pytest.raises(InUse) as refused:
            acquire_lock(tmp_path / "stage.json", "stage", parent_run_id="another curriculum")
        other.communicate("\n", timeout=30)
    assert refused.value.parent_run_id == "its curriculum"


def test_a_stage_finished_by_another_process_meanwhile_stays_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    first, _, _ = run(path, storage)
    (stored,) = (storage / "curricula").rglob("stage.json")
    before = stored.read_text()
    # The state that this start saw, just before the other process finished.
    monkeypatch.setattr(stage_module, "finished_record", lambda *_: None)
    again, ui, _ = run(path, storage)
    assert ui.begun == [] and again.records[0].skipped and again.records[0].sha256 == first.records[0].sha256
    assert stored.read_text() == before
    # Changed weights are trained again.
    Path(first.records[0].checkpoint).write_bytes(b"other")
    assert acquire_lock(stored, "stage", inputs=first.records[0].inputs) is None
    assert json.loads(stored.read_text())["status"] == "running"
