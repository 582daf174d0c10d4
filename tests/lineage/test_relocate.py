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
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from motip.errors import MotipError
from motip.lineage import Lineage
from motip.lineage.relocate import artifact_path, previous_location, rewrite_locations
from motip.lineage.store import Store
from motip.lineage.tags import Tag
from tests.lineage.test_recorder import CONFIG, DIGEST, client_of, record_stage, weights


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a finished curriculum of one stage with scores; tests copy it."""
    storage = tmp_path_factory.mktemp("template") / "old"
    lineage = Lineage(None, storage)
    parent = lineage.start_curriculum("demo", {})
    stage = record_stage(lineage, storage, parent, "bdd-foundation", CONFIG, None, {"HOTA": 1.0})
    lineage.log_dict(stage["run_id"], {"HOTA": 1}, "scores/epoch_0.json")
    lineage.finish(parent)
    (storage / "ids.json").write_text(json.dumps([parent, stage["run_id"]]))
    return storage


@pytest.fixture
def old(tmp_path: Path, template: Path) -> Path:
    """A copy of the template, with its own locations in the database."""
    shutil.copytree(template, tmp_path / "old")
    artifacts = tmp_path / "old" / "mlflow" / "artifacts"
    rewrite_locations(artifacts.parent / "mlflow.db", (template / "mlflow" / "artifacts").as_uri(), artifacts)
    # MLflow's cache must not return repositories of the template.
    _artifact_repos_cache.clear()
    return tmp_path / "old"


def ids(storage: Path) -> list[str]:
    found: list[str] = json.loads((storage / "ids.json").read_text())
    return found


def locations(storage: Path) -> list[str]:
    with sqlite3.connect(storage / "mlflow" / "mlflow.db") as opened:
        return [
            location
            for query in (
                "select artifact_location from experiments where name = 'motip-curriculum'",
                "select artifact_uri from runs order by start_time",
                "select artifact_location from logged_models",
                "select source from model_versions",
            )
            for (location,) in opened.execute(query)
        ]


def move(old: Path) -> Path:
    new = old.with_name("new")
    old.rename(new)
    return new


def test_reading_a_moved_storage_changes_nothing(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, run_id = ids(old)
    new = move(old)
    before = locations(new)
    reader = Lineage(None, new)
    assert [step.stage for step in reader.chain(run_id)] == ["bdd-foundation"]
    assert reader.scores(run_id).files == {"epoch_0.json": {"HOTA": 1}}
    assert [check.state for check in reader.verify(run_id)] == ["same"]
    assert reader.flush() == 0
    assert reader.compare_url_hint([run_id])
    assert locations(new) == before and all(str(old) in location for location in before)
    assert caplog.messages == []
    assert not old.exists()


def test_starting_a_curriculum_updates_the_locations(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    new = move(old)
    lineage = Lineage(None, new)
    parent = lineage.start_curriculum("demo", {}, reopen_finished=True)
    assert parent == ids(new)[0]
    assert all(location.startswith((new / "mlflow" / "artifacts").as_uri()) for location in locations(new))
    Lineage(None, new).start_stage(parent, "a", CONFIG, DIGEST, None)
    assert sum("the storage was moved from" in message for message in caplog.messages) == 1
    assert not old.exists()


def test_starting_a_stage_updates_the_locations(old: Path) -> None:
    new = move(old)
    Lineage(None, new).start_stage(ids(new)[0], "a", CONFIG, DIGEST, None)
    assert all(str(new) in location for location in locations(new))


def test_locations_rewritten_by_another_host_are_resolved_locally(old: Path) -> None:
    """One storage at two paths on two hosts: a rewrite by one host does not affect the other's process."""
    path_here, path_there = old, old.with_name("there")
    lineage = Lineage(None, path_here)
    lineage.finish(lineage.start_curriculum("one arm", {}))
    under_way = lineage.start_stage(lineage.start_curriculum("second arm", {}), "a", CONFIG, DIGEST, None)
    lineage.log_dict(under_way, {"HOTA": 1}, "scores/epoch_0.json")

    path_here.rename(path_there)
    Lineage(None, path_there).start_curriculum("of the other host", {})
    path_there.rename(path_here)
    assert all(str(path_there) in location for location in locations(path_here))

    lineage.log_dict(under_way, {"HOTA": 2}, "scores/epoch_1.json")
    lineage.log_stage_result(under_way, *weights(path_here, "a"), {"HOTA": 2})
    assert lineage.scores(under_way).files == {"epoch_0.json": {"HOTA": 1}, "epoch_1.json": {"HOTA": 2}}
    artifacts = path_here / "mlflow" / "artifacts"
    assert (artifacts / under_way / "artifacts" / "scores" / "epoch_1.json").is_file()
    assert len(list((artifacts / "models").rglob("MLmodel"))) == 2  # the template's and this one

    begun = lineage.start_stage(lineage.start_curriculum("third arm", {}), "a", CONFIG, DIGEST, None)
    assert (artifacts / begun / "artifacts" / "config.json").is_file()
    assert all(str(path_here) in location for location in locations(path_here))
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
    assert all(str(old) in location for location in locations(copy)), "reading changes nothing"

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


def test_running_trials_of_another_host_do_not_prevent_the_update(old: Path) -> None:
    lineage = Lineage(None, old)
    parent = lineage.start_curriculum("demo", {}, reopen_finished=True)
    sweep = lineage.start_curriculum("sweep", {}, {Tag.PARENT_RUN: parent}, kind="sweep")
    trial = lineage.start_stage(sweep, "trial 000", CONFIG, DIGEST, None, tags={Tag.KIND: "trial"})
    for run_id in (parent, sweep, trial):
        client_of(lineage).set_tag(run_id, Tag.DRIVER, "another-machine/123/456")
    new = move(old)
    assert Lineage(None, new).start_curriculum("demo", {}) == parent
    assert all(str(new) in location for location in locations(new))
    assert not old.exists()


def test_a_read_only_storage_can_be_read(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run_id = ids(old)
    new = move(old)
    really = Path.open

    def refused(path: Path, mode: str = "r", *more: Any, **how: Any) -> Any:
        if path.is_relative_to(new) and mode != "r":
            raise PermissionError(errno.EACCES, "Permission denied")
        return really(path, mode, *more, **how)

    monkeypatch.setattr(Path, "open", refused)
    reader = Lineage(None, new)
    assert [step.stage for step in reader.chain(run_id)] == ["bdd-foundation"]
    assert reader.scores(run_id).files == {"epoch_0.json": {"HOTA": 1}}
    assert [check.state for check in reader.verify(run_id)] == ["same"]
    with pytest.raises(MotipError, match="cannot write the MLflow database here"):
        reader.start_curriculum("another", {})
    (new / "mlflow" / "mlflow.db").unlink()
    with pytest.raises(MotipError, match="cannot write the MLflow database here"):
        Lineage(None, new).chain(run_id)


@pytest.mark.parametrize("linked", ["mlflow", "mlflow/artifacts"])
def test_a_linked_folder_is_not_moved(
    linked: str, old: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    big = old.with_name("big") / Path(linked).name
    big.parent.mkdir()
    shutil.move(old / linked, big)
    (old / linked).symlink_to(big)
    before = locations(old)
    monkeypatch.setattr(
        "motip.lineage.store.rewrite_locations", lambda *_, **__: pytest.fail("the database would be locked")
    )
    lineage = Lineage(None, old)
    parent = lineage.start_curriculum("demo", {}, reopen_finished=True)
    lineage.start_stage(parent, "a", CONFIG, DIGEST, None)
    assert set(before) <= set(locations(old))
    assert caplog.messages == []


def test_the_same_folder_mounted_twice_is_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (tmp_path / name / "mlflow" / "artifacts" for name in ("one", "two"))
    one.mkdir(parents=True)
    two.mkdir(parents=True)
    assert previous_location(one.as_uri(), two) == one
    monkeypatch.setattr(os.path, "samefile", lambda *folders: folders == (one.parent, two.parent))
    assert previous_location(one.as_uri(), two) is None


def test_locations_outside_the_storage_are_unchanged(old: Path) -> None:
    foreign = "file:///data/theirs/mlflow/artifacts"
    with sqlite3.connect(old / "mlflow" / "mlflow.db") as opened:
        opened.execute(
            "insert into experiments (experiment_id, name, artifact_location, lifecycle_stage) "
            "values (77, 'theirs', ?, 'active')",
            (foreign,),
        )
        opened.execute(
            "insert into runs (run_uuid, status, lifecycle_stage, artifact_uri, experiment_id, start_time) "
            "values ('e', 'FINISHED', 'active', ?, 77, 1)",
            (foreign + "/e/artifacts",),
        )
    new = move(old)
    Lineage(None, new).start_curriculum("demo", {})
    with sqlite3.connect(new / "mlflow" / "mlflow.db") as opened:
        found = "select artifact_location from experiments where experiment_id = 77"
        assert opened.execute(found).fetchone() == (foreign,)
        found = "select artifact_uri from runs where experiment_id = 77"
        assert opened.execute(found).fetchone() == (foreign + "/e/artifacts",)


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
