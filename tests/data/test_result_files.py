"""Result files: round trips, bytes on disk, errors for files that count from 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motip.data.formats.result_files import read_mot, write_bdd100k, write_mot, write_visdrone
from motip.data.sequence import TrackRows
from motip.errors import MotipError

NAMES = ("pedestrian", "car", "bus")


@st.composite
def track_rows(draw: st.DrawFn) -> TrackRows:
    keys = draw(st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 10**6)), unique=True, max_size=30))
    keys.sort()
    coordinate = st.floats(-2000, 8000, width=32)
    count = len(keys)
    corners = np.array(
        [
            draw(st.tuples(coordinate, coordinate, st.floats(0, 4000, width=32), st.floats(0, 4000, width=32)))
            for _ in keys
        ],
        np.float32,
    ).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    scores = draw(st.lists(st.floats(0, 1, width=32), min_size=count, max_size=count))
    classes = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    return TrackRows(
        np.array([frame for frame, _ in keys], np.int64),
        np.array([track for _, track in keys], np.int64),
        corners,
        np.array(scores, np.float32),
        np.array(classes, np.int64),
    )


def assert_equal(found: TrackRows, expected: TrackRows, pixels: float) -> None:
    np.testing.assert_array_equal(found.frames, expected.frames)
    np.testing.assert_array_equal(found.track_ids, expected.track_ids)
    np.testing.assert_array_equal(found.class_ids, expected.class_ids)
    np.testing.assert_allclose(found.boxes_xyxy, expected.boxes_xyxy, rtol=0, atol=pixels)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(rows=track_rows())
def test_round_trips(rows: TrackRows, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tracks")
    write_mot(folder / "s.txt", rows)
    assert_equal(read_mot(folder / "s.txt"), rows, 1e-3)
    write_visdrone(folder / "v.txt", rows, (1, 4, 9))
    assert_equal(_visdrone(folder / "v.txt", (1, 4, 9)), rows, 1e-3)
    write_bdd100k(folder / "b.json", {"v": rows, "empty": TrackRows.empty()}, NAMES, {"empty": [0, 1], "v": [3]})
    frames = json.loads((folder / "b.json").read_text())
    assert_equal(_scalabel(frames, "v"), rows, 0)
    assert len(_scalabel(frames, "empty").frames) == 0


def _visdrone(path: Path, categories: tuple[int, ...]) -> TrackRows:
    table = np.array([line.split(",") for line in path.read_text().splitlines()], np.float64).reshape(-1, 10)
    boxes = np.hstack([table[:, 2:4], table[:, 2:4] + table[:, 4:6]])
    classes = np.array([categories.index(int(number)) for number in table[:, 7]], np.int64)
    return TrackRows(table[:, 0] - 1, table[:, 1] - 1, boxes, table[:, 6], classes)


def _scalabel(frames: list[dict[str, Any]], video: str) -> TrackRows:
    labels = [
        (frame["frameIndex"], int(label["id"]) - 1, [*label["box2d"].values()], label["score"], label["category"])
        for frame in frames
        if frame["videoName"] == video
        for label in frame["labels"]
    ]
    numbers, ids, boxes, scores, names = zip(*labels, strict=True) if labels else [()] * 5
    classes = np.array([NAMES.index(name) for name in names], np.int64)
    return TrackRows(*map(np.array, (numbers, ids)), np.array(boxes).reshape(-1, 4), np.array(scores), classes)


def one_row() -> TrackRows:
    return TrackRows(
        *(np.array([n], np.int64) for n in (0, 4)),
        np.array([[1, 2, 11, 22]], np.float32),
        np.array([0.5], np.float32),
        np.array([1]),
    )


def test_bytes_on_disk(tmp_path: Path) -> None:
    write_mot(tmp_path / "s.txt", one_row())
    assert (tmp_path / "s.txt").read_text() == "1,5,1.0000,2.0000,10.0000,20.0000,0.500000,2,-1\n"
    write_visdrone(tmp_path / "v.txt", one_row(), (1, 4))
    assert (tmp_path / "v.txt").read_text() == "1,5,1.0000,2.0000,10.0000,20.0000,0.500000,4,-1,-1\n"
    write_bdd100k(tmp_path / "b.json", {"clip": one_row()}, NAMES, {"clip": range(2)})
    first, second = json.loads((tmp_path / "b.json").read_text())
    assert (first["name"], first["videoName"], first["frameIndex"]) == ("clip-0000001.jpg", "clip", 0)
    assert first["labels"] == [
        {"id": "5", "category": "car", "score": 0.5, "box2d": {"x1": 1.0, "y1": 2.0, "x2": 11.0, "y2": 22.0}}
    ]
    assert (second["frameIndex"], second["labels"]) == (1, [])


def test_empty_result_is_an_empty_file(tmp_path: Path) -> None:
    write_mot(tmp_path / "s.txt", TrackRows.empty())
    assert (tmp_path / "s.txt").read_text() == ""
    assert len(read_mot(tmp_path / "s.txt", default_class=0)) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0,1,5,5,9,9,1,1,-1", "frame number is not an integer >= 1"),
        ("1,0,5,5,9,9,1,1,-1", "track id is not an integer >= 1"),
        ("1,1,5,5,9,9,1,0,-1", "class is not an integer >= 1"),
        ("1,1,5,5,9,9,1,-1,-1,-1", "rows without a class"),
        ("1,1,5,nan,9,9,1,1,-1", "not a finite number"),
    ],
)
def test_numbers_from_zero_and_missing_classes_are_errors(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "s.txt"
    path.write_text(line + "\n")
    with pytest.raises(MotipError, match=message):
        read_mot(path)


def test_baseline_predictions_without_class(samples_dir: Path) -> None:
    rows = read_mot(samples_dir / "mot15" / "TUD-Campus" / "predictions.txt", default_class=0)
    assert len(rows) > 100
    assert set(rows.class_ids.tolist()) == {0}
    assert rows.frames.min() == 0
    assert set(rows.scores.tolist()) == {1.0}


def test_unknown_categories_and_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(MotipError, match="categories 1 to 10"):
        write_visdrone(tmp_path / "v.txt", one_row(), (0, 4))
    with pytest.raises(MotipError, match="no such file"):
        read_mot(tmp_path / "none")


def test_unreadable_numbers_are_not_written(tmp_path: Path) -> None:
    rows = one_row()
    rows.track_ids[0] = -1
    with pytest.raises(MotipError, match="id number is negative"):
        write_mot(tmp_path / "s.txt", rows)
    assert list(tmp_path.iterdir()) == []
