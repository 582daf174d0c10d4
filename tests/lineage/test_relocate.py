"""Artifact locations of a storage that was moved, copied, linked or is mounted at two paths."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from motip.errors import MotipError
from motip.lineage import Lineage
from motip.lineage.relocate import artifact_path, link_previous, previous_location
from motip.lineage.store import Store
from motip.lineage.tags import Tag
from tests.helpers.mlflow_database import lineage_on
from tests.lineage.test_recorder import CONFIG, DIGEST, client_of, record_stage, weights


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A storage with a finished curriculum of one stage with scores."""
    storage = tmp_path / "old"
    lineage = lineage_on(storage)
    parent = lineage.start_curriculum("demo", {})
    stage = record_stage(lineage, storage, parent, "bdd-foundation", CONFIG, None, {"HOTA": 1.0})
    lineage.log_dict(stage["run_id"], {"HOTA": 1}, "scores/epoch_0.json")
    lineage.finish(parent)
    (storage / "ids.json").write_text(json.dumps([parent, stage["run_id"]]))
    return storage


def ids(storage: Path) -> list[str]:
    found: list[str] = json.loads((storage / "ids.json").read_text())
    return found


def scores(lineage: Lineage, run_id: str) -> dict[str, Any]:
    return lineage.scores(run_id).files


def move(old: Path) -> Path:
    new = old.with_name("new")
    old.rename(new)
    return new


def test_reading_a_moved_storage_changes_nothing(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, run_id = ids(old)
    new = move(old)
    before = (new / "mlflow" / "mlflow.db").read_bytes()
    reader = Lineage(None, new)
    assert [step.stage for step in reader.chain(run_id)] == ["bdd-foundation"]
    assert reader.scores(run_id).files == {"epoch_0.json": {"HOTA": 1}}
    assert [check.state for check in reader.verify(run_id)] == ["same"]
    assert reader.deliver_all() == 0
    assert reader.compare_url_hint([run_id])
    assert (new / "mlflow" / "mlflow.db").read_bytes() == before
    assert caplog.messages == []
    assert not old.exists()


def test_a_moved_storage_is_continued_and_can_be_linked(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    new = move(old)
    lineage = Lineage(None, new)
    parent, stage = ids(new)
    assert lineage.start_curriculum("demo", {}, reopen_finished=True) == parent
    (warning,) = [message for message in caplog.messages if "the storage was moved from" in message]
    assert f"`motip lineage relocate {old} {new}`" in warning
    begun = record_stage(lineage, new, parent, "a", CONFIG, None, {"HOTA": 1.0})["run_id"]
    lineage.log_dict(stage, {"HOTA": 2}, "scores/epoch_1.json")
    assert not old.exists(), "no storage is created there"
    artifacts = new / "mlflow" / "artifacts"
    assert (artifacts / stage / "artifacts" / "scores" / "epoch_1.json").is_file()
    assert len(list((artifacts / "models").rglob("MLmodel"))) == 2

    # MLflow's own pages read through the link.
    assert link_previous(old, new) == old and old.resolve() == new
    assert link_previous(old, new) == old
    plain = MlflowClient(f"sqlite:///{new}/mlflow/mlflow.db")
    for run_id in (stage, begun):
        assert Path(plain.download_artifacts(run_id, "config.json")).is_file()
    caplog.clear()
    Lineage(None, new).start_curriculum("demo", {}, reopen_finished=True)
    assert not [message for message in caplog.messages if "was moved" in message]
    # A second move replaces the link of the first, which leads nowhere.
    newer = new.rename(new.with_name("newer"))
    assert link_previous(old, newer) == old and old.resolve() == newer


def test_an_impossible_link_is_an_error(old: Path, tmp_path: Path) -> None:
    with pytest.raises(MotipError, match="no storage with an MLflow database"):
        link_previous(old, tmp_path / "nothing")
    copy = Path(shutil.copytree(old, tmp_path / "copy"))
    with pytest.raises(MotipError, match="cannot link the old place"):
        link_previous(old, copy)
    assert ids(old) == ids(copy) and not old.is_symlink()


def test_a_link_to_another_storage_is_kept(old: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(old, tmp_path / "other"))
    new = move(old)
    old.symlink_to(other)
    with pytest.raises(MotipError, match="cannot link the old place"):
        link_previous(old, new)
    assert old.resolve() == other


def test_a_storage_at_two_paths_is_used_by_two_hosts(old: Path) -> None:
    """The database records the path of the host that created it; neither host writes to the other's path."""
    path_here, path_there = old, old.with_name("there")
    lineage = Lineage(None, path_here)
    under_way = lineage.start_stage(lineage.start_curriculum("one arm", {}), "a", CONFIG, DIGEST, None)
    lineage.log_dict(under_way, {"HOTA": 1}, "scores/epoch_0.json")

    path_here.rename(path_there)
    there = Lineage(None, path_there)
    theirs = there.start_stage(there.start_curriculum("of the other host", {}), "a", CONFIG, DIGEST, None)
    path_there.rename(path_here)

    lineage.log_dict(under_way, {"HOTA": 2}, "scores/epoch_1.json")
    lineage.log_stage_result(under_way, *weights(path_here, "a"), {"HOTA": 2})
    assert scores(lineage, under_way) == {"epoch_0.json": {"HOTA": 1}, "epoch_1.json": {"HOTA": 2}}
    artifacts = path_here / "mlflow" / "artifacts"
    assert all((artifacts / run_id / "artifacts" / "config.json").is_file() for run_id in (under_way, theirs))
    assert not path_there.exists(), "no storage is created there"


def test_a_copy_does_not_write_to_the_original_of_a_running_job(old: Path, other_driver: str) -> None:
    lineage = Lineage(None, old)
    theirs = lineage.start_stage(lineage.start_curriculum("demo", {}), "a", CONFIG, DIGEST, None)
    lineage.log_dict(theirs, {"HOTA": 1}, "scores/epoch_0.json")
    client_of(lineage).set_tag(theirs, Tag.DRIVER, other_driver)
    copy = Path(shutil.copytree(old, old.with_name("copy")))
    lineage.log_dict(theirs, {"HOTA": 2}, "scores/epoch_0.json")
    reader = Lineage(None, copy)
    assert reader.scores(theirs).files == {"epoch_0.json": {"HOTA": 1}}, "read from the original"

    before = {path: path.stat().st_mtime_ns for path in old.rglob("*")}
    trial = Lineage(None, copy)
    mine = record_stage(trial, copy, trial.start_curriculum("trial", {}), "mine", CONFIG, None, {"HOTA": 3.0})["run_id"]
    trial.log_dict(mine, {"HOTA": 3}, "scores/epoch_0.json")
    trial.log_dict(theirs, {"HOTA": 3}, "scores/epoch_0.json")
    assert before == {path: path.stat().st_mtime_ns for path in old.rglob("*")}, "written into the original"
    assert lineage.scores(theirs).files == {"epoch_0.json": {"HOTA": 2}}
    shutil.rmtree(old)
    for run_id in (mine, theirs):
        assert Lineage(None, copy).scores(run_id).files == {"epoch_0.json": {"HOTA": 3}}


def test_a_read_only_storage_can_be_read(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run_id = ids(old)
    new = move(old)
    really = Path.open

    def refused(path: Path, mode: str = "r", *more: Any, **how: Any) -> Any:
        if path.is_relative_to(new) and not mode.startswith("r"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return really(path, mode, *more, **how)

    monkeypatch.setattr(Path, "open", refused)
    reader = Lineage(None, new)
    assert [step.stage for step in reader.chain(run_id)] == ["bdd-foundation"]
    assert reader.scores(run_id).files == {"epoch_0.json": {"HOTA": 1}}
    assert [check.state for check in reader.verify(run_id)] == ["same"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)
        with pytest.raises(MotipError, match="cannot write the MLflow database here"):
            reader.start_curriculum("another", {})
    (new / "mlflow" / "mlflow.db").unlink()
    with pytest.raises(MotipError, match="cannot write the MLflow database here"):
        Lineage(None, new).chain(run_id)


@pytest.mark.parametrize("linked", ["mlflow", "mlflow/artifacts"])
def test_a_linked_folder_is_not_moved(linked: str, old: Path, caplog: pytest.LogCaptureFixture) -> None:
    big = old.with_name("big") / Path(linked).name
    big.parent.mkdir()
    shutil.move(old / linked, big)
    (old / linked).symlink_to(big)
    lineage = Lineage(None, old)
    parent = lineage.start_curriculum("demo", {}, reopen_finished=True)
    lineage.start_stage(parent, "a", CONFIG, DIGEST, None)
    assert caplog.messages == []


def test_the_same_folder_mounted_twice_is_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (tmp_path / name / "mlflow" / "artifacts" for name in ("one", "two"))
    one.mkdir(parents=True)
    two.mkdir(parents=True)
    assert previous_location(one.as_uri(), two) == one
    monkeypatch.setattr(os.path, "samefile", lambda *folders: folders == (one.parent, two.parent))
    assert previous_location(one.as_uri(), two) is None


def test_artifact_path_of_locations_recorded_in_another_storage(tmp_path: Path) -> None:
    before, artifacts = (tmp_path / name / "mlflow" / "artifacts" for name in ("be fore", "now"))
    for folder in (before, artifacts):
        (folder / "both").mkdir(parents=True)
    (before / "only there" / "artifacts").mkdir(parents=True)
    for location, found in {
        (before / "both").as_uri(): artifacts / "both",
        str(before / "both"): artifacts / "both",
        (before / "nowhere" / "artifacts").as_uri(): artifacts / "nowhere" / "artifacts",
        (before / "models" / "m-1" / "artifacts").as_uri(): artifacts / "models" / "m-1" / "artifacts",
        (before / "only there" / "artifacts").as_uri(): before / "only there" / "artifacts",
        # The other storage is inside a folder of that name.
        (before / "x" / "mlflow" / "artifacts" / "run").as_uri(): artifacts / "run",
    }.items():
        assert artifact_path(location, artifacts) == found, location
    for location in (
        "file:///other/location/run",
        before.as_uri(),
        "mlflow/artifacts/run",
        "s3://a/mlflow/artifacts/run",
    ):
        assert artifact_path(location, artifacts) is None, location


def test_a_storage_inside_a_folder_of_the_same_name(tmp_path: Path) -> None:
    artifacts = tmp_path / "mlflow" / "artifacts" / "mine" / "mlflow" / "artifacts"
    assert artifact_path((artifacts / "run").as_uri(), artifacts) == artifacts / "run"


@pytest.mark.parametrize(
    ("address", "location"),
    [
        ("http://127.0.0.1:9", "file:///old/mlflow/artifacts/run/artifacts"),
        ("http://127.0.0.1:9", "mlflow-artifacts:/mlflow/artifacts/run/artifacts"),
        ("sqlite:////elsewhere/mlflow.db", "file:///old/mlflow/artifacts/run/artifacts"),
        (None, "s3://bucket/mlflow/artifacts/run/artifacts"),
        (None, "mlflow-artifacts:/mlflow/artifacts/run/artifacts"),
        (None, "file://host/mlflow/artifacts/run/artifacts"),
        (None, "/data/results/run/artifacts"),
    ],
)
def test_locations_left_to_mlflow(address: str | None, location: str, tmp_path: Path) -> None:
    assert Store(address, tmp_path, "motip-curriculum")._artifact_path(location) is None


def test_locations_on_an_object_store_are_unchanged(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An experiment in the storage's own database whose artifacts are on an object store."""
    location, files = "unheard-of://bucket/mlflow/artifacts", sorted((old / "mlflow" / "artifacts").rglob("*"))
    with sqlite3.connect(old / "mlflow" / "mlflow.db") as opened:
        opened.execute("update experiments set artifact_location = ? where name = 'motip-curriculum'", (location,))
    lineage = Lineage(None, old)
    run_id = lineage.start_curriculum("mine", {})
    assert client_of(lineage).get_run(run_id).info.artifact_uri == f"{location}/{run_id}/artifacts"
    assert any("artifact repository for: unheard-of://bucket" in message for message in caplog.messages)
    assert sorted((old / "mlflow" / "artifacts").rglob("*")) == files
