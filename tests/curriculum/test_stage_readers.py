"""Readers of a stage's events: notes in order and across restarts, dashboard, scores; late and repeated events."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import motip.train.step as train_step
from motip.curriculum.stage_readers import StageReaders
from motip.events import EpochDone, Event, EventLog, Note, Scored, StepLogged, WeightsTransferred
from motip.lineage import Lineage
from motip.report.stage_history import History
from motip.stage_folder import StageFolder
from motip.storage.paths import read_json, write_json
from motip.train.preemption import Stopped
from tests.helpers.mlflow_database import lineage_on
from tests.helpers.mlflow_server import free_port
from tests.helpers.small_curriculum import QuietUi, run, write_files


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


@pytest.fixture
def lineage(storage: Path) -> Lineage:
    return lineage_on(storage)


class Attempt:
    """One attempt of a stage: a writer of its log and the readers in a new driver."""

    def __init__(self, lineage: Lineage, folder: Path, *more: Any) -> None:
        self.stage = StageFolder(folder)
        self.ui = QuietUi()
        run_id = self.stage.run_id() or lineage.start_curriculum("demo", {})
        lineage._recorder(run_id).attach(folder)
        self.stage.complete_log()
        self.stage.start(run_id)
        self.run_id = run_id
        self.log = EventLog(folder)
        self.readers = StageReaders(lineage, run_id, self.stage, self.ui, *more)

    def send(self, *events: Event) -> None:
        for event in events:
            self.log.send(event)
        self.readers.catch_up()


def attached(lineage: Lineage, run_id: str) -> list[str]:
    """The notes in MLflow, without their times."""
    path = lineage._store.client().download_artifacts(run_id, "notes.txt")
    return without_times(Path(path))


def without_times(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00[ :]", line) for line in lines)
    return [re.sub(r"^\S+\+00:00:? ", "", line) for line in lines]


def note(step: int) -> Note:
    return Note(f"clips skipped: video {step} (3 frames,\n 9 objects)", step)


def line(step: int) -> str:
    return f"step {step}: clips skipped: video {step} (3 frames, 9 objects)"


def step(epoch: int, index: int, loss: float = 1.0) -> StepLogged:
    return StepLogged(epoch, index, 4, 4 * epoch + index + 1, {"step/loss": loss, "step/lr/rest": 1e-4})


def test_notes_are_attached_and_extended_after_a_restart(lineage: Lineage, tmp_path: Path) -> None:
    first = Attempt(lineage, tmp_path / "stage")
    first.send(note(1), note(2))
    assert without_times(first.stage.notes) == attached(lineage, first.run_id) == [line(1), line(2)]
    first.log.send(note(3))  # and the driver dies
    second = Attempt(lineage, tmp_path / "stage")
    assert second.run_id == first.run_id
    second.send(Note("before the first step"))
    assert attached(lineage, second.run_id) == [line(1), line(2), line(3), "before the first step"]
    assert without_times(second.stage.notes) == attached(lineage, second.run_id)
    assert [event for event in second.ui.events if isinstance(event, Note)] == [*second.log][-1:], "of this attempt"


def test_unchanged_notes_are_sent_once(lineage: Lineage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt(lineage, tmp_path / "stage")
    sent: list[str] = []
    client = lineage._store.client()
    monkeypatch.setattr(client, "log_text", lambda run_id, text, name: sent.append(name))
    attempt.send(step(0, 0))
    assert sent == []
    for event in (note(1), step(0, 1), step(0, 2)):
        attempt.send(event)
    attempt.readers.finish()
    assert sent == ["notes.txt"]


def test_notes_written_during_an_outage_are_delivered_later(lineage: Lineage, storage: Path, tmp_path: Path) -> None:
    run_id = Attempt(lineage, tmp_path / "stage").run_id
    unreachable = Lineage(f"http://127.0.0.1:{free_port()}", storage, retry_interval=60)
    attempt = Attempt(unreachable, tmp_path / "stage")
    for number in (1, 2, 3):
        attempt.send(note(number), step(0, number))
    assert lineage.deliver_all() == 0
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


def test_an_unwritable_file_is_written_later_with_one_warning(
    lineage: Lineage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "stage"
    (folder / "notes.txt").mkdir(parents=True)  # blocks writing to this name
    attempt = Attempt(lineage, folder)
    attempt.send(note(1))
    attempt.send(EpochDone(0, 4, {"train/loss": 1.0}))
    assert sum("not processed completely yet" in message for message in caplog.messages) == 1
    assert (folder / "dashboard.png").is_file(), "the other files are written"
    (folder / "notes.txt").rmdir()
    attempt.send(step(0, 1))
    assert without_times(folder / "notes.txt") == [line(1)]


def test_a_stored_but_unlogged_epoch_is_logged_on_resume(lineage: Lineage, tmp_path: Path) -> None:
    """Metrics of an epoch are not lost by a kill before it was logged, or by a log that could not be written."""
    folder = tmp_path / "stage"
    epochs = {0: {"train/loss": 3.0, "HOTA": 1.0}, 1: {"train/loss": 2.0, "HOTA": 2.0}}
    first = Attempt(lineage, folder)
    first.send(EpochDone(0, 10, epochs[0]))
    for epoch, metrics in epochs.items():
        stored = {"epoch": epoch, "step": 10 * (epoch + 1), "metrics": metrics}
        write_json(folder / f"epoch_{epoch:03d}" / "metrics.json", stored)
    for _ in range(2):
        again = Attempt(lineage, folder)
        again.readers.catch_up()
    client = lineage._store.client()
    points = client.get_metric_history(first.run_id, "HOTA")
    assert [(each.step, each.value) for each in points] == [(10, 1.0), (20, 2.0)]
    assert attached(lineage, first.run_id) == ["step 20: metrics of epoch 2 recorded only when the stage resumed"]


def test_files_of_a_stage_are_the_same_after_another_reading(lineage: Lineage, tmp_path: Path) -> None:
    attempt = Attempt(lineage, tmp_path / "stage")
    attempt.send(WeightsTransferred({"summary": "all"}), Scored(0, 4, {}), EpochDone(0, 4, {"HOTA": 1.0}), note(4))
    assert attempt.log.folder == attempt.stage.path
    files = (attempt.stage.transfer, attempt.stage.scores(0), attempt.stage.notes, attempt.stage.dashboard)
    before = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    Attempt(lineage, tmp_path / "stage").readers.catch_up()
    assert [path.read_bytes() for path in files] == before
    assert read_json(attempt.stage.transfer) == {"summary": "all"}


def test_the_dashboard_is_drawn_after_every_epoch_and_at_the_end(lineage: Lineage, tmp_path: Path) -> None:
    attempt = Attempt(lineage, tmp_path / "stage")
    pictures = []
    for epoch in range(2):
        attempt.send(*(step(epoch, index) for index in range(4)))
        attempt.send(EpochDone(epoch, 4 * epoch + 4, {"train/loss": 2.0 - epoch}))
        pictures.append(attempt.stage.dashboard.read_bytes())
        picture = lineage._store.client().download_artifacts(attempt.run_id, "dashboard.png")
        assert Path(picture).read_bytes() == pictures[-1]
    attempt.readers.finish()
    pictures.append(attempt.stage.dashboard.read_bytes())
    assert len(set(pictures)) == 3

    # After a restart the curves continue; steps of the interrupted attempt beyond its checkpoint are replaced.
    again = Attempt(lineage, tmp_path / "stage")
    again.send(step(1, 1, loss=7.0), EpochDone(1, 8, {"train/loss": 1.0}))
    kept = History.load(tmp_path / "stage")
    positions = [(0, 0.25), (0, 0.5), (0, 0.75), (0, 1.0), (1, 0.25), (1, 0.5)]
    assert [(epoch, done) for epoch, done, _ in kept.steps] == positions
    assert kept.steps[-1][2]["loss"] == 7.0 and sorted(kept.epochs) == [0, 1]


def test_a_failing_reader_does_not_stop_the_others(
    lineage: Lineage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk is tried again; an event that a reader cannot process is skipped; a stop reaches the training."""
    seen: list[str] = []
    failures: list[BaseException] = [OSError(28, "No space left"), ValueError("poison"), Stopped()]

    def fails(event: Event) -> None:
        if isinstance(event, Note):
            seen.append(event.text)
            if failures:
                raise failures.pop(0)

    attempt = Attempt(lineage, tmp_path / "stage", fails)
    attempt.send(Note("a"))
    attempt.send()
    assert seen == ["a", "a"] and "an event is skipped" in caplog.text
    with pytest.raises(Stopped):
        attempt.send(Note("b"))
    attempt.send(Note("c"))
    assert seen == ["a", "a", "b", "b", "c"]
    assert [event.text for event in attempt.ui.events if isinstance(event, Note)] == ["a", "b", "c"]
    assert without_times(attempt.stage.notes) == ["a", "b", "c"]
