"""Rules of each evaluation protocol on hand-made cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from motip.data.sequence import UNTRACKED, ClassMap, Frame, Sequence
from motip.errors import MotipError
from motip.evaluation.metrics import score
from motip.evaluation.protocols import (
    BDD100K_CLASSES,
    PROTOCOLS,
    VISDRONE_CLASSES,
    ScoredSequence,
    find_protocol,
    scored_sequence,
    split_class_flips,
)
from motip.evaluation.regions import box_iou, match, share_in_one, share_in_union
from tests.helpers.track_rows import random_rows, rows

PLAN = ClassMap(("pedestrian", "car"), {"pedestrian": ("pedestrian", "people"), "car": ("car", "van")})
CAR = ClassMap(("pedestrian", "car"), {"pedestrian": ("pedestrian",), "car": ("car",)})


def _frame(number: int, *labels: tuple[str, int, tuple[float, ...], bool]) -> Frame:
    count = len(labels)
    return Frame(
        number,
        None,
        np.array([box for _, _, box, _ in labels], np.float32).reshape(-1, 4),
        np.array([track_id for _, track_id, _, _ in labels], np.int64),
        tuple(category for category, _, _, _ in labels),
        np.array([ignore for _, _, _, ignore in labels], bool),
        np.zeros(count, np.int8),
        np.zeros(count, np.int8),
    )


def _sequence(*frames: Frame) -> Sequence:
    return Sequence("s", "any", "val", 30.0, 200, 200, frames)


LEFT, RIGHT = (0.0, 0.0, 10.0, 10.0), (100.0, 0.0, 110.0, 10.0)


def test_half_a_box_in_two_overlapping_regions() -> None:
    """The union counts the overlap once: 0..4 and 2..6 cover 6 of 10 columns, not 8; each alone covers 4."""
    box = np.array([[0.0, 0.0, 10.0, 10.0]])
    regions = np.array([[0.0, 0.0, 4.0, 10.0], [2.0, 0.0, 6.0, 10.0]])
    assert share_in_union(box, regions) == pytest.approx([0.6])
    assert share_in_one(box, regions) == pytest.approx([0.4])
    assert share_in_union(box, np.zeros((0, 4))).tolist() == [0.0]
    assert share_in_union(np.zeros((0, 4)), regions).shape == (0,)
    assert share_in_union(np.array([[5.0, 5.0, 5.0, 9.0]]), regions).tolist() == [0.0]


def test_union_equals_counting_pixels() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        corner = rng.integers(0, 30, (6, 2))
        regions = np.concatenate([corner, corner + rng.integers(1, 15, (6, 2))], 1)
        covered = np.zeros((64, 64), bool)
        for x1, y1, x2, y2 in regions:
            covered[y1:y2, x1:x2] = True
        corner = rng.integers(0, 30, (5, 2))
        boxes = np.concatenate([corner, corner + rng.integers(1, 20, (5, 2))], 1)
        expected = [covered[y1:y2, x1:x2].mean() for x1, y1, x2, y2 in boxes]
        np.testing.assert_allclose(share_in_union(boxes.astype(float), regions.astype(float)), expected, atol=1e-12)


def test_iou_and_matching() -> None:
    boxes = np.array([[0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 15.0, 10.0], [3.0, 3.0, 3.0, 9.0]])
    assert box_iou(boxes, boxes) == pytest.approx(np.array([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]]))
    rows_, columns = match(np.array([[0.6, 0.9], [0.0, 0.55]]))
    assert (rows_.tolist(), columns.tolist()) == ([0, 1], [0, 1])
    assert match(np.array([[0.4]]))[0].tolist() == []
    assert match(np.zeros((0, 3)))[0].tolist() == []


def test_plain_ignores_unmatched_predictions_on_unmapped_categories() -> None:
    sequence = _sequence(
        _frame(0, ("car", 1, LEFT, False), ("bus", 2, RIGHT, False)),
        _frame(1, ("car", 1, LEFT, False), ("car", 3, RIGHT, True)),
        _frame(2, ("car", 1, LEFT, False), ("car", UNTRACKED, RIGHT, False)),
    )
    pred = rows(*[(frame, number, *box, 1) for frame in range(3) for number, box in ((5, LEFT), (6, RIGHT))])
    scores = score([scored_sequence(sequence, PLAN, pred)], PLAN.names)
    assert scores.class_averaged["HOTA"] == pytest.approx(100.0)
    assert scores.removed == {"predictions in ignored regions": 3}


def test_matched_prediction_inside_a_region_counts() -> None:
    """Regions apply after matching: one around an object removes neither its match nor its miss."""
    sequence = _sequence(_frame(0, ("car", 1, LEFT, False), ("bus", 2, (0.0, 0.0, 50.0, 50.0), False)))
    hit = scored_sequence(sequence, PLAN, rows((0, 1, *LEFT, 1)))
    miss = scored_sequence(sequence, PLAN, rows())
    assert score([hit], PLAN.names).per_class["car"]["TP"] == 1
    assert score([miss], PLAN.names).per_class["car"]["FN"] == 1


def test_exactly_half_is_ignored_in_plain_but_not_in_bdd100k() -> None:
    half = (5.0, 0.0, 15.0, 10.0)
    labels = (("car", 1, RIGHT, False), ("trailer", 2, LEFT, False))
    pred = rows((0, 1, *RIGHT, 1), (0, 2, *half, 1))
    for protocol, false_positives in (("plain", 0), ("bdd100k", 1)):
        scored = scored_sequence(_sequence(_frame(0, *labels)), CAR, pred, protocol)
        assert score([scored], CAR.names, protocol).per_class["car"]["FP"] == false_positives


def test_bdd100k_counts_predictions_on_other_classes() -> None:
    sequence = _sequence(_frame(0, ("car", 1, LEFT, False), ("truck", 2, RIGHT, False)))
    pred = rows((0, 1, *LEFT, 1), (0, 2, *RIGHT, 1))
    assert score([scored_sequence(sequence, CAR, pred, "bdd100k")], CAR.names, "bdd100k").per_class["car"]["FP"] == 1


def test_visdrone_drops_both_sides_before_matching() -> None:
    """Category-11 and category-0 regions cover 60 % of the left object: it does not count, matched or missed."""
    sequence = _sequence(
        _frame(
            0,
            ("car", 1, LEFT, False),
            ("car", 2, RIGHT, False),
            ("others", 3, (0.0, 0.0, 4.0, 10.0), True),
            ("ignored-regions", UNTRACKED, (2.0, 0.0, 6.0, 10.0), True),
        )
    )
    pred = rows((0, 8, *LEFT, 1), (0, 9, *RIGHT, 1))
    scores = score([scored_sequence(sequence, PLAN, pred, "visdrone")], PLAN.names, "visdrone")
    assert scores.per_class["car"]["GT"] == scores.per_class["car"]["TP"] == 1
    assert scores.removed == {"ground truth in ignored regions": 1, "predictions in ignored regions": 1}
    missed = score([scored_sequence(sequence, PLAN, rows((0, 9, *RIGHT, 1)), "visdrone")], PLAN.names, "visdrone")
    assert missed.per_class["car"]["FN"] == 0


def test_visdrone_splits_a_track_that_changes_class() -> None:
    names = ["pedestrian", "pedestrian", "car", "car", "pedestrian"]
    sequence = _sequence(*[_frame(number, (name, 7, LEFT, False)) for number, name in enumerate(names)])
    prepared = scored_sequence(sequence, PLAN, rows(), "visdrone")
    ids = prepared.gt.track_ids.tolist()
    assert ids[0] == ids[1] == 7
    assert len({ids[0], ids[2], ids[4]}) == 3
    assert ids[2] == ids[3]
    assert set(scored_sequence(sequence, PLAN, rows(), "plain").gt.track_ids.tolist()) == {7}


def test_split_class_flips_keeps_other_tracks_and_creates_unique_ids() -> None:
    truth = random_rows(4)
    assert split_class_flips(truth) is truth
    flipping = replace(truth, class_ids=(truth.frames // 5 + truth.track_ids) % 2)
    split = split_class_flips(flipping)
    for track_id in np.unique(split.track_ids):
        own = split.track_ids == track_id
        assert len(np.unique(split.class_ids[own])) == 1
        assert len(np.unique(truth.track_ids[own])) == 1
    segments = sum(
        1 + int((np.diff(flipping.class_ids[truth.track_ids == number]) != 0).sum())
        for number in np.unique(truth.track_ids)
    )
    assert len(np.unique(split.track_ids)) == segments


def test_visdrone_cuts_after_the_last_label_and_skips_absent_classes() -> None:
    sequence = _sequence(_frame(0, ("car", 1, LEFT, False)), _frame(1, ("car", 1, LEFT, False)), _frame(2))
    pred = rows((0, 1, *LEFT, 1), (1, 1, *LEFT, 1), (0, 2, *RIGHT, 0), (2, 1, *LEFT, 1), (3, 1, *LEFT, 1))
    scores = score([scored_sequence(sequence, PLAN, pred, "visdrone")], PLAN.names, "visdrone")
    assert scores.per_class["car"]["MOTA"] == pytest.approx(100.0)
    assert scores.per_class["pedestrian"]["FP"] == 0
    assert scores.removed == {"predictions cut": 2, "predictions of classes absent from a sequence": 1}


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_undefined_class_lists_are_an_error(name: str) -> None:
    protocol = find_protocol(name)
    for allowed in protocol.class_lists:
        protocol.check_classes(tuple(reversed(allowed)))
    with pytest.raises(MotipError):
        protocol.check_classes(("car", "car"))
    if protocol.class_lists:
        with pytest.raises(MotipError, match="not defined for these classes"):
            protocol.check_classes(("car", "dog"))


def test_partial_class_lists_are_an_error() -> None:
    truth = random_rows(0, classes=1)
    for protocol, classes in (("bdd100k", BDD100K_CLASSES[:3]), ("visdrone", VISDRONE_CLASSES[:4])):
        with pytest.raises(MotipError, match="not defined for these classes"):
            score([ScoredSequence("s", truth, truth)], classes, protocol)
