from __future__ import annotations

import numpy as np
import pytest

from motip.errors import MotipError
from motip.tracking.reid import LongTermMemory
from motip.tracking.settings import TrackerSettings
from motip.tracking.tracker import Tracker
from tests.helpers.scripted_model import detections, features, following_model

EYE = np.eye(4)


def _memory(**options: float) -> LongTermMemory:
    memory = LongTermMemory(**({"patience": 10, "similarity": 0.8} | options))  # type: ignore[arg-type]
    memory.observe(np.array([7, 8]), EYE[:2])
    memory.lose(np.array([7, 8]), frame=5)
    return memory


def test_each_lost_track_is_recalled_once() -> None:
    memory = _memory()
    assert memory.recall(np.stack([EYE[1], EYE[0], EYE[0] * 3]), 6).tolist() in ([8, 7, -1], [8, -1, 7])
    assert memory.recall(EYE[:2], 7).tolist() == [-1, -1]


def test_dissimilar_features_are_not_recalled() -> None:
    memory = _memory()
    assert memory.recall(np.stack([EYE[2], EYE[0] + EYE[1]]), 6).tolist() == [-1, -1]
    assert len(memory) == 2


def test_tracks_are_not_recalled_after_patience() -> None:
    assert _memory().recall(EYE[:1], 15).tolist() == [7]
    assert _memory().recall(EYE[:1], 16).tolist() == [-1]


def test_full_gallery_drops_the_track_lost_longest_ago() -> None:
    memory = _memory(capacity=2)
    memory.observe(np.array([9]), EYE[2:3])
    memory.lose(np.array([9]), 6)
    assert memory.recall(EYE[:3], 7).tolist() == [-1, 8, 9]


def test_invalid_options_are_an_error() -> None:
    with pytest.raises(MotipError, match="patience"):
        LongTermMemory(patience=0)


@pytest.mark.parametrize(("capacity", "expected"), [(2, [0, 1]), (1, [2, 1])])
def test_tracker_applies_longterm_capacity(capacity: int, expected: list[int]) -> None:
    appearance = features(4)
    settings = TrackerSettings(newborn_thresh=0.5, miss_tolerance=1, longterm_patience=50, longterm_capacity=capacity)
    tracker = Tracker(following_model(), settings, (100, 100))
    assert tracker.update(*detections([0], appearance)).ids.tolist() == [0]
    for _ in range(5):
        tracker.update(*detections([], appearance))
    assert tracker.update(*detections([1], appearance)).ids.tolist() == [1]
    for _ in range(5):
        tracker.update(*detections([], appearance))
    assert tracker.update(*detections([0, 1], appearance)).ids.tolist() == expected
    assert any(f"at most {capacity} tracks" in note for note in tracker.notes)


@pytest.mark.parametrize(("patience", "expected"), [(0, 1), (6, 0), (2, 1)])
def test_tracker_recalls_an_id_only_with_long_term_memory(patience: int, expected: int) -> None:
    appearance = features(4)
    settings = TrackerSettings(newborn_thresh=0.5, miss_tolerance=1, longterm_patience=patience)
    tracker = Tracker(following_model(), settings, (100, 100))
    assert tracker.update(*detections([0], appearance)).ids.tolist() == [0]
    for _ in range(5):
        assert len(tracker.update(*detections([], appearance))) == 0
    assert tracker.update(*detections([0], appearance)).ids.tolist() == [expected]
    assert any("long-term memory" in note for note in tracker.notes) == (patience > 0)
    assert tracker.counters["recalled"] == int(patience == 6)


def test_recalled_track_can_be_lost_and_recalled_again() -> None:
    appearance = features(4)
    settings = TrackerSettings(newborn_thresh=0.5, miss_tolerance=1, longterm_patience=50)
    tracker = Tracker(following_model(), settings, (100, 100))
    for _ in range(3):
        assert tracker.update(*detections([0], appearance)).ids.tolist() == [0]
        for _ in range(4):
            tracker.update(*detections([], appearance))
