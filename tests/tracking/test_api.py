"""Public API: `track` on files, arrays and loaded models."""

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
from motip.tracking.api import track, track_sequence
from motip.tracking.detections import Detections
from motip.tracking.loading import load
from motip.weights.export import export_safetensors
from tests.helpers.small_dataset import write_checkpoint, write_curriculum
from tests.helpers.videos import write_images, write_video

EASY = {"det_thresh": 0.02, "newborn_thresh": 0.02, "device": "cpu"}
"""Thresholds at which random weights give detections."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """A checkpoint, its stage file, the same weights exported, a video, and images."""
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
def test_iterator_gives_the_tracks_of_track_sequence(data: Path, checkpoint: str) -> None:
    tracking = track(data / "in.mp4", data / checkpoint, **EASY)  # type: ignore[arg-type]
    assert iter(tracking) is tracking and tracking.source.frames == 7
    found = frames(tracking)
    assert [each.frame for each in found] == list(range(7))
    loaded = load(data / checkpoint, **EASY)  # type: ignore[arg-type]
    expected = track_sequence(loaded.model, open_source(str(data / "in.mp4")), loaded.settings).rows
    assert np.concatenate([each.track_ids for each in found]).tolist() == expected.track_ids.tolist()
    assert np.array_equal(np.concatenate([each.boxes_xyxy for each in found]), expected.boxes_xyxy)
    assert np.array_equal(np.concatenate([each.scores for each in found]), expected.scores)
    assert np.array_equal(tracking.result.rows.boxes_xyxy, expected.boxes_xyxy)
    for each in found:
        assert each.image.shape == (96, 160, 3) and each.image.dtype == np.uint8
        assert set(each.classes) <= {"pedestrian", "car"} and len(each.classes) == len(each)
        np.testing.assert_allclose(each.boxes_xywh[:, 2:], each.boxes_xyxy[:, 2:] - each.boxes_xyxy[:, :2])
        assert np.array_equal(each.boxes_xywh[:, :2], each.boxes_xyxy[:, :2])


def test_result_covers_the_frames_so_far_without_read_ahead(data: Path) -> None:
    tracking = track(data / "in.mp4", data / "tiny.pth", **EASY)  # type: ignore[arg-type]
    assert tracking.result.num_frames == 0
    first = next(tracking)
    next(tracking)
    assert tracking.result.num_frames == 2
    assert (tracking.result.rows.frames < 2).all() and len(tracking.result.rows) >= len(first)


def test_image_pattern_frame_range_and_configuration_file(data: Path) -> None:
    found = frames(
        track(data / "seq/img1/%08d.png", data / "tiny.pth", data / "stage.yaml", start_frame=5, end_frame=7, **EASY)  # type: ignore[arg-type]
    )
    assert [each.frame for each in found] == [4, 5, 6], "images keep the numbers in their names"
    with_config = track(data / "in.mp4", data / "tiny.pth", load_config(data / "stage.yaml"), **EASY)  # type: ignore[arg-type]
    assert len(frames(with_config)) == 7


def test_reidentified_tracks_are_marked_as_recalled(data: Path) -> None:
    settings = EASY | {"miss_tolerance": 0, "longterm_patience": 20, "longterm_similarity": -1.0}
    tracking = track(data / "in.mp4", data / "tiny.pth", **settings)  # type: ignore[arg-type]
    known: set[int] = set()
    recalled = 0
    for found in tracking:
        assert not (found.recalled & found.newborn).any()
        assert set(found.track_ids[found.recalled].tolist()) <= known
        assert not set(found.track_ids[found.newborn].tolist()) & known
        known.update(found.track_ids.tolist())
        recalled += int(found.recalled.sum())
    assert recalled == tracking.result.counters["recalled"] > 0


def test_json_frame_equals_the_detections(data: Path) -> None:
    for found in frames(track(data / "in.mp4", data / "tiny.pth", **EASY)):  # type: ignore[arg-type]
        stored = json.loads(json.dumps(found.to_json(12.0)))
        assert (stored["frame"], stored["width"], stored["height"]) == (found.frame + 1, 160, 96)
        assert stored["time_s"] == pytest.approx(found.frame / 12, abs=1e-4)
        assert [each["id"] for each in stored["tracks"]] == (found.track_ids + 1).tolist()
        assert [each["class"] for each in stored["tracks"]] == found.classes
        assert [each["new"] for each in stored["tracks"]] == found.newborn.tolist()
        for each, box, score in zip(stored["tracks"], found.boxes_xywh, found.scores, strict=True):
            assert each["box_xywh"] == pytest.approx(box.tolist(), abs=0.0051)
            assert each["score"] == pytest.approx(float(score), abs=1e-4)


def test_supervision_conversion_keeps_all_fields(data: Path) -> None:
    supervision = pytest.importorskip("supervision", reason="the optional package supervision is not installed")
    (found, *_) = frames(track(data / "in.mp4", data / "tiny.pth", **EASY))  # type: ignore[arg-type]
    taken = found.to_supervision()
    assert isinstance(taken, supervision.Detections) and len(taken) == len(found) > 0
    np.testing.assert_allclose(taken.xyxy, found.boxes_xyxy)
    np.testing.assert_allclose(taken.confidence, found.scores)
    assert taken.tracker_id.tolist() == found.track_ids.tolist()
    assert taken.class_id.tolist() == found.class_ids.tolist()
    assert taken.data["class_name"].tolist() == found.classes
    annotated = supervision.BoxAnnotator().annotate(found.image.copy(), taken)
    assert (annotated != found.image).any()


def test_missing_supervision_package_is_an_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    found = next(track(data / "in.mp4", data / "tiny.pth", **EASY))  # type: ignore[arg-type]
    with pytest.raises(MotipError, match="pip install supervision"):
        found.to_supervision()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"video": "gone.mp4"}, "no such video"),
        ({"video": "stage.yaml"}, "cannot be opened"),
        ({"checkpoint": "gone.pth"}, "does not exist"),
        ({"config": "gone.yaml"}, "configuration file not found"),
        # Checked before the checkpoint is read.
        ({"checkpoint": "gone.pth", "device": "cuda:99"}, "no such device"),
        ({"checkpoint": "gone.pth", "colour": 3}, "no such setting"),
        ({"det_thresh": 7.0}, "DET_THRESH"),
        ({"start_frame": 3, "end_frame": 2}, "frame range is empty"),
    ],
)
def test_invalid_arguments_are_errors_before_the_first_frame(
    data: Path, changed: dict[str, object], message: str
) -> None:
    values: dict[str, object] = {"video": "in.mp4", "checkpoint": "tiny.pth", **EASY, **changed}
    named = {key: data / str(values[key]) for key in ("video", "checkpoint", "config") if key in values}
    with pytest.raises(MotipError, match=message):
        track(**(values | named))  # type: ignore[arg-type]


def test_arrays_and_a_loaded_model_give_the_tracks_of_the_files(data: Path) -> None:
    loaded = load(data / "tiny.pth", **EASY)  # type: ignore[arg-type]
    images = [image for _, image in open_source(str(data / "in.mp4"))]
    from_arrays = frames(track(images, loaded))
    from_file = frames(track(data / "in.mp4", data / "tiny.pth", **EASY))  # type: ignore[arg-type]
    assert [each.frame for each in from_arrays] == [each.frame for each in from_file]
    for one, other in zip(from_arrays, from_file, strict=True):
        assert np.array_equal(one.boxes_xyxy, other.boxes_xyxy) and np.array_equal(one.track_ids, other.track_ids)
    assert track(images, loaded, det_thresh=0.5).settings.det_thresh == 0.5
    assert loaded.settings.det_thresh == EASY["det_thresh"], "the loaded model keeps its settings"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_frame": 2}, "start_frame does not apply"),
        ({"fps": 25.0}, "fps does not apply"),
        ({"config": "stage.yaml"}, "config does not apply"),
        ({"device": "cpu"}, "device does not apply"),
        ({"colour": 3}, "no such setting"),
    ],
)
def test_arguments_that_cannot_apply_are_an_error(data: Path, arguments: dict[str, object], message: str) -> None:
    loaded = load(data / "tiny.pth")
    with pytest.raises(MotipError, match=message):
        track([], loaded, **arguments)  # type: ignore[call-overload]


def test_importing_the_api_loads_only_torch() -> None:
    code = (
        "import motip.tracking.api, sys; "
        "print([m for m in ('ray', 'mlflow', 'cv2', 'pyarrow', 'pydantic', 'yaml', 'av', "
        "'supervision') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_missing_configuration_keys_get_defaults() -> None:
    from motip.config import Config
    from motip.tracking.settings import TrackerSettings

    assert TrackerSettings.from_keys({}) == TrackerSettings.from_config(Config())
    assert TrackerSettings.from_keys({"DET_THRESH": 0.4, "LR": 1.0}).det_thresh == 0.4
