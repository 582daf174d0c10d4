"""`motip report errors` of a stage, an evaluation and a run id: stored tracks, new tracks, and error messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from motip.lineage import Lineage
from motip.weights import load_checkpoint, save_checkpoint
from motip.weights.export import load_for_tracking
from tests.conftest import Motip
from tests.helpers.small_curriculum import CURRICULUM, run, write_files
from tests.helpers.videos import facts


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a curriculum file and a storage with one trained stage and its MLflow run."""
    root = tmp_path_factory.mktemp("report")
    write_files(root)
    (root / "curriculum.yaml").write_text(CURRICULUM.split("  - {name: BDD-Refinement")[0] + "domains: {score: none}\n")
    # After two clips the tiny preset detects nothing at the default thresholds.
    (root / "one.yaml").write_text((root / "one.yaml").read_text() + "DET_THRESH: 0.02\nNEWBORN_THRESH: 0.02\n")
    run(root / "curriculum.yaml", root / "storage", lineage=Lineage(storage=root / "storage"))
    return root


@pytest.fixture
def stage(workspace: Path) -> Path:
    (folder,) = (workspace / "storage/curricula/small/BDD-Foundation").iterdir()
    return folder


def shown(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "errors.json").read_text())
    return index


def test_training_writes_the_dashboard_to_folder_and_run(workspace: Path, stage: Path) -> None:
    record = json.loads((stage / "stage.json").read_text())
    lineage = Lineage(storage=workspace / "storage")
    artifact = lineage._store.client().download_artifacts(record["run_id"], "dashboard.png")
    assert Path(artifact).read_bytes() == (stage / "dashboard.png").read_bytes()
    job = json.loads((stage / "job.json").read_text())
    assert job["val"] == ["ground"] and job["classes"]["ground"] == {"pedestrian": ["pedestrian"], "car": ["car"]}


def test_stage_is_tracked_once(workspace: Path, stage: Path, motip: Motip, tmp_path: Path) -> None:
    status, out, err = motip("report", "errors", stage, "--clips", 1, "--device", "cpu")
    assert status == 0, err
    folder = stage / "failures_val"
    index = shown(folder)
    (clip,) = folder.glob("*.mp4")
    assert facts(clip).codec == "h264" and facts(clip).frames == 4
    assert (folder / "contact_sheet.png").is_file() and "ground/ground-val" in out
    assert "1 videos were tracked now" in out or "1 of 1 videos were tracked now" in out

    run_id = json.loads((stage / "stage.json").read_text())["run_id"]
    status, out, err = motip(
        "report", "errors", run_id, "--storage", workspace / "storage", "--out", tmp_path / "a", "--clips", 0
    )
    assert status == 0, err
    assert "tracked now" not in out
    assert shown(tmp_path / "a")["sequences"] == index["sequences"] and not list((tmp_path / "a").glob("*.mp4"))


def test_evaluation_shows_the_counts_of_its_scores(workspace: Path, stage: Path, motip: Motip, tmp_path: Path) -> None:
    storage = workspace / "storage"
    arguments = ["--config", workspace / "curriculum.yaml", "--storage", storage, "--sources", "ground"]
    checkpoint = stage / "checkpoint_best.pth"
    status, _, err = motip("evaluate", checkpoint, *arguments, "--json", tmp_path / "scores.json")
    assert status == 0, err
    scores = json.loads((tmp_path / "scores.json").read_text())
    folder = storage / "evaluations" / scores["sha256"][:12]
    status, out, err = motip("report", "errors", folder, "--out", tmp_path / "b", "--clips", 0)
    assert status == 0, err
    assert "checkpoint_best.pth" in out
    (sequence,) = shown(tmp_path / "b")["sequences"]
    counts = scores["sources"]["ground"]["class_averaged"]
    assert [sequence["missed"], sequence["false positive"]] == [counts["FN"], counts["FP"]]

    # Missing tracks are tracked again.
    for path in folder.rglob("*.txt"):
        path.unlink()
    status, out, err = motip("report", "errors", folder, "--out", tmp_path / "c", "--clips", 0)
    assert status == 0 and "1 videos were tracked now" in out, err
    assert shown(tmp_path / "c")["sequences"] == [sequence]


def test_run_without_job_json_needs_its_curriculum_file(
    workspace: Path, stage: Path, motip: Motip, tmp_path: Path
) -> None:
    kept = (stage / "job.json").read_bytes()
    (stage / "job.json").unlink()
    try:
        status, _, err = motip("report", "errors", stage, "--out", tmp_path / "a")
        assert status == 2 and "--config" in err and err.count("error:") == 1
        config = workspace / "curriculum.yaml"
        status, _, err = motip("report", "errors", stage, "--out", tmp_path / "a", "--config", config, "--clips", 0)
        assert status == 0, err
    finally:
        (stage / "job.json").write_bytes(kept)


def test_checkpoint_with_other_classes_is_an_error(workspace: Path, stage: Path, motip: Motip, tmp_path: Path) -> None:
    path = stage / "checkpoint_best.pth"
    kept = path.read_bytes()
    stored = load_checkpoint(path)
    config = {**stored["config"], "CLASSES": ["dog", "cat"]}
    try:
        model, _, _ = load_for_tracking(path)
        save_checkpoint(path, model=model, classes=("dog", "cat"), config=config, epoch=0, step=1)
        status, _, err = motip("report", "errors", stage, "--out", tmp_path / "a")
        assert status == 2 and "classes" in err and "dog, cat" in err and err.count("error:") == 1
    finally:
        path.write_bytes(kept)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{file}/sub"], "output folder cannot be written"),
        (["--split", "test"], "no test videos"),
        (["--sources", "aerial"], "not scored on this source"),
    ],
)
def test_invalid_options_are_one_message_each(
    stage: Path, motip: Motip, tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = motip("report", "errors", stage, *(each.format(file=tmp_path / "file") for each in options))
    assert status == 2 and message in err and err.count("error:") == 1


def test_unknown_run_is_an_error(workspace: Path, motip: Motip, tmp_path: Path) -> None:
    for place, message in (
        (tmp_path / "nowhere", "there is no such run"),
        (workspace / "storage" / "shards", "does not identify one run"),
        ("0" * 32, "no such run"),
    ):
        status, _, err = motip("report", "errors", place, "--storage", workspace / "storage", "--out", tmp_path / "a")
        assert status == 2 and message in err and err.count("error:") == 1
