from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from motip.evaluation.metrics import score
from motip.evaluation.outcomes import box_outcomes
from motip.evaluation.protocols import ScoredSequence
from motip.evaluation.regions import distance_to_border
from tests.helpers.track_rows import disturbed, random_rows, rows

CLASSES = ("pedestrian", "car")


@pytest.mark.parametrize("protocol", ["plain", "bdd100k", "visdrone"])
@pytest.mark.parametrize("seed", range(6))
def test_outcome_counts_equal_the_scores(seed: int, protocol: str) -> None:
    truth = random_rows(seed, frames=30, objects=10, size=80.0)
    truth = replace(truth, frames=truth.frames + (truth.frames > 12) * 5)  # frames without any label
    sequence = ScoredSequence(
        "s",
        truth,
        disturbed(truth, seed, shift=16, switch=0.2),
        np.arange(40),
        np.repeat(np.arange(40), 2),
        np.tile(np.array([[0.0, 0.0, 120.0, 120.0], [200.0, 200.0, 300.0, 330.0]]), (40, 1)),
    )
    scores = score([sequence], CLASSES, protocol)
    for name, errors in box_outcomes(sequence, CLASSES, protocol).items():
        counts, cell = errors.counts(), scores.per_class[name]
        assert counts["identity switch"] == cell["IDSW"]
        assert counts["missed"] == cell["FN"]
        assert counts["false positive"] == cell["FP"]
        assert counts["true positive"] == counts["tracked"] + counts["identity switch"] == cell["TP"]
        assert counts["fragment"] == cell["Frag"]
        assert len(errors.switches()) == cell["IDSW"]
        wrong = sum(errors.errors_per_frame().values())
        assert wrong == counts["missed"] + counts["identity switch"] + counts["false positive"]
    assert scores.class_averaged["IDSW"] > 0 and scores.class_averaged["FN"] > 0


def test_switch_has_ids_and_gap() -> None:
    box = (0, 0, 10, 10)
    truth = rows(*[(frame, 3, *box, 0) for frame in range(6)])
    pred = rows((0, 5, *box, 0), (1, 5, *box, 0), (1, 9, 50, 50, 60, 60, 0), (4, 6, *box, 0), (5, 6, *box, 0))
    errors = box_outcomes(ScoredSequence("s", truth, pred), ("car",))["car"]
    assert errors.switches() == [{"frame": 4, "object": 3, "from": 5, "to": 6, "gap": 3}]
    assert errors.counts() == {
        "tracked": 3,
        "identity switch": 1,
        "missed": 2,
        "true positive": 4,
        "false positive": 1,
        "ignored": 0,
        "fragment": 0,
    }
    assert errors.errors_per_frame() == {1: 1, 2: 1, 3: 1, 4: 1}


def test_ignored_predictions_are_counted_separately() -> None:
    truth = rows((0, 1, 0, 0, 10, 10, 0))
    pred = rows((0, 1, 0, 0, 10, 10, 0), (0, 2, 50, 50, 60, 60, 0))
    sequence = ScoredSequence("s", truth, pred, None, np.array([0]), np.array([[40.0, 40.0, 70.0, 70.0]]))
    assert box_outcomes(sequence, ("car",))["car"].counts()["ignored"] == 1


def test_border_distance_and_density() -> None:
    truth = rows((0, 1, 5, 20, 15, 30, 0), (0, 2, -3, 20, 8, 30, 0), (1, 1, 60, 60, 99, 97, 0))
    errors = box_outcomes(ScoredSequence("s", truth, rows()), ("car",))["car"]
    assert distance_to_border(errors.gt.boxes_xyxy, 100, 100).tolist() == [5, 0, 1]
    assert errors.density(errors.gt.frames).tolist() == [2, 2, 1]
    assert errors.density(np.array([1, 2, 0])).tolist() == [1, 0, 2]
