"""`motip.track.api.track` as a program uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from motip.config import load_config
from motip.data.video_reader import open_source
from motip.errors import MotipError
from motip.track.api import track, track_sequence
from motip.track.detections import Detections
from motip.track.loading import open_checkpoint
from motip.weights.export import export_safetensors
from tests.helpers.small_dataset import write_checkpoint, write_curriculum
from tests.helpers.videos import write_images, write_video

EASY = {"det_thresh": 0.02, "newborn_thresh": 0.02, "device": "cpu"}
"""A fresh model finds something at these."""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """A checkpoint, its stage file, the same weights exported, a video and the same frames as images."""
    root = tmp_path_factory.mktemp("track")
    write_curriculum(root / "curriculum.yaml", repo_root)
    write_checkpoint(root / "tiny.pth", root / "stage.yaml")
    export_safetensors(root / "tiny.pth", root / "exported")
    write_video(root / "in.mp4")
    write_images(root / "seq" / "img1", range(4, 9))
    return root


def frames(tracking: Iterator[Detections]) -> list[Detections]:
    found = list(tracking)
    assert sum(map(len, found)) > 0
    return found


@pytest.mark.parametrize("checkpoint", ["tiny.pth", "exported", "exported/model.safetensors"])
def test_a_video_comes_frame_by_frame_with_what_the_tracker_finds(room: Path, checkpoint: str) -> None:
    tracking = track(room / "in.mp4", room / checkpoint, **EASY)  # type: ignore[arg-type]
    assert iter(tracking) is tracking and tracking.source.frames == 7
    found = frames(tracking)
    assert [each.frame for each in found] == list(range(7))
    loaded = open_checkpoint(room / checkpoint, **EASY)  # type: ignore[arg-type]
    whole = track_sequence(loaded.model, open_source(str(room / "in.mp4")), loaded.settings).rows
    assert np.concatenate([each.track_ids for each in found]).tolist() == whole.track_ids.tolist()
    assert np.array_equal(np.concatenate([each.boxes_xyxy for each in found]), whole.boxes_xyxy)
    assert np.array_equal(np.concatenate([each.scores for each in found]), whole.scores)
    assert np.array_equal(tracking.result.rows.boxes_xyxy, whole.boxes_xyxy)
    for each in found:
        assert each.image.shape == (96, 160, 3) and each.image.dtype == np.uint8
        assert set(each.classes) <= {"pedestrian", "car"} and len(each.classes) == len(each)
        np.testing.assert_allclose(each.boxes_xywh[:, 2:], each.boxes_xyxy[:, 2:] - each.boxes_xyxy[:, :2])
        assert np.array_equal(each.boxes_xywh[:, :2], each.boxes_xyxy[:, :2])


def test_the_result_is_of_the_frames_so_far_and_no_frame_is_read_ahead(room: Path) -> None:
    tracking = track(room / "in.mp4", room / "tiny.pth", **EASY)  # type: ignore[arg-type]
    assert tracking.result.num_frames == 0
    first = next(tracking)
    next(tracking)
    assert tracking.result.num_frames == 2
    assert (tracking.result.rows.frames < 2).all() and len(tracking.result.rows) >= len(first)


def test_a_pattern_a_range_and_a_configuration_file(room: Path) -> None:
    found = frames(
        track(room / "seq/img1/%08d.png", room / "tiny.pth", room / "stage.yaml", start_frame=5, end_frame=7, **EASY)  # type: ignore[arg-type]
    )
    assert [each.frame for each in found] == [4, 5, 6], "images keep the numbers in their names"
    with_config = track(room / "in.mp4", room / "tiny.pth", load_config(room / "stage.yaml"), **EASY)  # type: ignore[arg-type]
    assert len(frames(with_config)) == 7


def test_recalled_ids_are_marked_when_they_come_back(room: Path) -> None:
    settings = EASY | {"miss_tolerance": 0, "longterm_patience": 20, "longterm_similarity": -1.0}
    tracking = track(room / "in.mp4", room / "tiny.pth", **settings)  # type: ignore[arg-type]
    known: set[int] = set()
    times = 0
    for found in tracking:
        assert not (found.recalled & found.newborn).any()
        assert set(found.track_ids[found.recalled].tolist()) <= known
        assert not set(found.track_ids[found.newborn].tolist()) & known
        known.update(found.track_ids.tolist())
        times += int(found.recalled.sum())
    assert times == tracking.result.counters["recalled"] > 0


def test_a_frame_as_json_says_what_mot_rows_say(room: Path) -> None:
    for found in track(room / "in.mp4", room / "tiny.pth", **EASY):  # type: ignore[arg-type]
        told = json.loads(json.dumps(found.to_json(12.0)))
        assert (told["frame"], told["width"], told["height"]) == (found.frame + 1, 160, 96)
        assert told["time_s"] == pytest.approx(found.frame / 12, abs=1e-4)
        assert [each["id"] for each in told["tracks"]] == (found.track_ids + 1).tolist()
        assert [each["class"] for each in told["tracks"]] == found.classes
        assert [each["new"] for each in told["tracks"]] == found.newborn.tolist()
        for each, box, score in zip(told["tracks"], found.boxes_xywh, found.scores, strict=True):
            assert each["box_xywh"] == pytest.approx(box.tolist(), abs=0.0051)
            assert each["score"] == pytest.approx(float(score), abs=1e-4)


def test_supervision_takes_the_boxes_and_draws_them(room: Path) -> None:
    supervision = pytest.importorskip("supervision", reason="supervision is not installed; it is no dependency")
    (found, *_) = frames(track(room / "in.mp4", room / "tiny.pth", **EASY))  # type: ignore[arg-type]
    taken = found.to_supervision()
    assert isinstance(taken, supervision.Detections) and len(taken) == len(found) > 0
    np.testing.assert_allclose(taken.xyxy, found.boxes_xyxy)
    np.testing.assert_allclose(taken.confidence, found.scores)
    assert taken.tracker_id.tolist() == found.track_ids.tolist()
    assert taken.class_id.tolist() == found.class_ids.tolist()
    assert taken.data["class_name"].tolist() == found.classes
    drawn = supervision.BoxAnnotator().annotate(found.image.copy(), taken)
    assert (drawn != found.image).any()


def test_without_supervision_the_package_is_named(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    found = next(track(room / "in.mp4", room / "tiny.pth", **EASY))  # type: ignore[arg-type]
    with pytest.raises(MotipError, match="pip install supervision"):
        found.to_supervision()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"video": "gone.mp4"}, "no such video"),
        ({"video": "stage.yaml"}, "cannot be opened"),
        ({"checkpoint": "gone.pth"}, "does not exist"),
        ({"config": "gone.yaml"}, "configuration file not found"),
        # Said before the checkpoint is looked for.
        ({"checkpoint": "gone.pth", "device": "cuda:99"}, "no such device"),
        ({"checkpoint": "gone.pth", "colour": 3}, "no such setting"),
        ({"det_thresh": 7.0}, "DET_THRESH"),
        ({"start_frame": 3, "end_frame": 2}, "no frame"),
    ],
)
def test_bad_arguments_are_said_by_the_call(room: Path, changed: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"video": "in.mp4", "checkpoint": "tiny.pth", **EASY, **changed}
    named = {key: room / str(values[key]) for key in ("video", "checkpoint", "config") if key in values}
    with pytest.raises(MotipError, match=message):
        track(**(values | named))  # type: ignore[arg-type]


def test_the_room_of_the_tracker_loads_no_engine() -> None:
    code = (
        "import motip.track.api, sys; print([m for m in ('ray', 'mlflow', 'cv2', 'pyarrow', 'pydantic', 'yaml', 'av', "
        "'supervision') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_a_checkpoint_without_a_key_has_its_default() -> None:
    from motip.config import Config
    from motip.track.settings import TrackerSettings

    assert TrackerSettings.from_keys({}) == TrackerSettings.from_config(Config())
    assert TrackerSettings.from_keys({"DET_THRESH": 0.4, "LR": 1.0}).det_thresh == 0.4
