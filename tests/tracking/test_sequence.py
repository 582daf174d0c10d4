from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from motip.errors import MotipError
from motip.tracking.api import TrackResult, inference_size, resize_frame, track_sequence
from motip.tracking.settings import TrackerSettings
from motip.tracking.tracker import FrameTracks
from tests.helpers.scripted_model import following_model
from tests.parity.recipe import image

SETTINGS = TrackerSettings(
    det_thresh=0.0, newborn_thresh=0.0, id_thresh=0.1, short_side=64, max_longer=128, miss_tolerance=8
)


def _frames(count: int = 5, height: int = 90, width: int = 120) -> list[tuple[int, np.ndarray]]:
    return [(10 + number, image(number, height, width)) for number in range(count)]


def _track(on_frame: Callable[[int, FrameTracks], None] | None = None) -> TrackResult:
    torch.manual_seed(0)
    return track_sequence(following_model(vocabulary=20), _frames(), SETTINGS, on_frame)


def test_inference_sizes_equal_recorded_ones(reference_dir: Path) -> None:
    path = reference_dir / "preprocess.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with np.load(path) as stored:
        cases = [case for case in stored["inference_sizes"].tolist() if case[3] >= 0]
        assert cases
        for height, width, short, longer, out_height, out_width in cases:
            assert inference_size(height, width, short, longer) == (out_height, out_width), (height, width, short)


@pytest.mark.parametrize(("height", "width", "expected"), [(2, 6000, (1, 1440)), (6000, 2, (1440, 1))])
def test_resized_side_is_at_least_one_pixel(height: int, width: int, expected: tuple[int, int]) -> None:
    assert inference_size(height, width, 800, 1440) == expected
    pixels = torch.full((3, height, width), 7, dtype=torch.uint8)
    assert resize_frame(pixels, TrackerSettings()).shape == (3, *expected)


def test_resized_pixels_are_close_to_recorded_ones(reference_dir: Path) -> None:
    """The recorded pixels were resized by PIL in fixed point: one grey level of difference is allowed."""
    path = reference_dir / "preprocess.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with np.load(path) as stored:
        cases = [key[:-4] for key in stored.files if key.startswith("inf") and key.endswith("_cfg")]
        assert cases
        for case in cases:
            height, width, short, longer, _, seed = (int(value) for value in stored[f"{case}_cfg"])
            pixels = torch.from_numpy(image(seed, height, width)).permute(2, 0, 1)
            settings = TrackerSettings(short_side=short, max_longer=longer)
            found = resize_frame(pixels, settings).float().numpy() / 255
            recorded = stored[f"{case}_tensor"].reshape(3, *stored[f"{case}_tensor"].shape[-2:])
            mean = np.array([0.485, 0.456, 0.406])[:, None, None]
            deviation = np.array([0.229, 0.224, 0.225])[:, None, None]
            recorded = (recorded * deviation + mean)[:, : found.shape[1], : found.shape[2]]
            assert np.abs(recorded - found).max() < 1.6 / 255


def test_rows_are_sorted_and_unique_with_one_class_per_track() -> None:
    result = _track()
    rows = result.rows
    assert result.num_frames == 5
    assert result.image_size == (90, 120)
    assert len(rows) > 0
    assert (np.diff(rows.frames) >= 0).all()
    assert set(rows.frames.tolist()) <= set(range(10, 15))
    assert len(set(zip(rows.frames.tolist(), rows.track_ids.tolist(), strict=True))) == len(rows)
    assert rows.boxes_xyxy.shape == (len(rows), 4)
    assert len(result.frame_class_ids) == len(rows)
    assert set(result.counters) >= {"newborns_refused", "labels_recycled"}
    assert result.fps > 0
    for track_id in set(rows.track_ids.tolist()):
        assert len(set(rows.class_ids[rows.track_ids == track_id].tolist())) == 1, "one class per track"


def test_progress_callback_is_called_after_each_frame() -> None:
    seen: list[int] = []
    _track(on_frame=lambda number, _: seen.append(number))
    assert seen == [10, 11, 12, 13, 14]


def test_bfloat16_detector_gives_finite_tracks() -> None:
    torch.manual_seed(0)
    settings = TrackerSettings(**(SETTINGS.__dict__ | {"dtype": "BF16"}))
    result = track_sequence(following_model(vocabulary=20), _frames(), settings)
    assert len(result.rows) > 0
    assert np.isfinite(result.rows.boxes_xyxy).all()


def test_sequence_without_frames_or_boxes_gives_no_rows() -> None:
    assert len(track_sequence(following_model(), [], SETTINGS).rows) == 0
    strict = TrackerSettings(**(SETTINGS.__dict__ | {"det_thresh": 1.0}))
    result = track_sequence(following_model(), _frames(2), strict)
    assert (len(result.rows), result.num_frames) == (0, 2)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([(0, np.zeros((9, 9), np.uint8))], "not an RGB image"),
        ([(0, np.zeros((9, 9, 3), np.float32))], "not an RGB image"),
        ([(0, np.zeros((90, 120, 3), np.uint8)), (1, np.zeros((90, 121, 3), np.uint8))], "differ in size"),
        ([(3, np.zeros((90, 120, 3), np.uint8)), (3, np.zeros((90, 120, 3), np.uint8))], "out of order"),
    ],
)
def test_invalid_frames_are_an_error(frames: list[tuple[int, np.ndarray]], message: str) -> None:
    with pytest.raises(MotipError, match=message):
        track_sequence(following_model(), frames, SETTINGS)
