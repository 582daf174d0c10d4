"""A storage that was moved, copied, linked or is mounted at two places: whose artifacts go where, and who follows."""

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
from motip.lineage.relocate import follow, moved_from, present
from motip.lineage.store import Store
from motip.lineage.tags import Tag
from tests.lineage.test_recorder import CONFIG, DIGEST, client_of, run_stage, weights


@pytest.fixture(autouse=True)
def own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with one finished stage that has scores, under a curriculum that goes on; tests copy it."""
    storage = tmp_path_factory.mktemp("template") / "old"
    lineage = Lineage(None, storage)
    parent = lineage.start_curriculum("demo", {})
    stage = run_stage(lineage, storage, parent, "bdd-foundation", CONFIG, None, {"HOTA": 1.0})
    lineage.log_dict(stage["run_id"], {"HOTA": 1}, "scores/epoch_0.json")
    lineage.finish(parent)
    (storage / "ids.json").write_text(json.dumps([parent, stage["run_id"]]))
    return storage


@pytest.fixture
def old(tmp_path: Path, template: Path) -> Path:
    """A copy, in which the copy's own places are told."""
    shutil.copytree(template, tmp_path / "old")
    artifacts = tmp_path / "old" / "mlflow" / "artifacts"
    follow(artifacts.parent / "mlflow.db", (template / "mlflow" / "artifacts").as_uri(), artifacts)
    # What the copy's "old" is to find must not be what the template still has.
    _artifact_repos_cache.clear()
    return tmp_path / "old"


def ids(storage: Path) -> list[str]:
    told: list[str] = json.loads((storage / "ids.json").read_text())
    return told


def places(storage: Path) -> list[str]:
    with sqlite3.connect(storage / "mlflow" / "mlflow.db") as opened:
        return [
            place
            for question in (
                "select artifact_location from experiments where name = 'motip-curriculum'",
                "select artifact_uri from runs order by start_time",
                "select artifact_location from logged_models",
                "select source from model_versions",
            )
            for (place,) in opened.execute(question)
        ]


def moved(old: Path) -> Path:
    new = old.with_name("new")
    old.rename(new)
    return new


def test_a_reader_changes_nothing_and_finds_everything(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, run_id = ids(old)
    new = moved(old)
    before = places(new)
    reader = Lineage(None, new)
    assert [step.stage for step in reader.walk(run_id)] == ["bdd-foundation"]
    assert reader.scores(run_id).files == {"epoch_0.json": {"HOTA": 1}}
    assert [check.state for check in reader.verify(run_id)] == ["same"]
    assert reader.flush() == 0
    assert reader.compare_url_hint([run_id])
    assert places(new) == before and all(str(old) in place for place in before)
    assert caplog.messages == []
    assert not old.exists()


def test_a_start_follows(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    new = moved(old)
    lineage = Lineage(None, new)
    parent = lineage.start_curriculum("demo", {}, reopen_finished=True)
    assert parent == ids(new)[0]
    assert all(place.startswith((new / "mlflow" / "artifacts").as_uri()) for place in places(new))
    Lineage(None, new).start_stage(parent, "a", CONFIG, DIGEST, None)
    assert sum("the storage was moved from" in message for message in caplog.messages) == 1
    assert not old.exists()


def test_a_stage_that_is_started_alone_follows_too(old: Path) -> None:
    new = moved(old)
    Lineage(None, new).start_stage(ids(new)[0], "a", CONFIG, DIGEST, None)
    assert all(str(new) in place for place in places(new))


def test_a_database_that_another_mount_point_was_written_into_sends_nothing_there(old: Path) -> None:
    """One storage, under two names on two hosts: a rewrite by one of them does not disturb the other's process."""
    here, there = old, old.with_name("there")
    lineage = Lineage(None, here)
    lineage.finish(lineage.start_curriculum("one arm", {}))
    under_way = lineage.start_stage(lineage.start_curriculum("second arm", {}), "a", CONFIG, DIGEST, None)
    lineage.log_dict(under_way, {"HOTA": 1}, "scores/epoch_0.json")

    here.rename(there)
    Lineage(None, there).start_curriculum("of the other host", {})
    there.rename(here)
    assert all(str(there) in place for place in places(here))

    lineage.log_dict(under_way, {"HOTA": 2}, "scores/epoch_1.json")
    lineage.log_stage_result(under_way, *weights(here, "a"), {"HOTA": 2})
    assert lineage.scores(under_way).files == {"epoch_0.json": {"HOTA": 1}, "epoch_1.json": {"HOTA": 2}}
    artifacts = here / "mlflow" / "artifacts"
    assert (artifacts / under_way / "artifacts" / "scores" / "epoch_1.json").is_file()
    assert len(list((artifacts / "models").rglob("MLmodel"))) == 2  # that of the template, and this one

    begun = lineage.start_stage(lineage.start_curriculum("third arm", {}), "a", CONFIG, DIGEST, None)
    assert (artifacts / begun / "artifacts" / "config.json").is_file()
    assert all(str(here) in place for place in places(here))
    assert not there.exists(), "no storage is made up"


def test_a_copy_keeps_apart_from_the_storage_that_a_job_is_running_on(old: Path, somebody: str) -> None:
    lineage = Lineage(None, old)
    theirs = lineage.start_stage(lineage.start_curriculum("demo", {}), "a", CONFIG, DIGEST, None)
    lineage.log_dict(theirs, {"HOTA": 1}, "scores/epoch_0.json")
    client_of(lineage).set_tag(theirs, Tag.DRIVER, somebody)
    copy = Path(shutil.copytree(old, old.with_name("copy")))
    lineage.log_dict(theirs, {"HOTA": 2}, "scores/epoch_0.json")
    reader = Lineage(None, copy)
    assert reader.scores(theirs).files == {"epoch_0.json": {"HOTA": 1}}, "read from the original"
    assert all(str(old) in place for place in places(copy)), "a reader changes nothing"

    before = {path: path.stat().st_mtime_ns for path in old.rglob("*")}
    trial = Lineage(None, copy)
    mine = run_stage(trial, copy, trial.start_curriculum("trial", {}), "mine", CONFIG, None, {"HOTA": 3.0})["run_id"]
    trial.log_dict(mine, {"HOTA": 3}, "scores/epoch_0.json")
    trial.log_dict(theirs, {"HOTA": 3}, "scores/epoch_0.json")
    assert before == {path: path.stat().st_mtime_ns for path in old.rglob("*")}, "written into the original"
    assert lineage.scores(theirs).files == {"epoch_0.json": {"HOTA": 2}}
    shutil.rmtree(old)
    for run_id in (mine, theirs):
        assert Lineage(None, copy).scores(run_id).files == {"epoch_0.json": {"HOTA": 3}}


def test_trials_that_another_host_left_behind_do_not_keep_the_database_as_it_was(old: Path) -> None:
    lineage = Lineage(None, old)
    parent = lineage.start_curriculum("demo", {}, reopen_finished=True)
    sweep = lineage.start_curriculum("sweep", {}, {Tag.PARENT_RUN: parent}, kind="sweep")
    trial = lineage.start_stage(sweep, "trial 000", CONFIG, DIGEST, None, tags={Tag.KIND: "trial"})
    for run_id in (parent, sweep, trial):
        client_of(lineage).set_tag(run_id, Tag.DRIVER, "another-machine/123/456")
    new = moved(old)
    assert Lineage(None, new).start_curriculum("demo", {}) == parent
    assert all(str(new) in place for place in places(new))
    assert not old.exists()


def test_a_storage_that_cannot_be_written_to_is_read(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run_id = ids(old)
    new = moved(old)
    really = Path.open

    def refused(path: Path, mode: str = "r", *more: Any, **how: Any) -> Any:
        if path.is_relative_to(new) and mode != "r":
            raise PermissionError(errno.EACCES, "Permission denied")
        return really(path, mode, *more, **how)

    monkeypatch.setattr(Path, "open", refused)
    reader = Lineage(None, new)
    assert [step.stage for step in reader.walk(run_id)] == ["bdd-foundation"]
    assert reader.scores(run_id).files == {"epoch_0.json": {"HOTA": 1}}
    assert [check.state for check in reader.verify(run_id)] == ["same"]
    with pytest.raises(MotipError, match="cannot keep the MLflow database here"):
        reader.start_curriculum("another", {})
    (new / "mlflow" / "mlflow.db").unlink()
    with pytest.raises(MotipError, match="cannot keep the MLflow database here"):
        Lineage(None, new).walk(run_id)


@pytest.mark.parametrize("linked", ["mlflow", "mlflow/artifacts"])
def test_a_linked_folder_was_not_moved(
    linked: str, old: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    big = old.with_name("big") / Path(linked).name
    big.parent.mkdir()
    shutil.move(old / linked, big)
    (old / linked).symlink_to(big)
    before = places(old)
    monkeypatch.setattr("motip.lineage.store.follow", lambda *_, **__: pytest.fail("the database is locked for it"))
    lineage = Lineage(None, old)
    parent = lineage.start_curriculum("demo", {}, reopen_finished=True)
    lineage.start_stage(parent, "a", CONFIG, DIGEST, None)
    assert set(before) <= set(places(old))
    assert caplog.messages == []


def test_the_same_folder_mounted_twice_was_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (tmp_path / name / "mlflow" / "artifacts" for name in ("one", "two"))
    one.mkdir(parents=True)
    two.mkdir(parents=True)
    assert moved_from(one.as_uri(), two) == one
    monkeypatch.setattr(os.path, "samefile", lambda *folders: folders == (one.parent, two.parent))
    assert moved_from(one.as_uri(), two) is None


def test_places_of_others_stay(old: Path) -> None:
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
    new = moved(old)
    Lineage(None, new).start_curriculum("demo", {})
    with sqlite3.connect(new / "mlflow" / "mlflow.db") as opened:
        found = "select artifact_location from experiments where experiment_id = 77"
        assert opened.execute(found).fetchone() == (foreign,)
        found = "select artifact_uri from runs where experiment_id = 77"
        assert opened.execute(found).fetchone() == (foreign + "/e/artifacts",)


def test_where_artifacts_are_that_were_recorded_elsewhere(tmp_path: Path) -> None:
    before, artifacts = (tmp_path / name / "mlflow" / "artifacts" for name in ("be fore", "now"))
    for folder in (before, artifacts):
        (folder / "both").mkdir(parents=True)
    (before / "only there" / "artifacts").mkdir(parents=True)
    for place, found in {
        (before / "both").as_uri(): artifacts / "both",
        str(before / "both"): artifacts / "both",
        (before / "nowhere" / "artifacts").as_uri(): artifacts / "nowhere" / "artifacts",
        (before / "models" / "m-1" / "artifacts").as_uri(): artifacts / "models" / "m-1" / "artifacts",
        (before / "only there" / "artifacts").as_uri(): before / "only there" / "artifacts",
        # The other storage lies under a folder of that name.
        (before / "x" / "mlflow" / "artifacts" / "run").as_uri(): artifacts / "run",
    }.items():
        assert present(place, artifacts) == found, place
    for place in ("file:///other/place/run", before.as_uri(), "mlflow/artifacts/run", "s3://a/mlflow/artifacts/run"):
        assert present(place, artifacts) is None, place


def test_a_storage_under_a_folder_of_the_same_name(tmp_path: Path) -> None:
    artifacts = tmp_path / "mlflow" / "artifacts" / "mine" / "mlflow" / "artifacts"
    assert present((artifacts / "run").as_uri(), artifacts) == artifacts / "run"


@pytest.mark.parametrize(
    ("address", "place"),
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
def test_places_that_mlflow_deals_with(address: str | None, place: str, tmp_path: Path) -> None:
    assert Store(address, tmp_path, "motip-curriculum")._present(place) is None


def test_artifacts_on_an_object_store_stay_there(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Made by hand: an experiment in the storage's own database whose artifacts are elsewhere."""
    place, files = "unheard-of://bucket/mlflow/artifacts", sorted((old / "mlflow" / "artifacts").rglob("*"))
    with sqlite3.connect(old / "mlflow" / "mlflow.db") as opened:
        opened.execute("update experiments set artifact_location = ? where name = 'motip-curriculum'", (place,))
    lineage = Lineage(None, old)
    run_id = lineage.start_curriculum("mine", {})
    assert client_of(lineage).get_run(run_id).info.artifact_uri == f"{place}/{run_id}/artifacts"
    assert any("artifact repository for: unheard-of://bucket" in message for message in caplog.messages)
    assert sorted((old / "mlflow" / "artifacts").rglob("*")) == files
