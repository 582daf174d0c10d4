"""Estimates over training seeds: what an interval holds, and what makes it wider."""

from __future__ import annotations

import numpy as np
import pytest

from motip.errors import MotipError
from motip.evaluate.bootstrap import MEAN
from motip.evaluate.comparison import compare
from motip.evaluate.metrics import score
from motip.evaluate.protocols import ScoredSequence
from motip.evaluate.scores import Scores
from motip.evaluate.seeds import difference, estimate
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
    found, known = difference([a], [b], draws=500), compare(a, b, draws=500).of(MEAN, "HOTA")
    assert found.mean == pytest.approx(known.difference)
    assert (found.low, found.high) == pytest.approx((known.low, known.high))


def test_the_mean_is_that_of_the_seeds_and_lies_in_its_interval() -> None:
    scores = [_scores(6.0, seed) for seed in (1, 2, 3)]
    found = estimate(scores, draws=500)
    assert found.mean == pytest.approx(np.mean([each.hota for each in scores]))
    assert found.each == tuple(each.hota for each in scores)
    assert found.low < found.mean < found.high


def test_seeds_that_disagree_widen_the_interval_and_more_of_them_narrow_it() -> None:
    alike, apart = [_scores(6.0, 1)] * 3, [_scores(shift, 1) for shift in (2.0, 6.0, 14.0)]
    narrow, wide = estimate(alike, draws=500), estimate(apart, draws=500)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    more = estimate(apart * 3, draws=500)
    assert more.high - more.low < 0.8 * (wide.high - wide.low)


def test_a_difference_is_paired_by_seed() -> None:
    """Every seed gains about as much: the spread among seeds must not count against it."""
    before = [_scores(shift, 1) for shift in (6.0, 10.0, 14.0)]
    after = [_scores(shift - 3.0, 1) for shift in (6.0, 10.0, 14.0)]
    paired = difference(before, after, draws=500)
    crossed = difference(before, after[1:] + after[:1], draws=500)
    assert paired.mean == pytest.approx(crossed.mean)
    assert paired.low > 0 and paired.high - paired.low < crossed.high - crossed.low


def test_the_base_weights_stand_for_every_seed() -> None:
    base, after = _scores(14.0, 9), [_scores(4.0, seed) for seed in (1, 2, 3)]
    assert difference([base], after, draws=300) == difference([base] * 3, after, draws=300)


def test_other_seeds_or_sequences_are_refused() -> None:
    with pytest.raises(MotipError, match="the same seeds on both sides"):
        difference([_scores(4.0, 1)] * 2, [_scores(4.0, 1)] * 3)
    with pytest.raises(MotipError, match="sequences"):
        difference([_scores(4.0, 1)], [_scores(4.0, 1, number=9)])
