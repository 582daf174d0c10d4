"""What a stage leaves behind where a process dies at an awkward moment: nothing is lost, nothing is done twice."""

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
from motip.curriculum.records import InUse, claim, release
from motip.errors import MotipError, exit_on_error, find_motip_error
from motip.lineage import Lineage, NullLineage
from tests.helpers.small_curriculum import CURRICULUM, QuietUi, run, write_files


def one_stage(folder: Path) -> Path:
    """A curriculum file with the first stage alone."""
    path = write_files(folder)
    lines = CURRICULUM.splitlines()
    kept = lines[: lines.index("stages:") + 2]
    path.write_text("\n".join([*kept, "domains: {score: none}"]) + "\n")
    return path


def test_an_end_that_mlflow_was_not_told_of_is_told_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 between the stage's record and the last words to MLflow."""
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
    told = client.get_run(run_id)
    assert told.info.status == "FINISHED" and "best_HOTA" in told.data.metrics
    alias = client.get_model_version_by_alias("motip-curriculum", "bdd-foundation")
    assert alias.run_id == run_id
    run(path, storage, lineage=lineage)
    assert len(calls) == 2, "told once"


def test_a_cut_off_stage_goes_on_with_another_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only says how fast or how patiently a stage runs may change between two attempts."""
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


def test_a_stage_that_another_process_trains_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_mlflow_refuses_of_an_end_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_of_two_starts_at_once_one_drives(tmp_path: Path) -> None:
    """Both find the stage free; only one may go on. What fails in a process that lives on does not stay in use."""
    path = tmp_path / "stage.json"
    start = f"""
import sys, pathlib
from motip.curriculum.records import InUse, claim
sys.stdin.readline()
try:
    claim(pathlib.Path({str(path)!r}), "stage")
    print("drives", flush=True)
except InUse:
    print("refused", flush=True)
sys.stdin.read()
"""
    processes = [Popen([sys.executable, "-c", start], stdin=PIPE, stdout=PIPE, text=True) for _ in range(2)]
    for each in processes:
        each.stdin.write("go\n")  # type: ignore[union-attr]
        each.stdin.flush()  # type: ignore[union-attr]
    said = sorted(each.stdout.readline().strip() for each in processes)  # type: ignore[union-attr]
    for each in processes:
        each.communicate(timeout=30)
    assert said == ["drives", "refused"]
    claim(path, "stage")
    release(path)
    assert "driver" not in json.loads(path.read_text())


def tidy_up(lineage: Lineage) -> None:
    """Somebody deletes the runs in MLflow, and the folder of their artifacts: from now on it refuses."""
    for each in lineage._find_runs(""):
        lineage._store.client().delete_run(each.info.run_id)
    artifacts = lineage._store.folder / "artifacts"
    shutil.rmtree(artifacts)
    artifacts.write_text("no folder")


@pytest.mark.parametrize("failure", [RuntimeError("CUDA error: device-side assert"), KeyboardInterrupt()])
def test_why_a_training_ended_is_seen_though_nobody_takes_it(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither MLflow, nor the record of the stage, which a full disk cut off."""
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = Lineage(storage=storage)

    def fails(job: Any, placement: Any, folder: str, on_record: Any) -> None:
        on_record("note", {"text": "a worker was lost"})
        tidy_up(lineage)
        (Path(folder) / "stage.json").write_text("")
        raise failure

    monkeypatch.setattr(stage_module, "fit", fails)
    with pytest.raises(type(failure)) as caught:
        run(path, storage, lineage=lineage)
    assert caught.value is failure and find_motip_error(failure) is None
    told = [message for message in caplog.messages if "MLflow refuses" in message]
    assert len(told) == 3 and "set aside" in told[0], "notes, stage, curriculum"
    assert any("stays in use" in message and "not a JSON file" in message for message in caplog.messages)


def test_ctrl_c_stays_ctrl_c_though_mlflow_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = Lineage(storage=storage)

    def interrupt(self: QuietUi, kind: str, values: dict[str, Any]) -> None:
        tidy_up(lineage)
        raise KeyboardInterrupt

    monkeypatch.setattr(QuietUi, "record", interrupt)
    with pytest.raises(SystemExit) as end, exit_on_error():
        run(path, storage, lineage=lineage)
    assert end.value.code == 130


def test_notes_of_a_training_that_did_not_fail_are_not_lost_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow refuses them, and the disk has no room to set them aside."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = Lineage(storage=storage)

    def ends(job: Any, placement: Any, folder: str, on_record: Any) -> None:
        on_record("note", {"text": "a worker was lost"})
        tidy_up(lineage)
        monkeypatch.setattr(shutil, "copyfile", full)

    monkeypatch.setattr(stage_module, "fit", ends)
    with pytest.raises(MotipError, match="cannot be kept either: No space left"):
        run(path, storage, lineage=lineage)


@pytest.mark.parametrize("shared", [False, True])
def test_a_curriculum_that_is_refused_a_stage_ends_its_run_if_it_is_its_own(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, somebody: str
) -> None:
    """Of two starts in the same second both may hold the run to be theirs; the one that trains still needs it."""
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = Lineage(storage=storage)
    monkeypatch.setattr(QuietUi, "record", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(path, storage, lineage=lineage)
    (stored,) = (storage / "curricula").rglob("stage.json")
    record = json.loads(stored.read_text())
    (curriculum,) = lineage._find_runs("tags.`motip.kind` = 'curriculum'")
    assert record["curriculum_run"] == curriculum.info.run_id
    stored.write_text(json.dumps({**record, "driver": somebody, **({} if shared else {"curriculum_run": "another"})}))
    with pytest.raises(InUse):
        run(path, storage, lineage=lineage)
    (curriculum,) = lineage._find_runs("tags.`motip.kind` = 'curriculum'")
    assert curriculum.info.status == ("RUNNING" if shared else "KILLED")


def test_who_claims_a_stage_is_known_before_its_run_is(tmp_path: Path) -> None:
    code = f"""
import pathlib
from motip.curriculum.records import claim
claim(pathlib.Path({str(tmp_path / "stage.json")!r}), "stage", under="its curriculum")
print(flush=True)
input()
"""
    with Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True) as other:
        other.stdout.readline()  # type: ignore[union-attr]
        with pytest.raises(InUse) as refused:
            claim(tmp_path / "stage.json", "stage", under="another curriculum")
        other.communicate("\n", timeout=30)
    assert refused.value.under == "its curriculum"


def test_a_stage_that_another_process_finishes_meanwhile_stays_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    first, _, _ = run(path, storage)
    (stored,) = (storage / "curricula").rglob("stage.json")
    before = stored.read_text()
    # As this start saw it, a moment before the other one was done.
    monkeypatch.setattr(stage_module, "finished_record", lambda *_: None)
    again, ui, _ = run(path, storage)
    assert ui.begun == [] and again.records[0].skipped and again.records[0].sha256 == first.records[0].sha256
    assert stored.read_text() == before
    # Weights that are not what they were are trained again.
    Path(first.records[0].checkpoint).write_bytes(b"other")
    assert claim(stored, "stage", inputs=first.records[0].inputs) is None
    assert json.loads(stored.read_text())["status"] == "running"
