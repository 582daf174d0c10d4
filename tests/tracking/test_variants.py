"""`track_variants`: one detector pass gives the tracks of separate runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from motip.errors import MotipError
from motip.tracking import api
from motip.tracking.api import TrackResult, track_sequence, track_variants
from motip.tracking.settings import TrackerSettings
from tests.helpers.scripted_model import following_model
from tests.parity.recipe import image

SETTINGS = TrackerSettings(
    det_thresh=0.0, newborn_thresh=0.0, id_thresh=0.1, short_side=64, max_longer=128, miss_tolerance=8
)
FRAMES = [(10 + number, image(number, 90, 120)) for number in range(5)]


def _variants() -> list[TrackerSettings]:
    """Thresholds around the median score of the untrained detector, so that each selects other detections."""
    torch.manual_seed(0)
    scores = track_sequence(following_model(vocabulary=20), FRAMES, SETTINGS).rows.scores
    middle = float(np.median(scores))
    return [
        SETTINGS,
        replace(SETTINGS, det_thresh=middle, newborn_thresh=middle),
        replace(SETTINGS, newborn_thresh=middle, miss_tolerance=1),
        replace(SETTINGS, longterm_patience=5),
    ]


def _same(one: TrackResult, other: TrackResult) -> bool:
    fields = ("frames", "track_ids", "boxes_xyxy", "scores", "class_ids")
    return all(np.array_equal(getattr(one.rows, name), getattr(other.rows, name)) for name in fields)


def test_variants_give_the_tracks_of_separate_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = _variants()
    torch.manual_seed(0)
    model = following_model(vocabulary=20)
    separate = [track_sequence(model, FRAMES, each) for each in variants]
    passes = []
    detect = api._detect

    def counted(*arguments: object) -> object:
        passes.append(1)
        return detect(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(api, "_detect", counted)
    together = track_variants(model, FRAMES, variants)
    assert len(passes) == len(FRAMES)
    for one, other in zip(separate, together, strict=True):
        assert _same(one, other) and one.counters == other.counters and one.notes == other.notes
        assert (one.num_frames, one.image_size) == (other.num_frames, other.image_size)
    assert len({len(each.rows) for each in together}) > 1, "the settings must lead to different tracks"


def test_on_detections_receives_unfiltered_detections() -> None:
    torch.manual_seed(0)
    seen = []
    track_variants(
        following_model(vocabulary=20),
        FRAMES,
        [replace(SETTINGS, det_thresh=1.0)],
        on_detections=lambda number, size, logits, boxes: seen.append((number, size, len(logits), len(boxes))),
    )
    assert seen == [(number, (90, 120), 16, 16) for number in range(10, 15)]


def test_variants_with_different_detector_settings_are_an_error() -> None:
    with pytest.raises(MotipError, match="cannot share"):
        track_variants(following_model(), FRAMES, [SETTINGS, replace(SETTINGS, short_side=32)])
    with pytest.raises(MotipError, match="no settings"):
        track_variants(following_model(), FRAMES, [])


def test_no_frames_give_an_empty_result_per_variant() -> None:
    assert [len(each.rows) for each in track_variants(following_model(), [], [SETTINGS, SETTINGS])] == [0, 0]
