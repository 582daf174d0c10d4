"""Failure sheets that a training draws for its page: from stored tracks alone, of some videos, in an object store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from motip.cli import launch, report_run
from motip.cli.report_page import draw_sheets
from motip.cli.report_run import judged_as_stored
from motip.config import load_curriculum
from motip.curriculum import Options
from motip.errors import MotipError
from motip.report.stage_list import read_stage_list
from motip.storage.paths import Location, RemotePath, location, put, read_json
from tests.conftest import Motip
from tests.helpers.object_store import object_store
from tests.helpers.report_curriculum import World


@pytest.fixture
def copied(world: World, tmp_path: Path) -> Path:
    """The curriculum's folder in a storage of its own, without the sheet that the world's maker left."""
    storage = tmp_path / "storage"
    shutil.copytree(world.folder.parent.parent, storage, ignore=shutil.ignore_patterns("mlflow", "failures*"))
    return storage / "curricula" / world.folder.name


def stages(folder: Location) -> dict[str, Location]:
    return {name: place for name, place in read_stage_list(folder).folders.items() if place is not None}


def forget(folder: Path, stage: Path, most: int) -> None:
    """Remove the stored tracks of the stage's videos except ``most`` of each source."""
    digest = json.loads((stage / "stage.json").read_text())["sha256"][:12]
    for source in (folder.parent.parent / "evaluations" / digest / "tracks").iterdir():
        for facts in sorted(source.rglob("*.json"))[most:]:
            facts.unlink()


def test_a_sheet_is_of_the_videos_with_stored_tracks_and_no_model_is_read(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object, **__: object) -> None:
        raise AssertionError("stored tracks need no model")

    monkeypatch.setattr(report_run, "open_checkpoint", none)
    found = {name: Path(str(place)) for name, place in stages(copied).items()}
    forget(copied, found["BDD-Refinement"], 2)
    forget(copied, found["Vis-Adaptation"], 0)
    draw_sheets(copied)
    told = {name: place / "failures_val" / "errors.json" for name, place in found.items()}
    assert sorted(name for name, path in told.items() if path.is_file()) == [
        "BDD-Foundation", "BDD-Refinement", "Vis-Specialist",
    ]  # fmt: skip
    assert "Vis-Adaptation: no failure sheet: no tracks of its val videos are stored" in capsys.readouterr().out
    some, every = read_json(told["BDD-Refinement"]), read_json(told["BDD-Foundation"])
    assert some["title"] == "BDD-Refinement, checkpoint_best.pth, val, 2 of 3 videos"
    assert every["title"] == "BDD-Foundation, checkpoint_best.pth, val"
    assert len(every["sequences"]) + every["sequences_without_error"] == 3
    assert len(some["sequences"]) + some["sequences_without_error"] == 2


def test_stored_tracks_are_judged_as_with_the_model(copied: Path) -> None:
    for place in stages(copied).values():
        stored = judged_as_stored(place)
        usual = report_run.judged(str(place), "val", None, None, str(copied.parent.parent), "cpu")
        assert [each.video for each in stored.entries] == [each.video for each in usual.entries]
        assert [each.counts() for each in stored.videos()] == [each.counts() for each in usual.videos()]
        assert stored.title == usual.title


@pytest.mark.parametrize(("domains", "drawn"), [({}, True), ({"videos": 1}, True), ({"score": "none"}, False)])
def test_a_training_ends_with_sheets_wherever_domains_were_scored(
    world: World, monkeypatch: pytest.MonkeyPatch, domains: dict[str, object], drawn: bool
) -> None:
    curriculum = load_curriculum(world.folder.parents[2] / "curriculum.yaml")
    curriculum = curriculum.model_copy(update={"domains": curriculum.domains.model_copy(update=domains)})
    result = SimpleNamespace(lineage=world.lineage, run_id=world.run_id)
    options = Options(data_root=".", storage=str(world.folder.parent.parent), workers=0)
    asked: list[object] = []
    monkeypatch.setattr(launch, "write_page", lambda *_, **__: SimpleNamespace(missing=(), path=world.folder))
    launch._report_page(curriculum, options, None, result, SimpleNamespace(note=print), asked.append)  # type: ignore[arg-type]
    assert asked == ([world.folder] if drawn else [])


def test_an_unfinished_stage_has_no_sheet(copied: Path) -> None:
    place = Path(str(stages(copied)["Vis-Specialist"]))
    record = json.loads((place / "stage.json").read_text())
    (place / "stage.json").write_text(json.dumps(record | {"status": "running"}))
    with pytest.raises(MotipError, match="not finished"):
        judged_as_stored(place)


def test_sheets_and_clips_are_written_into_an_object_store(copied: Path, motip: Motip) -> None:
    with object_store() as store:
        base = location(store.uri)
        storage = copied.parent.parent
        for path in storage.rglob("*"):
            if path.is_file() and path.suffix != ".pth":
                put(path, base / str(path.relative_to(storage)))
        folder = base / "curricula" / copied.name
        draw_sheets(folder)
        for place in stages(folder).values():
            assert isinstance(place, RemotePath)
            sheet = (place / "failures_val" / "contact_sheet.png").read_bytes()
            picture = cv2.imdecode(np.frombuffer(sheet, np.uint8), cv2.IMREAD_COLOR)
            assert picture is not None and picture.shape[1] > 1000
            assert read_json(place / "failures_val" / "errors.json")["files"] == ["contact_sheet.png", "errors.json"]

        stage = stages(folder)["BDD-Refinement"]
        (checkpoint,) = Path(str(stages(copied)["BDD-Refinement"])).glob("checkpoint_best.pth")
        put(checkpoint, stage / checkpoint.name)
        for clips in (2, 1):
            ran = motip("report", "errors", str(stage), "--clips", clips, "--device", "cpu")
            assert ran.status == 0, ran.err
            files = [path.name for path in (stage / "failures_val").iterdir()]
            assert sum(name.endswith(".mp4") for name in files) == clips, "those of the call before are removed"
        assert str(stage / "failures_val") in ran.last_line
