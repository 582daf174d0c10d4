"""Two-stage bootstrap over training seeds and sequences.

Sequences and seeds are resampled with replacement (Efron and Tibshirani 1993, chapter 8: two-stage samples), with the
same resample for all that is compared. With S seeds their deviation from the mean is scaled by sqrt(S / (S - 1)),
the small-sample correction of a bootstrap over so few values. With one seed the interval covers sequences only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from motip.errors import MotipError
from motip.evaluation.bootstrap import MEAN, resample_weights
from motip.evaluation.comparison import RESAMPLES, interval, resample_scores
from motip.evaluation.scores import Scores, check_comparable


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, the interval with the middle 95 % of the resamples, and the value of each seed."""

    mean: float
    low: float
    high: float
    per_seed: tuple[float, ...]

    def text(self, sign: bool = False) -> str:
        """``mean [low, high]`` with one decimal; ``sign`` adds a plus to a positive mean."""
        return f"{self.mean:{'+' if sign else ''}.1f} [{self.low:.1f}, {self.high:.1f}]"


def estimate(scores: Sequence[Scores], metric: str = "HOTA", resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of a class-averaged metric over seeds, with interval.

    Args:
        scores: one per seed, of the same sequences.

    Raises:
        MotipError: sequences, protocols or classes differ, or scores have no counts.
    """
    table = _resampled(scores, metric, resamples, seed)
    return _estimate(table, tuple(_value(each, metric) for each in scores), seed)


def difference(
    a: Sequence[Scores], b: Sequence[Scores], metric: str = "HOTA", resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """B minus A over seeds, paired by seed and sequence. A single A (the base weights) is used for every seed.

    Raises:
        MotipError: as ``estimate``, or A and B differ in the number of seeds.
    """
    a = [*a] * len(b) if len(a) == 1 else [*a]
    if len(a) != len(b):
        raise MotipError("a difference over seeds needs the same seeds on both sides", found=f"{len(a)} and {len(b)}")
    check_comparable([*a, *b])
    table = _resampled(b, metric, resamples, seed) - _resampled(a, metric, resamples, seed)
    per_seed = tuple(_value(second, metric) - _value(first, metric) for first, second in zip(a, b, strict=True))
    return _estimate(table, per_seed, seed)


def _value(scores: Scores, metric: str) -> float:
    value = scores.class_averaged[metric]
    if value is None:
        raise MotipError(f"the scores have no {metric}: none of the sequences has a label of the averaged classes")
    return float(value)


def _resampled(scores: Sequence[Scores], metric: str, resamples: int, seed: int) -> np.ndarray:
    """(S, B): the metric of each seed's model on each of the B resamples."""
    check_comparable(scores)
    order = scores[0].sequences
    weights = resample_weights(len(order), resamples, seed)
    return np.stack([resample_scores(each, order, weights)[MEAN][metric] for each in scores])


def _estimate(table: np.ndarray, per_seed: tuple[float, ...], seed: int) -> Estimate:
    seeds, resamples = table.shape
    centre = table.mean(0)
    if seeds > 1:
        picks = np.random.default_rng([seed, 1]).integers(0, seeds, (seeds, resamples))
        deviation = np.take_along_axis(table, picks, 0).mean(0) - centre
        centre = centre + math.sqrt(seeds / (seeds - 1)) * deviation
    return Estimate(float(np.mean(per_seed)), *interval(centre), per_seed)
