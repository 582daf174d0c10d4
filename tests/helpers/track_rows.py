"""Track rows for tests, one tuple per box."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from motip.data.sequence import TrackRows


def rows(*boxes: tuple[float, ...]) -> TrackRows:
    """Each box is (frame, id, x1, y1, x2, y2, class id); coordinates are float64 and not rounded."""
    table = np.array(boxes, np.float64).reshape(-1, 7)
    return TrackRows(
        table[:, 0].astype(np.int64),
        table[:, 1].astype(np.int64),
        table[:, 2:6],
        np.ones(len(table), np.float32),
        table[:, 6].astype(np.int64),
    )


def random_rows(seed: int, frames: int = 20, objects: int = 8, classes: int = 2, size: float = 60.0) -> TrackRows:
    """Objects on straight lines, each in about 85 % of the frames."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 300, (objects, 2))
    speed = rng.uniform(-4, 4, (objects, 2))
    class_ids = rng.integers(0, classes, objects)
    boxes = []
    for frame in range(frames):
        for number in range(objects):
            if rng.random() < 0.85:
                x, y = start[number] + frame * speed[number]
                boxes.append((frame, number, x, y, x + size, y + size, class_ids[number]))
    return rows(*boxes)


def disturbed(truth: TrackRows, seed: int, shift: float = 8.0, switch: float = 0.05, spare: int = 3) -> TrackRows:
    """Imperfect tracks of `truth`: shifted boxes, misses, identity switches, false positives."""
    rng = np.random.default_rng(seed)
    keep = rng.random(len(truth)) < 0.9
    ids = truth.track_ids * 10
    for number in np.unique(truth.track_ids):
        own = np.flatnonzero(truth.track_ids == number)
        ids[own] += np.cumsum(rng.random(len(own)) < switch)
    boxes = truth.boxes_xyxy + rng.normal(0, shift, (len(truth), 1))
    table = [
        (frame, track_id, *box, class_id)
        for frame, track_id, box, class_id in _select(truth.frames, ids, boxes, truth.class_ids, keep)
    ]
    for number in range(spare):
        for frame in range(int(truth.frames.max()) + 1):
            x, y = rng.uniform(0, 300, 2)
            table.append((frame, 9000 + number, x, y, x + 50, y + 50, number % (int(truth.class_ids.max()) + 1)))
    return rows(*table)


def _select(
    frames: np.ndarray, ids: np.ndarray, boxes: np.ndarray, class_ids: np.ndarray, keep: np.ndarray
) -> Iterable[tuple[int, int, np.ndarray, int]]:
    return zip(frames[keep].tolist(), ids[keep].tolist(), boxes[keep].tolist(), class_ids[keep].tolist(), strict=True)
