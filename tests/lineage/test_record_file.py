"""Lineage records beside weights, chains that continue through them, and verification of data."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from motip.config import load_curriculum
from motip.curriculum import Options
from motip.curriculum import base_weights as weights_module
from motip.data.convert import convert
from motip.data.manifest import Manifest, VideoEntry, entries_digest
from motip.errors import MotipError
from motip.lineage import DataUsed, Lineage
from motip.lineage.export_record import write_export_record
from motip.lineage.record_file import parse_record, read_record, record_export, record_fresh, record_path_of
from motip.lineage.steps import CheckpointLocation, LineageStep, current_environment
from motip.lineage.tags import Tag
from motip.storage.atomic import sha256_file
from motip.weights.export import export_safetensors
from tests.helpers.mlflow_database import lineage_on
from tests.helpers.raw_datasets import bdd_video, curriculum, mix, source
from tests.helpers.small_curriculum import write_files
from tests.helpers.small_dataset import write_checkpoint, write_curriculum
from tests.lineage.test_recorder import CONFIG, DIGEST, client_of, record_stage, weights

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo" / "motip_demo_dance.safetensors"


@pytest.fixture(autouse=True)
def own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


@pytest.fixture
def lineage(storage: Path) -> Lineage:
    return lineage_on(storage, patience=2, retry_interval=0.2)


def given_weights(folder: Path, config: dict[str, str]) -> dict[str, str | None]:
    """Weights with a record of three steps; returns the parent checkpoint of a stage."""
    folder.mkdir()
    fresh, trained = CheckpointLocation("fresh.pth", "", "1" * 64), CheckpointLocation("best.pth", "", "2" * 64)
    steps = [
        LineageStep("initialised", "fresh", checkpoint=fresh, seed="29", **current_environment()),
        LineageStep(
            "stage",
            "Dance-Base",
            "r" * 32,
            "FINISHED",
            data=(DataUsed("dance/train", "a" * 64, profile={"videos": 64}, source={"videos": ["x"]}),),
            came_from=fresh,
            checkpoint=trained,
            config=config,
            seed="29",
            scores={"HOTA": 61.1, "train/loss": 3.0},
            domains={"dance": 61.1},
        ),
    ]
    path = folder / "base.safetensors"
    path.write_text("weights")
    record_export(path, trained, steps, "float16")
    return {"path": str(path), "sha256": sha256_file(path), "run_id": None}


def test_a_chain_continues_through_the_record(lineage: Lineage, storage: Path, tmp_path: Path) -> None:
    start = given_weights(tmp_path / "given", {"LR": "0.001", "OUTPUTS_DIR": "/data/me/outputs", "EPOCHS": "20"})
    parent = lineage.start_curriculum("demo", {})
    config = {"LR": 0.0007, "OUTPUTS_DIR": "outputs", "EPOCHS": 20, "_name": "stage1"}
    first = record_stage(lineage, storage, parent, "BDD-Foundation", config, start, {"HOTA": 26.0})
    lineage.log_metrics(first["run_id"], {"R/dance": 30.0, "R/ground": 26.0, "R/ground/car": 25.0}, 0)
    steps = lineage.chain(first["run_id"])
    assert [step.kind for step in steps] == ["initialised", "stage", "export", "stage"]
    assert [step.stage for step in steps] == ["fresh", "Dance-Base", "base", "BDD-Foundation"]
    for before, after in itertools.pairwise(steps):
        assert before.checkpoint is not None and after.came_from is not None
        assert before.checkpoint.sha256 == after.came_from.sha256
    base = steps[1]
    assert (base.scores, base.domains) == ({"HOTA": 61.1}, {"dance": 61.1})
    assert (base.data[0].profile, base.seed) == ({"videos": 64}, "29")
    assert steps[3].config_changes == {"LR": ("0.001", "0.0007")}  # paths are compared by their last part
    assert steps[3].domains == {"dance": 30.0, "ground": 26.0}
    assert "_name" not in client_of(lineage).get_run(first["run_id"]).data.params
    assert "/data/me" not in record_path_of(str(start["path"])).read_text()
    # The file itself is checked; files known only from the record are not on this machine.
    assert [(check.stage, check.state) for check in lineage.verify(first["run_id"])] == [
        ("base", "same"),
        ("BDD-Foundation", "same"),
    ]
    Path(str(start["path"])).write_text("trained over")
    assert [check.state for check in lineage.verify(first["run_id"])] == ["changed", "same"]

    # From a copy of the database alone, without the record file.
    shutil.rmtree(tmp_path / "given")
    with sqlite3.connect(tmp_path / "moved.db") as target:
        sqlite3.connect(storage / "mlflow" / "mlflow.db").backup(target)
    assert Lineage(f"sqlite:///{tmp_path}/moved.db", tmp_path / "other").chain(first["run_id"]) == steps


def test_a_record_of_other_weights_is_an_error(lineage: Lineage, tmp_path: Path) -> None:
    start = given_weights(tmp_path / "given", {})
    parent = lineage.start_curriculum("demo", {})
    Path(str(start["path"])).write_text("trained again")
    other = {**start, "sha256": sha256_file(str(start["path"]))}
    with pytest.raises(MotipError, match="belongs to another file"):
        lineage.start_stage(parent, "a", CONFIG, DIGEST, other)
    for damaged in ({"format": 99}, [], {"format": 1, "weights_sha256": "x", "steps": [{"no": "kind"}]}):
        with pytest.raises(MotipError, match="lineage record"):
            parse_record(damaged, "x", "w.lineage.json")
    assert read_record(tmp_path / "nothing.pth", "x") == []


def test_fresh_weights_start_a_chain(tmp_path: Path) -> None:
    path = tmp_path / "fresh.pth"
    path.write_text("drawn")
    record_fresh(path, sha256_file(path), 7)
    (step,) = read_record(path, sha256_file(path))
    assert (step.kind, step.seed, step.stage, step.record) == ("initialised", "7", "fresh", "fresh.lineage.json")
    assert step.versions["torch"]


def test_a_missing_record_of_fresh_weights_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = load_curriculum(write_files(tmp_path)).stages
    options = Options(data_root=str(tmp_path), storage=str(tmp_path / "storage"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights_module, "record_fresh", killed)
        with pytest.raises(KeyboardInterrupt):
            weights_module.fresh_weights(stages[0], options)
    (path,) = (tmp_path / "storage" / "weights").iterdir()
    drawn = sha256_file(path)
    assert weights_module.fresh_weights(stages[0], options) == path
    assert sha256_file(path) == drawn, "initialised again"
    (step,) = read_record(path, drawn)
    assert step.kind == "initialised"

    # A leftover record is not used for the next weights.
    path.unlink()
    record_path_of(path).write_text(record_path_of(path).read_text().replace(drawn, "0" * 64))
    weights_module.fresh_weights(stages[0], options)
    assert [step.kind for step in read_record(path, sha256_file(path))] == ["initialised"]


def test_export_writes_the_record_from_the_run_of_the_checkpoint(lineage: Lineage, storage: Path) -> None:
    import torch

    parent = lineage.start_curriculum("demo", {})
    run_id = lineage.start_stage(parent, "Dance-Base", CONFIG, DIGEST, None)
    folder = storage / "curricula" / "demo" / "Dance-Base"
    folder.mkdir(parents=True)
    checkpoint = folder / "checkpoint_best.pth"
    write_curriculum(folder / "curriculum.yaml", ROOT)
    write_checkpoint(checkpoint, folder / "stage.yaml")
    stored = torch.load(checkpoint, weights_only=True)
    torch.save({**stored, "run_id": run_id}, checkpoint)
    lineage.log_stage_result(run_id, checkpoint, sha256_file(checkpoint), {"HOTA": 50.0})

    alone = export_safetensors(checkpoint, storage / "out" / "shipped.safetensors", dtype=torch.float16)
    assert not (storage / "out" / "config.json").exists()
    record, steps = write_export_record(checkpoint, alone, dtype="float16")
    assert record == storage / "out" / "shipped.lineage.json"
    assert [step.stage for step in steps] == ["Dance-Base", "shipped"]
    stored_steps = read_record(alone, sha256_file(alone))
    assert [(step.kind, step.scores) for step in stored_steps] == [("stage", {"HOTA": 50.0}), ("export", {})]
    assert stored_steps[1].config_changes == {"dtype": ("as trained", "float16")}

    # Exported again from the exported file: the chain comes from its record.
    again = export_safetensors(alone, storage / "again")
    assert [step.stage for step in write_export_record(alone, again)[1]] == ["Dance-Base", "shipped", "model"]

    # Another checkpoint does not have the best one's scores; without the database only the file's own facts are known.
    torch.save({**stored, "run_id": run_id, "epoch": 3}, folder / "checkpoint_3.pth")
    later = export_safetensors(folder / "checkpoint_3.pth", storage / "later")
    _, (trained, _) = write_export_record(folder / "checkpoint_3.pth", later)
    assert (trained.scores, "epoch 3" in trained.note) == ({}, True)
    shutil.rmtree(storage / "mlflow")
    _, (trained, _) = write_export_record(folder / "checkpoint_3.pth", later)
    assert (trained.kind, trained.run_id, "was not found" in trained.note) == ("checkpoint", run_id, True)


def test_the_shipped_base_weights_have_a_record() -> None:
    steps = read_record(DEMO, sha256_file(DEMO))
    assert [step.kind for step in steps] == ["initialised", "stage", "export"]
    base = steps[1]
    assert base.came_from == steps[0].checkpoint and steps[2].came_from == base.checkpoint
    assert steps[0].came_from is None and steps[0].seed
    assert base.domains["dance"] == pytest.approx(base.scores["HOTA"])
    assert all((base.data, base.data_digest, base.seed, base.versions, base.hardware, base.config))
    assert re.fullmatch(r"[0-9a-f]{40}", steps[2].git_commit)
    assert not re.search(r'"(/|~|\w+://)', record_path_of(DEMO).read_text())


def shard(storage: Path, name: str) -> VideoEntry:
    """A placeholder shard of a video, and its manifest entry."""
    path = storage / "shards" / "ground" / "train" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"frames of {name}")
    return VideoEntry(
        source="ground",
        dataset="bdd100k",
        split="train",
        sequence=name,
        video=name,
        segment=0,
        first_frame=0,
        last_frame=3,
        frames=4,
        fps=5.0,
        width=64,
        height=64,
        labels_sha256=name,
        images_sha256=name,
        shard=f"ground/train/{name}.parquet",
        shard_sha256=sha256_file(path),
        shard_bytes=9,
        rows_per_group=8,
        boxes={"car": 4},
        ignored={},
        tracks={"car": 1},
        track_count=1,
        objects=4,
        max_objects=1,
        max_window_ids=1,
        empty_frames=0,
    )


def test_verify_checks_the_shards(lineage: Lineage, storage: Path) -> None:
    entries = [shard(storage, name) for name in ("one", "two")]
    Manifest(tuple(entries)).save(storage)
    used = DataUsed("ground/train", entries_digest(entries), source={"videos": ["one", "two"]}, profile={"videos": 2})
    parent = lineage.start_curriculum("demo", {})
    run_id = lineage.start_stage(parent, "a", CONFIG, DIGEST, None, datasets=[used])
    path, sha256 = weights(storage, "a")
    lineage.log_stage_result(run_id, path, sha256, {"HOTA": 1})
    checks = lineage.verify(run_id)
    assert [(check.what, check.state) for check in checks] == [("weights", "same"), ("data", "same")]
    second = storage / "shards" / "ground" / "train" / "two.parquet"
    second.write_bytes(b"other pictures")
    changed = lineage.verify(run_id)[1]
    assert (changed.what, changed.state, changed.path) == ("data", "changed", str(second))
    second.unlink()
    assert lineage.verify(run_id)[1].state == "missing"
    assert [check.what for check in lineage.verify(run_id, data=False)] == ["weights"]
    Manifest(tuple(entries[:1])).save(storage)
    (gone,) = lineage.verify(run_id)[1:]
    assert (gone.state, gone.path) == ("missing", str(second))
    Manifest((replace(entries[0], fps=30.0),)).save(storage)
    second.write_bytes(b"no shard")
    assert [check.path for check in lineage.verify(run_id)[1:]] == [str(second)]
    shutil.rmtree(storage / "shards")
    (gone,) = lineage.verify(run_id)[1:]
    assert gone.state == "missing" and gone.path.endswith("manifest.json")


def test_verify_checks_videos_that_a_later_curriculum_does_not_use(
    lineage: Lineage, storage: Path, tmp_path: Path
) -> None:
    """They are no longer in the manifest but their shards exist: nothing has changed."""
    for index in range(4):
        bdd_video(tmp_path / "bdd", f"train{index}", 10)
    bdd_video(tmp_path / "bdd", "val0", 10, split="val")
    ground = source("ground", "bdd100k", "bdd", classes={"car": ("car",)})
    entries = convert(curriculum([ground], [mix("ground", 4)]), tmp_path, storage).manifest.of("ground", "train")
    names = [entry.video for entry in entries]
    used = DataUsed("ground/train", entries_digest(entries), source={"videos": names})
    run_id = lineage.start_stage(lineage.start_curriculum("demo", {}), "a", CONFIG, DIGEST, None, datasets=[used])
    left = convert(curriculum([ground], [mix("ground", 1)]), tmp_path, storage).manifest.of("ground", "train")
    assert len(left) == 1
    (check,) = lineage.verify(run_id)
    assert (check.state, check.expected, check.found) == ("same", used.sha256, used.sha256)

    # Changed shards are named, although the sha256 of these files is recorded nowhere.
    first, second, third = [storage / "shards" / entry.shard for entry in entries if entry.video != left[0].video]
    pictures = bytearray(first.read_bytes())
    at = pictures.index(b"\xff\xd8\xff") + 200
    pictures[at] ^= 1
    first.write_bytes(pictures)
    second.write_bytes(b"PAR1 cut short")
    third.unlink()
    checks = {check.path: check for check in lineage.verify(run_id)}
    states = {path: check.state for path, check in checks.items()}
    assert states == {str(first): "changed", str(second): "changed", str(third): "missing"}
    assert checks[str(first)].found == sha256_file(first)

    # A valid shard with other labels under the name of the recorded one.
    shutil.copyfile(storage / "shards" / left[0].shard, third)
    replaced = [entry for entry in entries if entry.video == third.stem]
    used = DataUsed("ground/train", entries_digest(replaced), source={"videos": [third.stem]})
    run_id = lineage.start_stage(lineage.start_curriculum("demo", {}), "b", CONFIG, DIGEST, None, datasets=[used])
    assert [check.state for check in lineage.verify(run_id)] == ["changed"]


def test_two_tables_of_one_run_are_both_listed(lineage: Lineage) -> None:
    run_id = lineage.start_curriculum("demo", {})
    for name in ("evaluation/epoch_001.json", "evaluation/domains.json", "evaluation/epoch_001.json"):
        lineage.log_table(run_id, ["class", "HOTA"], [["car", "50.0"]], name)
    tables = json.loads(client_of(lineage).get_run(run_id).data.tags[Tag.TABLES])
    assert [table["path"] for table in tables] == ["evaluation/epoch_001.json", "evaluation/domains.json"]


def test_the_list_of_tables_fits_in_a_tag(lineage: Lineage) -> None:
    run_id = lineage.start_curriculum("demo", {})

    def tables() -> str:
        return client_of(lineage).get_run(run_id).data.tags[Tag.TABLES]

    names = [f"evaluation/{'long/' * 200}{number}.json" for number in range(10)]
    for name in names:
        lineage.log_table(run_id, ["class"], [["car"]], name)
    assert [table["path"] for table in json.loads(tables())] == names[:7]
    short = "evaluation/short.json"
    lineage.log_table(run_id, ["class"], [["car"]], short)
    assert json.loads(tables())[-1]["path"] == short, "this one still fits"

    # An unreadable list, as another program may have left it.
    client_of(lineage).set_tag(run_id, Tag.TABLES, tables()[:50])
    for unreadable in (tables(), "7", "[7]"):
        client_of(lineage).set_tag(run_id, Tag.TABLES, unreadable)
        lineage.log_table(run_id, ["class"], [[unreadable]], "evaluation/next.json")
        assert tables() == unreadable
    assert Path(client_of(lineage).download_artifacts(run_id, "evaluation/next.json")).is_file()


def test_verify_names_the_shards_if_all_of_a_dataset_are_missing(lineage: Lineage, storage: Path) -> None:
    entry = shard(storage, "only")
    Manifest((entry,)).save(storage)
    used = DataUsed("ground/train", entries_digest([entry]), source={"videos": ["only"]})
    run_id = lineage.start_stage(lineage.start_curriculum("demo", {}), "a", CONFIG, DIGEST, None, datasets=[used])
    gone = storage / "shards" / "ground" / "train" / "only.parquet"
    gone.unlink()
    (check,) = lineage.verify(run_id)
    assert (check.state, check.path) == ("missing", str(gone))
