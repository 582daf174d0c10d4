"""Retention of checkpoints on disk and S3; removed or partial checkpoints are never resumed."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.train

import motip.train.loop as loop
from motip import stage_folder
from motip.config import Config, Stage
from motip.curriculum.stage import choose_best_epoch
from motip.errors import MotipError
from motip.stage_folder import CheckpointIndex, StageFolder, best_first
from motip.storage import paths, retries
from motip.storage.atomic_filesystem import atomic_filesystem
from motip.storage.paths import Location, location
from motip.train import checkpoint_schedule, checkpoints, preemption
from motip.train.checkpoint_stores import Retention, drop_epochs, drop_steps
from motip.train.checkpoints import store_folder
from motip.train.ray_train import RayStore, completed
from motip.train.run_channel import RunChannel
from motip.weights import load_checkpoint
from tests.helpers.object_store import ObjectStore
from tests.helpers.small_training import small_config
from tests.helpers.training_run import folder_store, train_in_process
from tests.train.test_loop import SETTINGS
from tests.train.test_resume import Records, _job

HOTA = {0: 10.0, 1: 40.0, 2: 30.0, 3: 40.0, 4: 20.0}
"""HOTA by epoch; the second and the fourth are equal."""


def _write_epoch(folder: Location, epoch: int, metrics: dict[str, float], step: int | None = None) -> None:
    path = folder / f"epoch_{epoch:03d}"
    paths.write_bytes(path / f"checkpoint_{epoch}.pth", b"weights")
    stored = {"epoch": epoch, "step": 10 * (epoch + 1) if step is None else step, "metrics": metrics}
    paths.write_json(path / "metrics.json", stored)


def _write_step(folder: Location, step: int) -> None:
    paths.write_bytes(folder / f"step_{step:08d}" / f"checkpoint_step_{step}.pth", b"weights")


def _index(folder: Location) -> CheckpointIndex:
    return StageFolder(folder).checkpoints()


def _weights(folder: Location) -> list[str]:
    return sorted(path.name for path in paths.files_under(folder) if path.suffix == ".pth")


def _stage(**changes: Any) -> Stage:
    return Stage(name="stage", config=Config(), data=({"source": "ground", "videos": 1},), **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- the policy


def test_last_steps_are_kept_and_empty_folders_stay(folder: Location) -> None:
    assert _index(folder).latest() is None
    for step in (2, 4, 9, 10, 100):
        _write_step(folder, step)
    drop_steps(StageFolder(folder), 2)
    assert _weights(folder) == ["checkpoint_step_10.pth", "checkpoint_step_100.pth"]
    latest = _index(folder).latest()
    assert latest is not None and latest.name == "checkpoint_step_100.pth"
    # Ray Train rejects its list of checkpoints if a folder in it is missing.
    files = atomic_filesystem(remote=not isinstance(folder, Path))
    for step in (2, 4, 9):
        info = files.get_file_info(f"{folder}/step_{step:08d}".removeprefix("s3://"))
        assert info.type.name == "Directory", step
    drop_steps(StageFolder(folder), 0)
    assert _weights(folder) == [] and _index(folder).steps == {}


@pytest.mark.parametrize(
    ("kept", "expected"),
    [(None, [0, 1, 2, 3, 4]), (1, [1, 4]), (2, [1, 3, 4]), (3, [1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])],
)
def test_best_epochs_and_the_newest_are_kept(folder: Location, kept: int | None, expected: list[int]) -> None:
    folder = folder / str(kept)
    for epoch, hota in HOTA.items():
        _write_epoch(folder, epoch, {"HOTA": hota, "loss": float(epoch)})
    drop_epochs(StageFolder(folder), Retention(epochs=kept))
    assert _weights(folder) == [f"checkpoint_{epoch}.pth" for epoch in expected]
    result = completed(str(folder))
    assert result.epochs == {epoch: {"HOTA": hota, "loss": float(epoch)} for epoch, hota in HOTA.items()}
    assert sorted(result.checkpoints) == expected
    assert choose_best_epoch(result, _stage()) == 1, "the earliest of equals"


def test_dropping_after_each_epoch_keeps_the_same_epochs(tmp_path: Path) -> None:
    for epoch, hota in HOTA.items():
        _write_epoch(tmp_path, epoch, {"HOTA": hota})
        drop_epochs(StageFolder(tmp_path), Retention(epochs=2))
        assert f"checkpoint_{epoch}.pth" in _weights(tmp_path), "the newest checkpoint is kept"
    assert _weights(tmp_path) == ["checkpoint_1.pth", "checkpoint_3.pth", "checkpoint_4.pth"]


def test_epoch_without_a_score_is_kept_only_as_the_newest(tmp_path: Path) -> None:
    _write_epoch(tmp_path, 0, {"HOTA": 1.0})
    _write_epoch(tmp_path, 1, {"loss": 1.0})
    _write_epoch(tmp_path, 2, {"HOTA": math.nan})
    drop_epochs(StageFolder(tmp_path), Retention(epochs=3))
    assert _weights(tmp_path) == ["checkpoint_0.pth", "checkpoint_2.pth"]
    assert best_first({0: {"HOTA": 1.0}, 1: {"loss": 1.0}, 2: {"HOTA": math.nan}}, "HOTA") == [0]
    assert choose_best_epoch(completed(str(tmp_path)), _stage()) == 0


def test_removed_and_partial_checkpoints_are_neither_chosen_nor_resumed(folder: Location) -> None:
    _write_epoch(folder, 0, {"HOTA": 50.0})
    _write_epoch(folder, 1, {"HOTA": 90.0})
    (folder / "epoch_001" / "checkpoint_1.pth").unlink()  # its metrics stay
    paths.write_bytes(folder / "epoch_002" / "checkpoint_2.pth", b"its metrics are missing")
    paths.write_bytes(folder / "step_00000040" / ".checkpoint_step_40.1a2b.tmp.pth", b"ha")
    paths.write_bytes(folder / "step_00000050" / "checkpoint_step_49.pth", b"of another step")
    paths.write_bytes(folder / "kept" / "step_00000060" / "checkpoint_step_60.pth", b"of another folder")
    latest = _index(folder).latest()
    assert latest is not None and latest.name == "checkpoint_0.pth"
    result = completed(str(folder))
    assert sorted(result.epochs) == [0, 1] and sorted(result.checkpoints) == [0]
    assert choose_best_epoch(result, _stage()) == 0
    _write_step(folder, 15)
    latest = _index(folder).latest()
    assert latest is not None and latest.name == "checkpoint_step_15.pth"
    _write_epoch(folder, 1, {"HOTA": 90.0}, step=15)
    latest = _index(folder).latest()
    assert latest is not None and latest.name == "checkpoint_1.pth", "at the same step the epoch is further"


def test_failed_removal_is_logged_and_training_continues(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = location(f"{store.uri}/stubborn/stage")
    for step in (1, 2):
        _write_step(folder, step)
    monkeypatch.setattr(retries.with_retries, "__defaults__", (0.0, *retries.with_retries.__defaults__[1:]))  # type: ignore[index]
    store.fail("^DELETE", 1000)
    drop_steps(StageFolder(folder), 1)
    store.failures.clear()
    assert "checkpoint_step_1.pth: superfluous checkpoints are not removed for now" in caplog.text
    drop_steps(StageFolder(folder), 1)
    assert _weights(folder) == ["checkpoint_step_2.pth"]


# ------------------------------------------------------------------------------------------------- in a training


def _config(**changes: Any) -> Config:
    return small_config(**{**SETTINGS, "CLIPS_PER_EPOCH": 2, "LOG_EVERY_STEPS": 1, **changes})


def _run(job: Any, folder: Path, records: Records, kept: Retention, **methods: Any) -> None:
    store = folder_store(folder, kept)
    for name, method in methods.items():
        setattr(store, name, method)
    train_in_process(job, folder, records, store=store)


def test_stage_keeps_its_best_and_newest_epoch_and_all_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {"HOTA": HOTA[epoch]})
    job = _job(tmp_path, _config(EPOCHS=5, EVALUATE_EVERY_EPOCHS=1))
    _run(job, tmp_path / "out", Records(), Retention(epochs=1))
    assert _weights(tmp_path / "out") == ["checkpoint_1.pth", "checkpoint_4.pth"]
    result = completed(str(tmp_path / "out"))
    assert {epoch: metrics["HOTA"] for epoch, metrics in result.epochs.items()} == HOTA
    best = load_checkpoint(Path(result.checkpoints[choose_best_epoch(result, _stage())]))
    assert best["position"]["epoch"] == 2
    again = Records()
    _run(job, tmp_path / "out", again, Retention(epochs=1))
    assert again.losses == {}, "a finished stage is not trained again"
    (tmp_path / "out" / "epoch_004" / "checkpoint_4.pth").unlink()
    _run(job, tmp_path / "out", again, Retention(epochs=1))
    assert min(again.losses) == 5, "without its newest weights it resumes from the older ones"


# ------------------------------------------------------------------------------------------------ into the storage


def _finished(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"epoch": 0, "step": 3, "metrics": {}}))
    (folder / "checkpoint_0.pth").write_bytes(b"0123456789")
    return folder


def test_weights_are_stored_before_the_metrics(store: ObjectStore, tmp_path: Path) -> None:
    source, lines = _finished(tmp_path / "epoch_000"), []
    target = location(f"{store.uri}/order/stage/epoch_000")
    store.requests.clear()
    store.fail("POST .*checkpoint_0", 4)
    store.fail("(POST|PUT) .*metrics.json", 4, drop=True)
    store_folder(source, target, lines.append)
    begun = [request for request in store.requests if request.startswith("POST") and request.endswith("?uploads")]
    assert [request.split("/")[-1] for request in begun] == ["checkpoint_0.pth?uploads", "metrics.json?uploads"]
    assert len(store.failed()) == 8
    assert completed(str(target.parent)).checkpoints == {0: f"{target}/checkpoint_0.pth"}


def test_unreachable_store_is_an_error_and_leaves_no_partial_epoch(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries.with_retries, "__defaults__", (0.0, *retries.with_retries.__defaults__[1:]))  # type: ignore[index]
    monkeypatch.setattr(checkpoints, "STORE_FOR_S", 5.0)
    target, lines = location(f"{store.uri}/away/stage/epoch_000"), []
    store.fail("metrics.json", 1000, drop=True)
    with pytest.raises(MotipError, match=r"(?s)checkpoint epoch_000 cannot be written.*untouched") as failure:
        store_folder(_finished(tmp_path / "epoch_000"), target, lines.append)
    store.failures.clear()
    # Ray Train restarts the entire upload if the message contains these words.
    assert "AWS Error" not in str(failure.value) and "NETWORK_CONNECTION" in str(failure.value)
    assert lines and lines[0].startswith(f"storing {target}/metrics.json failed (try 1)")
    assert completed(str(target.parent)).epochs == {} and _index(target.parent).latest() is None


def test_full_disk_while_storing_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tmp_path / "stage"
    _write_step(stage, 4)
    source = tmp_path / "local"
    source.mkdir()
    (source / "checkpoint_step_8.pth").write_bytes(b"0123456789")

    def full(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:3])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(paths.shutil, "copyfile", full)
        with pytest.raises(MotipError, match=r"(?s)step_00000008 cannot be written.*No space left.*free some space"):
            store_folder(source, stage / "step_00000008", lambda text: None)
    assert [path.name for path in stage.glob("step_*/*")] == ["checkpoint_step_4.pth"]
    store_folder(source, stage / "step_00000008", lambda text: None)
    assert _weights(stage) == ["checkpoint_step_4.pth", "checkpoint_step_8.pth"]


def test_storage_folder_missing_on_the_node_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MotipError, match="does not exist on the node"):
        store_folder(_finished(tmp_path / "a"), tmp_path / "not mounted" / "epoch_000", lambda text: None)


def test_checkpoints_stay_and_training_continues_if_the_store_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {"HOTA": HOTA[epoch]})
    config = _config(EPOCHS=2, EVALUATE_EVERY_EPOCHS=1, CHECKPOINT_EVERY_STEPS=2)
    listed = stage_folder.files_under

    def away(folder: Path) -> Any:
        raise MotipError("S3 request failed: SlowDown", where=folder)

    @contextlib.contextmanager
    def newest() -> Iterator[None]:
        yield None
        monkeypatch.setattr(stage_folder, "files_under", away)

    with caplog.at_level(logging.WARNING):
        _run(_job(tmp_path, config), tmp_path / "out", Records(), Retention(steps=1, epochs=0), newest=newest)
    monkeypatch.setattr(stage_folder, "files_under", listed)
    lines = [record.message for record in caplog.records if "are not removed for now" in record.message]
    assert lines and all("SlowDown" in text for text in lines)
    assert {"checkpoint_0.pth", "checkpoint_1.pth"} < set(_weights(tmp_path / "out")), "no checkpoint is removed"
    drop_steps(StageFolder(tmp_path / "out"), 0)
    drop_epochs(StageFolder(tmp_path / "out"), Retention(epochs=0))
    assert _weights(tmp_path / "out") == ["checkpoint_1.pth"]


# --------------------------------------------------------------------------------------------------- preemption


class PreemptionInfoStub:
    """Stub of ray.train.get_preemption_info: preempted nodes by the number of the call from which they are returned."""

    def __init__(self, nodes: dict[int, list[str]]) -> None:
        self._nodes = nodes
        self.calls = 0

    def __call__(self) -> Any:
        from ray.train.v2.api.preemption import PreemptionInfo

        self.calls += 1
        preempted = [nodes for call, nodes in self._nodes.items() if call <= self.calls]
        return PreemptionInfo(None, {node: [0] for node in preempted[-1]}) if preempted else None


def test_each_preemption_saves_one_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {})
    info = PreemptionInfoStub({6: ["node-b", "node-a"], 10: ["node-a", "node-b", "node-c"]})
    monkeypatch.setattr(ray.train, "get_preemption_info", info)
    monkeypatch.setattr(checkpoint_schedule, "POLL_INTERVAL_S", 0.0)
    ray_store = RayStore(RunChannel(str(tmp_path)), StageFolder(tmp_path), Retention())
    job = _job(tmp_path, _config(EPOCHS=1, CLIPS_PER_EPOCH=14, CHECKPOINT_EVERY_MINUTES=None))
    records, saved = Records(), []
    folder = tmp_path / "out"

    def step_done(step: int, checkpoint: Path | None, wait: bool) -> None:
        assert checkpoint is not None
        position = load_checkpoint(checkpoint / f"checkpoint_step_{step}.pth")["position"]
        saved.append((step, position["step"], wait))

    _run(job, folder, records, Retention(), preemption=ray_store.preemption, step_done=step_done)
    assert info.calls == 14
    assert saved == [(6, 6, True), (10, 10, True)], "once per preemption, and synchronously"
    assert max(records.losses) == 14, "training continues until the machine is gone"
    notes = [text for text in records.notes if "preemption" in text]
    assert "preemption of node-a, node-b)" in notes[0]
    assert "step 6 saved" in notes[0] and "after the request" in notes[0]
    assert "node-c" in notes[1] and len(notes) == 2


def test_slow_checkpoint_is_logged_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {})
    monkeypatch.setattr(ray.train, "get_preemption_info", PreemptionInfoStub({1: ["node-a"]}))
    monkeypatch.setattr(checkpoint_schedule, "POLL_INTERVAL_S", 0.0)
    monkeypatch.setattr(preemption, "GRACE_PERIOD_S", 2.0)
    ray_store = RayStore(RunChannel(str(tmp_path)), StageFolder(tmp_path), Retention())
    job = _job(tmp_path, _config(EPOCHS=1, CHECKPOINT_EVERY_MINUTES=None))

    def slow(step: int, checkpoint: Path | None, wait: bool) -> None:
        deadline = time.monotonic() + 20
        while "no checkpoint within" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)

    with caplog.at_level(logging.ERROR):
        _run(job, tmp_path / "out", Records(), Retention(), preemption=ray_store.preemption, step_done=slow)
    lines = [record.message for record in caplog.records if "no checkpoint within" in record.message]
    assert len(lines) == 1
    assert "epoch 1, step 1/" in lines[0] and "storing the checkpoint" in lines[0]
