"""A storage that was moved, is linked, or is mounted at two places: who follows, who waits, who only reads."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
from pathlib import Path

import pytest
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from motip.lineage import Lineage
from motip.lineage.moved import follow, moved_from, present
from motip.lineage.tags import Tag
from tests.test_lineage import CONFIG, DIGEST, client_of, run_stage

ELSEWHERE = "another-machine/123/456"


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


def under_way(storage: Path, driver: str, **tags: str) -> str:
    """A run that another process has begun, as its database tells it."""
    with sqlite3.connect(storage / "mlflow" / "mlflow.db") as opened:
        run_id = "f" * 32
        (experiment,) = opened.execute("select experiment_id from experiments order by experiment_id desc").fetchone()
        place = (storage / "mlflow" / "artifacts" / run_id / "artifacts").as_uri()
        opened.execute(
            "insert into runs (run_uuid, name, status, start_time, lifecycle_stage, user_id, source_name, source_type, "
            "artifact_uri, experiment_id) values (?, 'theirs', 'RUNNING', 1, 'active', '', '', 'UNKNOWN', ?, ?)",
            (run_id, place, experiment),
        )
        opened.executemany(
            "insert into tags (key, value, run_uuid) values (?, ?, ?)",
            [(key, value, run_id) for key, value in {Tag.DRIVER: driver, **tags}.items()],
        )
    return run_id


def moved(old: Path) -> Path:
    new = old.with_name("new")
    old.rename(new)
    return new


@pytest.mark.parametrize("driver", ["", ELSEWHERE, "somebody"])
def test_a_reader_changes_nothing_and_finds_everything(
    driver: str, old: Path, somebody: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, run_id = ids(old)
    under_way(old, somebody if driver == "somebody" else driver)
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
    under_way(old, f"{socket.gethostname()}/1/1")  # cut off: that process is not there any more
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


@pytest.mark.parametrize("recorded_is_here", [False, True])
@pytest.mark.parametrize("driver", [ELSEWHERE, "somebody"])
def test_a_start_beside_a_job_under_way_leaves_its_database_alone(
    driver: str, recorded_is_here: bool, old: Path, somebody: str, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = under_way(old, somebody if driver == "somebody" else driver)
    new = moved(old)
    if recorded_is_here:
        (old / "mlflow" / "artifacts").mkdir(parents=True)
    before = places(new)
    lineage = Lineage(None, new)
    parent = lineage.start_curriculum("another", {})
    stage = run_stage(lineage, new, parent, "Mine", CONFIG, None, {"HOTA": 2.0})
    lineage.log_dict(stage["run_id"], {"HOTA": 2}, "scores/epoch_0.json")
    assert set(before) <= set(places(new))
    (told,) = [message for message in caplog.messages if "is recorded at" in message]
    assert str(old) in told and str(new) in told
    folder = (old if recorded_is_here else new) / "mlflow" / "artifacts"
    assert (folder / stage["run_id"] / "artifacts" / "config.json").is_file()
    assert list((folder / "models").rglob("MLmodel"))
    assert lineage.scores(stage["run_id"]).files == {"epoch_0.json": {"HOTA": 2}}
    assert old.exists() == recorded_is_here, "no storage is made up"

    # When that one has ended, the next start heals the database: what was written meanwhile is found.
    client_of(lineage).set_terminated(theirs, "FINISHED")
    shutil.rmtree(old, ignore_errors=True)
    again = Lineage(None, new)
    again.start_curriculum("one more", {})
    assert all(str(new) in place for place in places(new))
    if not recorded_is_here:
        assert again.scores(stage["run_id"]).files == {"epoch_0.json": {"HOTA": 2}}


def test_a_curriculum_that_another_host_left_behind_is_gone_on_with(old: Path) -> None:
    parent, _ = ids(old)
    with sqlite3.connect(old / "mlflow" / "mlflow.db") as opened:
        opened.execute("update runs set status = 'RUNNING' where run_uuid = ?", (parent,))
        opened.execute("update tags set value = ? where key = ? and run_uuid = ?", (ELSEWHERE, Tag.DRIVER, parent))
    theirs = under_way(old, ELSEWHERE, **{Tag.PARENT_RUN: parent})
    new = moved(old)
    lineage = Lineage(None, new)
    assert lineage.start_curriculum("demo", {}) == parent
    assert all(str(new) in place for place in places(new))
    assert client_of(lineage).get_run(theirs).info.status == "KILLED"
    assert not old.exists()


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


def test_where_artifacts_are_that_were_recorded_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, artifacts = (tmp_path / name / "mlflow" / "artifacts" for name in ("be fore", "now"))
    for folder in (before, artifacts):
        (folder / "both").mkdir(parents=True)
    (artifacts / "only here").mkdir()
    assert present((before / "both").as_uri(), before, artifacts) == before / "both"
    assert present(str(before / "only here"), before, artifacts) == artifacts / "only here"
    assert present((before / "new").as_uri(), before, artifacts) == before / "new"
    assert present("file:///other/place", before, artifacts) == Path("/other/place")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert present((before / "new").as_uri(), before, artifacts) == artifacts / "new", "it must not be written to"
    shutil.rmtree(before.parents[1])
    assert present((before / "both").as_uri(), before, artifacts) == artifacts / "both"
