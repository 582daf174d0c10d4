"""How far a result over several training seeds can be trusted: a bootstrap over seeds and sequences together.

Sequences and seeds are drawn with replacement (Efron and Tibshirani 1993, chapter 8: a sample of two stages), the same
draw for everything that is compared. With S seeds the spread among them is widened by sqrt(S / (S - 1)), since so few
values drawn from themselves vary too little. One seed says nothing of other seeds: the interval is then of sequences
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from motip.errors import MotipError
from motip.evaluate.bootstrap import MEAN, combine_draws, draw_weights
from motip.evaluate.comparison import COVERAGE, DRAWS, sequence_counts
from motip.evaluate.scores import Scores, check_comparable


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the interval that holds the middle 95 % of the draws; ``each`` has a value per seed."""

    mean: float
    low: float
    high: float
    each: tuple[float, ...]

    def text(self, sign: bool = False) -> str:
        return f"{self.mean:{'+' if sign else ''}.1f} [{self.low:.1f}, {self.high:.1f}]"


def estimate(scores: Sequence[Scores], metric: str = "HOTA", draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The class-averaged metric over seeds.

    Args:
        scores: one of each seed, of the same sequences.

    Raises:
        MotipError: sequences, protocols or classes differ, or scores came without counts.
    """
    table = _drawn(scores, metric, draws, seed)
    return _estimate(table, tuple(_value(each, metric) for each in scores), seed)


def difference(
    a: Sequence[Scores], b: Sequence[Scores], metric: str = "HOTA", draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """B minus A over seeds, paired by seed and sequence. Where A is one model (the base weights), it is every seed's.

    Raises:
        MotipError: as ``estimate``; or A and B are not of the same seeds.
    """
    a = [*a] * len(b) if len(a) == 1 else [*a]
    if len(a) != len(b):
        raise MotipError("a difference over seeds needs the same seeds on both sides", found=f"{len(a)} and {len(b)}")
    check_comparable([*a, *b])
    table = _drawn(b, metric, draws, seed) - _drawn(a, metric, draws, seed)
    each = tuple(_value(second, metric) - _value(first, metric) for first, second in zip(a, b, strict=True))
    return _estimate(table, each, seed)


def _value(scores: Scores, metric: str) -> float:
    value = scores.class_averaged[metric]
    if value is None:
        raise MotipError(f"the scores have no {metric}: none of the sequences has a label of the averaged classes")
    return float(value)


def _drawn(scores: Sequence[Scores], metric: str, draws: int, seed: int) -> np.ndarray:
    """(S, B): the metric of each seed's model on each of the drawn sets of sequences."""
    check_comparable(list(scores))
    order = scores[0].sequences
    weights = draw_weights(len(order), draws, seed)
    rows = []
    for each in scores:
        averaged = [name for name in each.classes if name not in each.classes_without_gt]
        rows.append(combine_draws(sequence_counts(each, order), each.classes, weights, averaged)[MEAN][metric])
    return np.stack(rows)


def _estimate(table: np.ndarray, each: tuple[float, ...], seed: int) -> Estimate:
    seeds, draws = table.shape
    centre = table.mean(0)
    if seeds > 1:
        picks = np.random.default_rng([seed, 1]).integers(0, seeds, (seeds, draws))
        spread = np.take_along_axis(table, picks, 0).mean(0) - centre
        centre = centre + math.sqrt(seeds / (seeds - 1)) * spread
    edge = (100.0 - COVERAGE) / 2
    low, high = np.nanpercentile(centre, [edge, 100.0 - edge])
    return Estimate(float(np.mean(each)), float(low), float(high), each)
