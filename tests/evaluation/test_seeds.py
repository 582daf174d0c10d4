"""Two-stage bootstrap over training seeds: means, and width of the interval."""

from __future__ import annotations

import numpy as np
import pytest

from motip.errors import MotipError
from motip.evaluation.bootstrap import MEAN
from motip.evaluation.comparison import compare
from motip.evaluation.metrics import score
from motip.evaluation.protocols import ScoredSequence
from motip.evaluation.scores import Scores
from motip.evaluation.seeds import difference, estimate
from tests.helpers.track_rows import disturbed, random_rows

CLASSES = ("pedestrian", "car")


def _scores(shift: float, seed: int, number: int = 10) -> Scores:
    sequences = []
    for index in range(number):
        truth = random_rows(100 + index, objects=6, classes=2)
        sequences.append(ScoredSequence(f"s{index}", truth, disturbed(truth, 50 * seed + index, shift, 0.05)))
    return score(sequences, CLASSES)


def test_one_seed_gives_the_interval_of_the_paired_comparison() -> None:
    a, b = _scores(10.0, 1), _scores(4.0, 2)
    found, known = difference([a], [b], resamples=500), compare(a, b, resamples=500).of(MEAN, "HOTA")
    assert found.mean == pytest.approx(known.difference)
    assert (found.low, found.high) == pytest.approx((known.low, known.high))


def test_estimate_is_the_mean_over_seeds_inside_its_interval() -> None:
    scores = [_scores(6.0, seed) for seed in (1, 2, 3)]
    found = estimate(scores, resamples=500)
    assert found.mean == pytest.approx(np.mean([each.hota for each in scores]))
    assert found.per_seed == tuple(each.hota for each in scores)
    assert found.low < found.mean < found.high


def test_interval_grows_with_seed_variance_and_shrinks_with_seed_count() -> None:
    alike, apart = [_scores(6.0, 1)] * 3, [_scores(shift, 1) for shift in (2.0, 6.0, 14.0)]
    narrow, wide = estimate(alike, resamples=500), estimate(apart, resamples=500)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    more = estimate(apart * 3, resamples=500)
    assert more.high - more.low < 0.8 * (wide.high - wide.low)


def test_difference_is_paired_by_seed() -> None:
    """Every seed gains about as much, so the variance among seeds must not widen the interval."""
    before = [_scores(shift, 1) for shift in (6.0, 10.0, 14.0)]
    after = [_scores(shift - 3.0, 1) for shift in (6.0, 10.0, 14.0)]
    paired = difference(before, after, resamples=500)
    crossed = difference(before, after[1:] + after[:1], resamples=500)
    assert paired.mean == pytest.approx(crossed.mean)
    assert paired.low > 0 and paired.high - paired.low < crossed.high - crossed.low


def test_single_baseline_is_used_for_every_seed() -> None:
    base, after = _scores(14.0, 9), [_scores(4.0, seed) for seed in (1, 2, 3)]
    assert difference([base], after, resamples=300) == difference([base] * 3, after, resamples=300)


def test_different_seed_counts_or_sequences_are_an_error() -> None:
    with pytest.raises(MotipError, match="the same seeds on both sides"):
        difference([_scores(4.0, 1)] * 2, [_scores(4.0, 1)] * 3)
    with pytest.raises(MotipError, match="sequences"):
        difference([_scores(4.0, 1)], [_scores(4.0, 1, number=9)])
