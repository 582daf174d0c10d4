"""Notes of a training, in the stage's folder and its run's artifacts, in order and across restarts."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from motip.curriculum.stage_recorder import StageRecorder

import motip.train.step as train_step
from motip.lineage import Lineage
from motip.report.stage_history import epochs_synced
from motip.storage.paths import write_json
from motip.train.ray_train import FitResult
from tests.helpers.small_curriculum import QuietUi, run, write_files


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture
def lineage(storage: Path) -> Lineage:
    """Shares one database among all tests: creating it takes seconds."""
    return Lineage(storage=storage)


def stage_recorder(lineage: Lineage, run_id: str, folder: Path) -> StageRecorder:
    return StageRecorder(lineage, run_id, QuietUi(), folder)


def attached(lineage: Lineage, run_id: str) -> list[str]:
    """The notes in MLflow, without their times."""
    path = lineage._store.client().download_artifacts(run_id, "notes.txt")
    return without_times(Path(path))


def without_times(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00[ :]", line) for line in lines)
    return [re.sub(r"^\S+\+00:00:? ", "", line) for line in lines]


def note(step: int) -> dict[str, Any]:
    return {"step": step, "text": f"clips skipped: video {step} (3 frames,\n 9 objects)"}


def line(step: int) -> str:
    return f"step {step}: clips skipped: video {step} (3 frames, 9 objects)"


METRICS = {"step": 9, "metrics": {"step/loss": 1.0}}


def test_notes_are_delivered_with_the_next_event_and_extended_after_a_restart(lineage: Lineage, tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    run_id = lineage.start_curriculum("demo", {})
    first = stage_recorder(lineage, run_id, folder)
    first("note", note(1))
    first("note", note(2))
    assert without_times(folder / "notes.txt") == [line(1), line(2)], "written immediately"
    first("step", METRICS)
    assert attached(lineage, run_id) == [line(1), line(2)]
    first("note", note(3))  # and the process dies
    second = stage_recorder(lineage, run_id, folder)
    second("note", {"text": "before the first step"})
    second.deliver_notes()
    assert attached(lineage, run_id) == [line(1), line(2), line(3), "before the first step"]
    assert without_times(folder / "notes.txt") == attached(lineage, run_id)


def test_unchanged_notes_are_sent_once(lineage: Lineage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = lineage.start_curriculum("demo", {})
    sent: list[str] = []
    monkeypatch.setattr(lineage, "log_text", lambda run_id, text, name: sent.append(name))
    recorder = stage_recorder(lineage, run_id, tmp_path / "stage")
    recorder("step", METRICS)
    assert sent == []
    recorder("note", note(1))
    for kind in ("step", "epoch", "step"):
        recorder(kind, METRICS)
    recorder.deliver_notes()
    assert sent == ["notes.txt"]


def test_notes_written_during_an_outage_are_delivered_later(lineage: Lineage, storage: Path, tmp_path: Path) -> None:
    run_id = lineage.start_curriculum("demo", {})
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        unreachable = Lineage(f"http://127.0.0.1:{listener.getsockname()[1]}", storage, retry_interval=60)
    recorder = stage_recorder(unreachable, run_id, tmp_path / "stage")
    for step in (1, 2, 3):
        recorder("note", note(step))
        recorder("step", METRICS)
    assert lineage.flush() == 0
    assert attached(lineage, run_id) == [line(1), line(2), line(3)]


def test_a_skipped_clip_is_recorded_in_mlflow_also_if_the_stage_fails(
    lineage: Lineage, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_files(tmp_path)
    real, calls = train_step.clip_losses, []

    def fails(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("injected")
        raise RuntimeError("power cut")

    monkeypatch.setattr(train_step, "clip_losses", fails)
    with pytest.raises(RuntimeError, match="power cut"):
        run(path, storage, lineage=lineage)
    monkeypatch.setattr(train_step, "clip_losses", real)
    (stored,) = (storage / "curricula").rglob("notes.txt")
    (text,) = without_times(stored)
    expected = r"step 1: epoch 1, step 1: clips skipped: rank 0: out of memory with the last fallback; .*objects"
    assert re.match(expected, text)

    result, _, _ = run(path, storage, lineage=lineage)
    run_id = result.records[0].run_id
    assert run_id is not None
    assert attached(lineage, run_id) == [text], "it is the same run"
    metrics = lineage._store.client().get_run(run_id).data.metrics
    names = {"step/lr/backbone", "step/lr/linear_proj", "step/lr/dictionary", "step/lr/rest", "step/clips_skipped"}
    names |= {f"step/time/{part}_s" for part in ("wait", "forward", "backward", "optimiser", "other")}
    names |= {"step/memory_gib", "step/objects_per_clip", "step/loss", "step/detr_grad_norm", "step/wait_share"}
    names |= {"time/forward_s", "device/memory_gib", "clips_skipped"}
    assert names <= set(metrics)


def test_an_unwritable_note_is_written_with_the_next_event(lineage: Lineage, tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    (folder / "notes.txt").mkdir(parents=True)  # blocks writing to this name
    run_id = lineage.start_curriculum("demo", {})
    each = stage_recorder(lineage, run_id, folder)
    each._notes_file = folder / "notes.txt"
    each("note", note(1))
    (folder / "notes.txt").rmdir()
    each("step", METRICS)
    assert without_times(folder / "notes.txt") == [line(1)]


def test_a_stored_but_unrecorded_epoch_is_backfilled(lineage: Lineage, tmp_path: Path) -> None:
    """kill -9 between storing an epoch and delivering its metrics must not lose them."""
    folder = tmp_path / "stage"
    run_id = lineage.start_curriculum("demo", {})
    write_json(folder / "stage.json", {"status": "running", "stage": "one"})
    epochs = {0: {"train/loss": 3.0, "HOTA": 1.0}, 1: {"train/loss": 2.0, "HOTA": 2.0}}
    stored = FitResult(epochs, {0: 10, 1: 20})
    first = stage_recorder(lineage, run_id, folder)
    first("epoch", {"epoch": 0, "step": 10, "metrics": epochs[0]})  # the next is stored, and the process dies
    second = stage_recorder(lineage, run_id, folder)
    second.backfill(stored)
    second.backfill(stored)
    client = lineage._store.client()
    assert [(each.step, each.value) for each in client.get_metric_history(run_id, "HOTA")] == [(10, 1.0), (20, 2.0)]
    assert epochs_synced(folder) == {0, 1}
    assert attached(lineage, run_id) == ["step 20: metrics of epoch 2 recorded only when the stage resumed"]
