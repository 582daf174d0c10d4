"""`motip report errors` from a stage, an evaluation and a run: tracks found or made, and what is wrong said once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from motip.lineage import Lineage
from motip.weights.export import load_for_tracking
from motip.weights.pretrained import load_checkpoint, save_checkpoint
from tests.conftest import Motip
from tests.helpers.small_curriculum import CURRICULUM, run, write_files
from tests.helpers.videos import facts


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with one trained stage that an MLflow run records, and its curriculum file beside it."""
    root = tmp_path_factory.mktemp("report")
    write_files(root)
    (root / "curriculum.yaml").write_text(CURRICULUM.split("  - {name: BDD-Refinement")[0] + "domains: {score: none}\n")
    # The tiny preset after two clips finds nothing at the usual thresholds.
    (root / "one.yaml").write_text((root / "one.yaml").read_text() + "DET_THRESH: 0.02\nNEWBORN_THRESH: 0.02\n")
    run(root / "curriculum.yaml", root / "storage", lineage=Lineage(storage=root / "storage"))
    return root


@pytest.fixture
def stage(room: Path) -> Path:
    (folder,) = (room / "storage/curricula/small/BDD-Foundation").iterdir()
    return folder


def shown(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "errors.json").read_text())
    return index


def test_training_left_a_dashboard_in_its_folder_and_in_its_run(room: Path, stage: Path) -> None:
    record = json.loads((stage / "stage.json").read_text())
    lineage = Lineage(storage=room / "storage")
    artifact = lineage._store.client().download_artifacts(record["run_id"], "dashboard.png")
    assert Path(artifact).read_bytes() == (stage / "dashboard.png").read_bytes()
    job = json.loads((stage / "job.json").read_text())
    assert job["val"] == ["ground"] and job["classes"]["ground"] == {"pedestrian": ["pedestrian"], "car": ["car"]}


def test_a_stage_is_tracked_once_and_shown(room: Path, stage: Path, motip: Motip, tmp_path: Path) -> None:
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
        "report", "errors", run_id, "--storage", room / "storage", "--out", tmp_path / "a", "--clips", 0
    )
    assert status == 0, err
    assert "tracked now" not in out
    assert shown(tmp_path / "a")["sequences"] == index["sequences"] and not list((tmp_path / "a").glob("*.mp4"))


def test_an_evaluation_shows_what_its_scores_count(room: Path, stage: Path, motip: Motip, tmp_path: Path) -> None:
    storage = room / "storage"
    status, _, err = motip(
        "evaluate", stage / "checkpoint_best.pth", "--config", room / "curriculum.yaml", "--storage", storage,
        "--sources", "ground", "--json", tmp_path / "scores.json",
    )  # fmt: skip
    assert status == 0, err
    scores = json.loads((tmp_path / "scores.json").read_text())
    folder = storage / "evaluations" / scores["sha256"][:12]
    status, out, err = motip("report", "errors", folder, "--out", tmp_path / "b", "--clips", 0)
    assert status == 0, err
    assert "checkpoint_best.pth" in out
    (sequence,) = shown(tmp_path / "b")["sequences"]
    counts = scores["sources"]["ground"]["class_averaged"]
    assert [sequence["missed"], sequence["false positive"]] == [counts["FN"], counts["FP"]]

    # Tracks that are gone are made again.
    for path in folder.rglob("*.txt"):
        path.unlink()
    status, out, err = motip("report", "errors", folder, "--out", tmp_path / "c", "--clips", 0)
    assert status == 0 and "1 videos were tracked now" in out, err
    assert shown(tmp_path / "c")["sequences"] == [sequence]


def test_an_older_run_needs_its_curriculum_file(room: Path, stage: Path, motip: Motip, tmp_path: Path) -> None:
    kept = (stage / "job.json").read_bytes()
    (stage / "job.json").unlink()
    try:
        status, _, err = motip("report", "errors", stage, "--out", tmp_path / "a")
        assert status == 2 and "--config" in err and err.count("error:") == 1
        config = room / "curriculum.yaml"
        status, _, err = motip("report", "errors", stage, "--out", tmp_path / "a", "--config", config, "--clips", 0)
        assert status == 0, err
    finally:
        (stage / "job.json").write_bytes(kept)


def test_a_checkpoint_with_other_classes_is_refused(room: Path, stage: Path, motip: Motip, tmp_path: Path) -> None:
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
    ("options", "told"),
    [
        (["--out", "{file}/sub"], "output folder cannot be written"),
        (["--split", "test"], "no test videos"),
        (["--sources", "aerial"], "not judged on such a source"),
    ],
)
def test_wrong_options_are_one_message_each(
    stage: Path, motip: Motip, tmp_path: Path, options: list[str], told: str
) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = motip("report", "errors", stage, *(each.format(file=tmp_path / "file") for each in options))
    assert status == 2 and told in err and err.count("error:") == 1


def test_what_is_no_run_is_said(room: Path, motip: Motip, tmp_path: Path) -> None:
    for place, told in (
        (tmp_path / "nowhere", "there is no such run"),
        (room / "storage" / "shards", "does not stand for one run"),
        ("0" * 32, "no such run"),
    ):
        status, _, err = motip("report", "errors", place, "--storage", room / "storage", "--out", tmp_path / "a")
        assert status == 2 and told in err and err.count("error:") == 1
