"""A storage written by version 0.1 is read, resumed and continued, also after it was moved.

``tests/fixtures/make_storage_v0_1.py`` wrote the archive. Its files and database record the storage's original absolute
path; here it is unpacked elsewhere, as after a move.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from motip.cluster import Cluster
from motip.config import Config, load_config, load_curriculum
from motip.curriculum import Options
from motip.evaluation.score_files import load_scores
from motip.events import EpochDone, StepLogged
from motip.lineage import Lineage
from motip.lineage.record_file import read_record
from motip.report.stage_history import History
from motip.stage_folder import StageFolder
from motip.storage.atomic import sha256_file
from motip.tracking.loading import load
from motip.tune import Tuning, run_sweep
from motip.weights import load_checkpoint
from tests.conftest import Motip
from tests.helpers.small_curriculum import QuietUi, run

ARCHIVE = Path(__file__).resolve().parents[1] / "fixtures" / "storage_v0_1.tar.xz"


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of version 0.1, for tests that only read them."""
    folder = tmp_path_factory.mktemp("v0_1")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="tar")
    recorded = Path(record_of(folder, "small", "Aerial")["checkpoint"])
    assert not recorded.exists(), "the original storage exists on this machine and would be used"
    return folder


@pytest.fixture
def folder(unpacked: Path, tmp_path: Path) -> Path:
    """A copy, for tests that change it."""
    return Path(shutil.copytree(unpacked, tmp_path / "copy"))


def stage_folder(folder: Path, curriculum: str, stage: str) -> Path:
    (found,) = (folder / "storage" / "curricula" / curriculum / stage).iterdir()
    return found


def record_of(folder: Path, curriculum: str, stage: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((stage_folder(folder, curriculum, stage) / "stage.json").read_text())
    return record


def runs(lineage: Lineage) -> dict[str, Any]:
    """Name -> MLflow run."""
    return {each.info.run_name: each for each in lineage._find_runs("")}


# ---- stages ---------------------------------------------------------------------------------------------------------


def test_finished_stages_stay_finished(folder: Path) -> None:
    storage = folder / "storage"
    lineage = Lineage(storage=storage)
    before = {name: record_of(folder, "small", name) for name in ("Ground", "Aerial")}
    assert all("told" in record and "mlflow_synced" not in record for record in before.values())
    result, ui, _ = run(folder / "curriculum.yaml", storage, lineage=lineage)
    assert ui.begun == []
    for record in result.records:
        assert record.skipped
        assert record.inputs == before[record.stage]["inputs"] and record.metrics == before[record.stage]["metrics"]
        assert Path(record.checkpoint).is_relative_to(storage) and sha256_file(record.checkpoint) == record.sha256
        assert record_of(folder, "small", record.stage) == before[record.stage], "not written again"
    # domain scores
    assert result.domains is not None and result.domains.matrix.stages == ("Ground", "Aerial")
    assert sum("scored before" in note for note in ui.notes) == 2
    # MLflow
    assert result.run_id == runs(lineage)["small"].info.run_id
    assert [record.run_id for record in result.records] == [before[name]["run_id"] for name in ("Ground", "Aerial")]
    assert {name: runs(lineage)[name].info.status for name in ("small", "Ground", "Aerial")} == dict.fromkeys(
        ("small", "Ground", "Aerial"), "FINISHED"
    )


def test_an_unfinished_stage_resumes_inside_its_epoch(folder: Path) -> None:
    storage = folder / "storage"
    before = record_of(folder, "halted", "Street")
    assert before["status"] == "running"
    lineage = Lineage(storage=storage)
    result, ui, _ = run(folder / "halted.yaml", storage, lineage=lineage)
    assert ui.begun == ["Street"]
    steps = [(event.epoch, event.index) for event in ui.events if isinstance(event, StepLogged)]
    assert steps == [(1, 2), (2, 0), (2, 1), (2, 2)], "two of three steps of the second epoch were done"
    (record,) = result.records
    assert (record.inputs, record.run_id) == (before["inputs"], before["run_id"]), "the same stage and MLflow run"
    after = record_of(folder, "halted", "Street")
    assert after["status"] == "finished" and "told" not in after
    # the spool of version 0.1 was delivered
    run_id = str(record.run_id)
    recorded = runs(lineage)["Street"]
    assert recorded.info.run_id == run_id and recorded.info.status == "FINISHED"
    assert recorded.data.tags["motip.resumed"] == "1"
    history = lineage._store.client().get_metric_history(run_id, "train/loss")
    assert len({point.step for point in history}) == 3
    assert not list((storage / "mlflow" / "spool").glob("*.jsonl")) and lineage.deliver_all() == 0
    assert set(lineage.scores(run_id).files) == {f"epoch_{epoch:03d}.json" for epoch in range(3)}


@pytest.mark.parametrize(
    ("curriculum", "stage", "epochs"),
    [("small", "Ground", {0, 1, 2}), ("small", "Aerial", {0}), ("halted", "Street", {0})],
)
def test_history_and_configuration_of_a_stage_are_read(
    unpacked: Path, curriculum: str, stage: str, epochs: set[int]
) -> None:
    found = stage_folder(unpacked, curriculum, stage)
    history = History.load(found)
    assert (history.stage, set(history.epochs)) == (stage, epochs) and history.steps
    events = StageFolder(found).events()
    assert {event.epoch for event in events if isinstance(event, EpochDone)} == epochs
    config = Config.from_dict(json.loads((found / "config.json").read_text()))
    file = "aerial.yaml" if stage == "Aerial" else "ground.yaml"
    assert config.to_dict() == load_config(unpacked / file).to_dict(), "no key was added or removed"


# ---- weights --------------------------------------------------------------------------------------------------------


def test_checkpoints_and_exported_weights_load(unpacked: Path) -> None:
    checkpoints = sorted(unpacked.rglob("*.pth"))
    assert len(checkpoints) > 5
    for path in checkpoints:
        stored = load_checkpoint(path)
        assert len(stored["model"]) == 173 and stored["format"] == 1, path
    best = stage_folder(unpacked, "small", "Aerial") / "checkpoint_best.pth"
    loaded, exported = (load(path) for path in (best, unpacked / "exported"))
    assert loaded.class_names == exported.class_names == ("pedestrian", "car")
    ours, theirs = loaded.model.state_dict(), exported.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    file = unpacked / "exported" / "model.safetensors"
    kinds = [step.kind for step in read_record(file, sha256_file(file))]
    assert kinds == ["initialised", "stage", "stage", "export"]


# ---- lineage and reports --------------------------------------------------------------------------------------------


def test_lineage_and_verification_of_a_run(unpacked: Path, motip: Motip) -> None:
    storage, run_id = unpacked / "storage", record_of(unpacked, "small", "Aerial")["run_id"]
    lineage = Lineage(storage=storage)
    steps = lineage.chain(run_id)
    assert [step.stage.partition("_")[0] for step in steps] == ["base", "Ground", "Aerial"]
    assert lineage.chain(runs(lineage)["small"].info.run_id) == steps
    assert steps[-1].domains.keys() == {"ground", "aerial"} and steps[-1].scores["HOTA"] > 0
    assert lineage.curriculum_of(run_id) == "small"
    assert {check.state for check in lineage.verify(run_id)} == {"same"}
    shown = motip("lineage", run_id, "--storage", storage)
    assert shown.status == 0 and "Aerial" in shown.out
    assert motip("lineage", "verify", run_id, "--storage", storage).status == 0


def test_comparison_of_a_stage_a_run_and_an_evaluation(unpacked: Path, motip: Motip) -> None:
    storage, stage = unpacked / "storage", stage_folder(unpacked, "small", "Aerial")
    (evaluation,) = [path.parent for path in (storage / "evaluations").rglob("scores_val.json")]
    run_id = record_of(unpacked, "small", "Aerial")["run_id"]
    assert set(load_scores(str(evaluation))[1]) >= {"aerial"}
    for other in (evaluation, run_id):
        compared = motip("compare", other, stage, "--sources", "aerial", "--storage", storage)
        assert compared.status == 0, compared.err
        assert "within noise" in compared.out


def test_the_report_page_and_a_dashboard_are_written(folder: Path, motip: Motip) -> None:
    storage = folder / "storage"
    page = storage / "curricula" / "small" / "report.html"
    page.unlink()
    written = motip("report", "page", page.parent, "--storage", storage)
    assert written.status == 0, written.err
    assert "Aerial" in page.read_text()
    assert "the file is missing" not in page.read_text(), "checkpoints of a moved storage are found"
    drawn = motip("report", "dashboard", stage_folder(folder, "small", "Ground"))
    assert drawn.status == 0, drawn.err


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def test_a_finished_sweep_trains_no_trial(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The overlay is written again from the records of its trials."""

    def no_search(searcher: Any, *_: Any, **__: Any) -> list[Any]:
        assert searcher.is_done()
        return list(searcher.trials.values())

    monkeypatch.setattr("motip.tune.ray_tune.search", no_search)
    monkeypatch.setattr("motip.curriculum.run.ray_map", lambda: None)
    path, overlay = folder / "curriculum.yaml", folder / "tuned" / "Ground.yaml"
    found = yaml.safe_load(overlay.read_text())
    assert found == {"LR": 0.00126, "sample_intervals": [1]}
    storage = folder / "storage"
    curriculum, lineage = load_curriculum(path, tune=True), Lineage(storage=storage)
    options = Options(str(folder), str(storage), 0, config_path=str(path))
    tuning, cluster = Tuning(workers=1, overlay=str(overlay)), Cluster(8.0, 0.0, 1, False)
    result = run_sweep(curriculum, curriculum.stages[0], options, cluster, lineage, QuietUi(), tuning)
    assert [path.name for path in (storage / "sweeps" / "small" / "Ground").iterdir()] == [result.folder.name]
    assert {trial.status for trial in result.trials} == {"finished", "pruned"}
    assert len(result.trials) == 3 and len(result.repeats) == 2
    assert result.values == found and yaml.safe_load(overlay.read_text()) == found
    assert result.run_id == runs(lineage)["Ground sweep"].info.run_id


def test_tuned_values_are_read_as_an_overlay(folder: Path) -> None:
    path = folder / "tuned_curriculum.yaml"
    path.write_text(
        (folder / "curriculum.yaml").read_text().replace("sweep.yaml,", "sweep.yaml, tuned: tuned/Ground.yaml,")
    )
    assert load_curriculum(path).stages[0].config.LR == 0.00126
