from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from motip.errors import MotipError
from motip.evaluation.bootstrap import AGNOSTIC, ALL_BOXES, MEAN, combine_resamples, resample_weights
from motip.evaluation.comparison import compare, sequence_counts
from motip.evaluation.metrics import SequenceCounts, combine, score, score_sequence
from motip.evaluation.protocols import ScoredSequence
from motip.evaluation.scores import Scores
from tests.helpers.track_rows import disturbed, random_rows, rows

CLASSES = ("pedestrian", "car", "bus")


def _sequences(number: int, shift: float = 8.0, seed: int = 0, switch: float = 0.05) -> list[ScoredSequence]:
    """Sequences with predictions; the first has no car, and none has a bus."""
    sequences = []
    for index in range(number):
        truth = random_rows(100 + index, objects=6, classes=1 if index == 0 else 2)
        pred = disturbed(truth, 7 * seed + index, shift, switch)
        sequences.append(ScoredSequence(f"s{index}", truth, pred))
    return sequences


def _scores(number: int = 12, **options: float) -> Scores:
    return score(_sequences(number, **options), CLASSES)  # type: ignore[arg-type]


def test_difference_of_equal_scores_is_zero() -> None:
    scores = _scores()
    comparison = compare(scores, scores, resamples=200)
    assert comparison.sequences == 12 and comparison.notes == ()
    for each in comparison.differences:
        if each.row == "bus" and each.metric == "HOTA":
            assert (each.a, each.difference, each.low, each.verdict) == (None, None, None, "no ground truth")
        elif each.difference is not None:
            assert (each.difference, each.low, each.high, each.verdict) == (0.0, 0.0, 0.0, "within noise")


def test_large_difference_is_significant_and_small_one_within_noise() -> None:
    good, bad = _scores(shift=2.0), _scores(shift=14.0)
    found = compare(bad, good, resamples=500)
    for row in (MEAN, ALL_BOXES, AGNOSTIC, "pedestrian", "car"):
        hota = found.of(row, "HOTA")
        assert hota.low is not None and 0 < hota.low <= hota.difference <= hota.high  # type: ignore[operator]
        assert hota.verdict == "B is better"
    assert found.of(MEAN, "FN").verdict == "B is better" and found.of(MEAN, "FN").difference < 0  # type: ignore[operator]
    assert compare(good, bad, resamples=500).of(MEAN, "HOTA").verdict == "B is worse"
    other = compare(_scores(seed=1), _scores(seed=2), resamples=500).of(MEAN, "HOTA")
    assert other.verdict == "within noise" and other.difference != 0


def test_resampled_scores_equal_trackeval_on_repeated_sequences() -> None:
    """Each resample is scored by TrackEval from repeated sequences."""
    sequences = _sequences(5)
    results = [score_sequence(each, CLASSES) for each in sequences]
    weights = resample_weights(5, 40, seed=3)
    assert (weights.sum(axis=0) == 5).all()
    resampled = combine_resamples(results, CLASSES, weights, CLASSES)
    absent = 0
    for column in range(40):
        repeated = [
            SequenceCounts(f"{result.name}-{copy}", result.per_class, result.agnostic, result.removed)
            for result, times in zip(results, weights[:, column], strict=True)
            for copy in range(times)
        ]
        direct = combine(repeated, CLASSES)
        rows_of = {MEAN: direct.class_averaged, ALL_BOXES: direct.detection_averaged, AGNOSTIC: direct.class_agnostic}
        for row, values in (rows_of | direct.per_class).items():
            for metric, value in values.items():
                found = resampled[row][metric][column]
                if value is None:
                    assert np.isnan(found)
                    absent += 1
                else:
                    assert found == pytest.approx(value, rel=1e-9, abs=1e-9), (row, metric)
    assert absent > 0


def test_stored_counts_give_the_stored_scores() -> None:
    scores = _scores(6)
    back = Scores.from_json(json.loads(json.dumps(scores.to_json())))
    assert back == scores
    again = combine(sequence_counts(back, back.sequences), CLASSES)
    for name, value in scores.to_dict().items():
        assert again.to_dict()[name] == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert again.removed == scores.removed
    assert compare(back, scores, resamples=100).of(MEAN, "HOTA").high == 0.0


def test_the_order_of_the_sequences_does_not_matter() -> None:
    a, b = _scores(6, shift=4.0), _scores(6, shift=9.0)
    reversed_b = score(_sequences(6, shift=9.0)[::-1], CLASSES)
    one, other = compare(a, b, resamples=200).of(MEAN, "HOTA"), compare(a, reversed_b, resamples=200).of(MEAN, "HOTA")
    assert (one.low, one.high) == pytest.approx((other.low, other.high), rel=1e-9)


def test_equal_seeds_give_equal_intervals() -> None:
    a, b = _scores(6, shift=4.0), _scores(6, shift=9.0)
    assert compare(a, b, resamples=200, seed=5) == compare(a, b, resamples=200, seed=5)
    assert compare(a, b, resamples=200, seed=5) != compare(a, b, resamples=200, seed=6)


def test_few_sequences_add_a_note_and_one_has_no_interval() -> None:
    few = compare(_scores(3), _scores(3, shift=1.0), resamples=100)
    assert "only 3 sequences" in few.notes[0]
    one = compare(_scores(1), _scores(1, shift=1.0), resamples=100)
    assert "no interval" in one.notes[0]
    assert one.of(MEAN, "HOTA").low is None and one.of(MEAN, "HOTA").verdict == "no interval"
    header, lines = few.table()
    assert header[4] == "B - A" and len(lines) == 6 * 8


@pytest.mark.parametrize("change", [{"protocol": "bdd100k"}, {"split": "test"}, {"sequences": ("other",)}])
def test_compare_rejects_different_conditions(change: dict[str, object]) -> None:
    scores = _scores(2)
    with pytest.raises(MotipError, match=next(iter(change))):
        compare(scores, replace(scores, **change))  # type: ignore[arg-type]


def test_compare_rejects_different_averaged_classes_and_few_resamples() -> None:
    sequences = _sequences(4)
    with pytest.raises(MotipError, match="not over the same classes"):
        compare(score(sequences, CLASSES), score(sequences, CLASSES, averaged=("car",)))
    with pytest.raises(MotipError, match="more resamples"):
        compare(score(sequences, CLASSES), score(sequences, CLASSES), resamples=3)


def test_scores_without_counts_are_an_error_with_a_fix() -> None:
    scores = _scores(3)
    stored = scores.to_json()
    stored.pop("counts")
    with pytest.raises(MotipError, match="motip evaluate"):
        compare(scores, Scores.from_json(stored))


def test_scores_without_predictions_can_be_compared() -> None:
    sequences = _sequences(4)
    nothing = score([replace(each, pred=rows()) for each in sequences], CLASSES)
    found = compare(score(sequences, CLASSES), nothing, resamples=100)
    assert found.of(MEAN, "HOTA").b == 0.0 and found.of(MEAN, "HOTA").verdict == "B is worse"
