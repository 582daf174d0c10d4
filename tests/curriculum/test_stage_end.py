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

from motip.curriculum import stage as stage_module
from motip.errors import MotipError, exit_on_error, find_motip_error
from motip.events import EpochDone, Event, Note, StepLogged
from motip.lineage import Lineage
from motip.stage_folder import InUse, StageFolder
from tests.helpers.mlflow_database import lineage_on
from tests.helpers.small_curriculum import CURRICULUM, QuietUi, run, write_files


def one_stage(folder: Path) -> Path:
    """A curriculum file with the first stage alone."""
    path = write_files(folder)
    lines = CURRICULUM.splitlines()
    kept = lines[: lines.index("stages:") + 2]
    path.write_text("\n".join([*kept, "domains: {score: none}"]) + "\n")
    return path


def trained(ui: QuietUi) -> bool:
    return any(isinstance(event, StepLogged) for event in ui.events)


@pytest.mark.parametrize(("dying", "method"), [(Lineage, "log_stage_result"), (StageFolder, "write_record")])
def test_a_stage_killed_at_its_end_is_finished_by_the_next_run(
    dying: type, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 before the result is recorded in MLflow, or between that and writing the stage record."""
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = lineage_on(storage)

    def dies(*_: Any, **__: Any) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(dying, method, dies)
        with pytest.raises(RuntimeError, match="power cut"):
            run(path, storage, lineage=lineage)
    (stored,) = (storage / "curricula").rglob("stage.json")
    run_id = json.loads(stored.read_text())["run_id"]
    client = lineage._store.client()
    assert ("best_HOTA" in client.get_run(run_id).data.metrics) == (dying is StageFolder)

    again, ui, _ = run(path, storage, lineage=lineage)
    assert ui.begun == ["BDD-Foundation"] and not trained(ui) and again.records[0].run_id == run_id
    third, ui, _ = run(path, storage, lineage=lineage)
    assert ui.begun == [] and third.records[0].skipped
    recorded = client.get_run(run_id)
    assert recorded.info.status == "FINISHED"
    assert len(client.get_metric_history(run_id, "best_HOTA")) == len(client.get_metric_history(run_id, "HOTA")) == 1
    assert len(recorded.outputs.model_outputs) == 1, "registered once"
    alias = client.get_model_version_by_alias("motip-curriculum", "bdd-foundation")
    assert alias.run_id == run_id


def test_a_stage_that_version_0_1_did_not_record_is_recorded_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    first, _, _ = run(path, storage)
    (stored,) = (storage / "curricula").rglob("stage.json")
    record = json.loads(stored.read_text())
    stored.write_text(json.dumps({**record, "told": False, "run_id": "gone"}))
    result, ui, _ = run(path, storage)
    assert result.records[0].skipped and ui.begun == [] and result.records[0].sha256 == first.records[0].sha256
    assert sum("MLflow refuses events of run gone" in message for message in caplog.messages) == 1
    assert json.loads(stored.read_text()) == {**record, "run_id": "gone"}
    caplog.clear()
    run(path, storage)
    assert "MLflow refuses" not in caplog.text


def test_an_interrupted_stage_resumes_with_other_resumable_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys about speed and timeouts may change between two attempts."""
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = lineage_on(storage)
    monkeypatch.setattr(QuietUi, "event", _interrupt)
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
    monkeypatch.setattr(QuietUi, "event", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(path, storage)
    monkeypatch.undo()
    (stored,) = (storage / "curricula").rglob("stage.json")
    waits = (
        "import sys; from motip.storage.driver_process import this_driver; "
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


def _interrupt(self: QuietUi, event: Event) -> None:
    raise KeyboardInterrupt


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
    lineage = lineage_on(storage)

    def fails(job: Any, resources: Any, folder: str, catch_up: Any) -> None:
        StageFolder(folder).log().send(Note("a worker was lost"))
        delete_runs(lineage)
        (Path(folder) / "stage.json").write_text("")
        raise failure

    monkeypatch.setattr(stage_module, "fit", fails)
    with pytest.raises(type(failure)) as caught:
        run(path, storage, lineage=lineage)
    assert caught.value is failure and find_motip_error(failure) is None
    refused = [message for message in caplog.messages if "MLflow refuses" in message]
    assert len({message.split(",")[0] for message in refused}) == 2, "events of the stage and of the curriculum"
    assert any("stays locked" in message and "not a JSON file" in message for message in caplog.messages)


def test_ctrl_c_keeps_its_exit_code_if_mlflow_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = lineage_on(storage)

    def interrupt(self: QuietUi, event: Event) -> None:
        delete_runs(lineage)
        raise KeyboardInterrupt

    monkeypatch.setattr(QuietUi, "event", interrupt)
    with pytest.raises(SystemExit) as end, exit_on_error():
        run(path, storage, lineage=lineage)
    assert end.value.code == 130


def test_events_of_a_successful_training_that_cannot_be_written_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path, storage = one_stage(tmp_path), tmp_path / "storage"
    with monkeypatch.context() as patched:

        def ends(self: QuietUi, event: Event) -> None:
            if isinstance(event, EpochDone):
                patched.setattr("motip.events._append", full)

        patched.setattr(QuietUi, "event", ends)
        with pytest.raises(MotipError, match="event log cannot be written: No space left"):
            run(path, storage)
    result, ui, _ = run(path, storage)
    assert not trained(ui) and result.records[0].metrics["HOTA"] >= 0, "finished without another step"


@pytest.mark.parametrize("shared", [False, True])
def test_a_curriculum_refused_a_stage_ends_only_its_own_run(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_driver: str
) -> None:
    """Two simultaneous starts may share the curriculum's run; the process that trains still needs it."""
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = lineage_on(storage)
    monkeypatch.setattr(QuietUi, "event", _interrupt)
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


def test_a_stage_finished_by_another_process_meanwhile_stays_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    first, _, _ = run(path, storage)
    (stored,) = (storage / "curricula").rglob("stage.json")
    before = stored.read_text()
    # The state that this start saw, just before the other process finished.
    seen, really = [], StageFolder.finished
    monkeypatch.setattr(
        StageFolder, "finished", lambda self, inputs: really(self, inputs) if seen else seen.append(inputs)
    )
    again, ui, _ = run(path, storage)
    assert ui.begun == [] and again.records[0].skipped and again.records[0].sha256 == first.records[0].sha256
    assert stored.read_text() == before
