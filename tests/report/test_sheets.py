"""Failure sheets drawn at the end of training: from stored tracks, of a subset of videos, in an object store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from motip.cli import launch
from motip.config import load_curriculum
from motip.curriculum import Options
from motip.errors import MotipError
from motip.report import tracked_run
from motip.report.stage_list import read_stage_list
from motip.report.tracked_run import RunOptions, draw_missing_sheets, load_stored_run, load_tracked_run
from motip.storage.paths import Location, RemotePath, location, read_json, upload
from tests.conftest import Motip
from tests.helpers.object_store import object_store
from tests.helpers.report_curriculum import ReportedCurriculum


@pytest.fixture
def copied(reported: ReportedCurriculum, tmp_path: Path) -> Path:
    """A copy of the curriculum's folder in a separate storage, without failure sheets."""
    storage = tmp_path / "storage"
    shutil.copytree(reported.folder.parent.parent, storage, ignore=shutil.ignore_patterns("mlflow", "failures*"))
    return storage / "curricula" / reported.folder.name


def stages(folder: Location) -> dict[str, Location]:
    return {name: place for name, place in read_stage_list(folder).folders.items() if place is not None}


def remove_tracks(folder: Path, stage: Path, keep: int) -> None:
    """Remove the stored tracks of the stage's videos except ``keep`` of each source."""
    digest = json.loads((stage / "stage.json").read_text())["sha256"][:12]
    for source in (folder.parent.parent / "evaluations" / digest / "tracks").iterdir():
        for facts in sorted(source.rglob("*.json"))[keep:]:
            facts.unlink()


def test_sheet_shows_videos_with_stored_tracks_without_loading_a_model(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("stored tracks need no model")

    monkeypatch.setattr(tracked_run, "load", fail)
    found = {name: Path(str(place)) for name, place in stages(copied).items()}
    remove_tracks(copied, found["BDD-Refinement"], 2)
    remove_tracks(copied, found["Vis-Adaptation"], 0)
    draw_missing_sheets(copied, RunOptions())
    indexes = {name: own / "failures_val" / "errors.json" for name, own in found.items()}
    drawn = sorted(name for name, path in indexes.items() if path.is_file())
    assert drawn == ["BDD-Foundation", "BDD-Refinement", "Vis-Specialist"]
    assert "Vis-Adaptation: no failure sheet: no tracks of its val videos are stored" in capsys.readouterr().out
    some, every = read_json(indexes["BDD-Refinement"]), read_json(indexes["BDD-Foundation"])
    assert some["title"] == "BDD-Refinement, checkpoint_best.pth, val, 2 of 3 videos"
    assert every["title"] == "BDD-Foundation, checkpoint_best.pth, val"
    assert len(every["sequences"]) + every["sequences_without_error"] == 3
    assert len(some["sequences"]) + some["sequences_without_error"] == 2


def test_stored_run_equals_tracked_run(copied: Path) -> None:
    assert stages(copied)
    for place in stages(copied).values():
        stored = load_stored_run(place)
        usual = load_tracked_run(place, RunOptions(device="cpu"))
        assert [each.video for each in stored.entries] == [each.video for each in usual.entries]
        assert [each.counts() for each in stored.videos()] == [each.counts() for each in usual.videos()]
        assert stored.title == usual.title


@pytest.mark.parametrize(("domains", "drawn"), [({}, True), ({"videos": 1}, True), ({"score": "none"}, False)])
def test_training_draws_sheets_if_domains_were_scored(
    reported: ReportedCurriculum, monkeypatch: pytest.MonkeyPatch, domains: dict[str, object], drawn: bool
) -> None:
    curriculum = load_curriculum(reported.folder.parents[2] / "curriculum.yaml")
    curriculum = curriculum.model_copy(update={"domains": curriculum.domains.model_copy(update=domains)})
    result = SimpleNamespace(lineage=reported.lineage, run_id=reported.run_id)
    options = Options(data_root=".", storage=str(reported.folder.parent.parent), workers=0)
    called: list[object] = []
    monkeypatch.setattr(launch, "write_page", lambda *_, **__: SimpleNamespace(missing=(), path=reported.folder))
    monkeypatch.setattr(launch, "draw_missing_sheets", lambda folder, _: called.append(folder))
    launch._report_page(curriculum, options, None, result, SimpleNamespace(note=print))  # type: ignore[arg-type]
    assert called == ([reported.folder] if drawn else [])


def test_unfinished_stage_has_no_sheet(copied: Path) -> None:
    place = Path(str(stages(copied)["Vis-Specialist"]))
    record = json.loads((place / "stage.json").read_text())
    (place / "stage.json").write_text(json.dumps(record | {"status": "running"}))
    with pytest.raises(MotipError, match="not finished"):
        load_stored_run(place)


def test_sheets_and_clips_are_written_into_an_object_store(copied: Path, motip: Motip) -> None:
    with object_store() as store:
        base = location(store.uri)
        storage = copied.parent.parent
        for path in storage.rglob("*"):
            if path.is_file() and path.suffix != ".pth":
                upload(path, base / str(path.relative_to(storage)))
        folder = base / "curricula" / copied.name
        draw_missing_sheets(folder, RunOptions())
        for place in stages(folder).values():
            assert isinstance(place, RemotePath)
            sheet = (place / "failures_val" / "contact_sheet.png").read_bytes()
            picture = cv2.imdecode(np.frombuffer(sheet, np.uint8), cv2.IMREAD_COLOR)
            assert picture is not None and picture.shape[1] > 1000
            assert read_json(place / "failures_val" / "errors.json")["files"] == ["contact_sheet.png", "errors.json"]

        stage = stages(folder)["BDD-Refinement"]
        (checkpoint,) = Path(str(stages(copied)["BDD-Refinement"])).glob("checkpoint_best.pth")
        upload(checkpoint, stage / checkpoint.name)
        for clips in (2, 1):
            ran = motip("report", "errors", str(stage), "--clips", clips, "--device", "cpu")
            assert ran.status == 0, ran.err
            files = [path.name for path in (stage / "failures_val").iterdir()]
            assert sum(name.endswith(".mp4") for name in files) == clips, "videos of the previous call are removed"
        assert str(stage / "failures_val") in ran.last_line
