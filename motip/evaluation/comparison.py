"""Paired bootstrap comparison of two evaluations over sequences (Efron and Tibshirani 1993).

Sequences are resampled with replacement, the same resample for A and B, and both are scored on it from the counts of
their sequences. The interval contains the middle 95 % of the differences. It covers the choice of videos, not the
training seed (see ``motip.evaluation.seeds``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from motip.errors import MotipError
from motip.evaluation.bootstrap import AGNOSTIC, ALL_BOXES, MEAN, ResampledValues, combine_resamples, resample_weights
from motip.evaluation.metrics import SequenceCounts
from motip.evaluation.scores import COUNTS, PERCENTAGES, Scores, Values, check_comparable

RESAMPLES = 2000
_FEW_SEQUENCES = 10
"""Below this number of sequences a note marks the interval as uncertain."""
COVERAGE = 95.0
"""Percent of the resamples inside the interval."""

METRICS = ("HOTA", "DetA", "AssA", "MOTA", "IDF1", "IDSW", "FP", "FN")
"""Metrics of the table; the JSON contains all."""

_LOWER_IS_BETTER = {"IDSW", "FP", "FN", "Frag", "ML"}


@dataclass(frozen=True)
class Difference:
    """Difference of one metric in one row (a class or a mean) between A and B.

    Attributes:
        row, metric: name of the class or mean, and of the metric.
        a, b: the two values on all sequences; None without ground truth.
        difference: b - a.
        low, high: interval of the difference; None for one sequence or without ground truth.
        resamples: number of resamples with ground truth, from which the interval was taken.
    """

    row: str
    metric: str
    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    resamples: int

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval spans 0; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return self.low <= 0.0 <= self.high

    @property
    def verdict(self) -> str:
        """The difference in words, from the interval."""
        if self.difference is None:
            return "no ground truth"
        if self.within_noise is None:
            return "no interval"
        if self.within_noise:
            return "within noise"
        better = (self.difference > 0) != (self.metric in _LOWER_IS_BETTER)
        return "B is better" if better else "B is worse"


@dataclass(frozen=True)
class Comparison:
    """Comparison of two evaluations of one source.

    Attributes:
        identity: common protocol, classes, split and sequence digest.
        sequences, resamples, seed: size and seed of the bootstrap.
        differences: the means first, then the classes.
        notes: remarks that must be shown with the table.
    """

    identity: dict[str, str]
    sequences: int
    resamples: int
    seed: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def of(self, row: str, metric: str) -> Difference:
        """The difference of one metric in one row."""
        return next(each for each in self.differences if (each.row, each.metric) == (row, metric))

    def table(self, metrics: tuple[str, ...] = METRICS) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the text table."""
        rows = [
            [
                each.row,
                each.metric,
                _text(each.a, each.metric),
                _text(each.b, each.metric),
                _text(each.difference, each.metric, sign=True),
                _interval(each),
                each.verdict,
            ]
            for each in self.differences
            if each.metric in metrics
        ]
        return ["", "metric", "A", "B", "B - A", f"{COVERAGE:.0f} % interval", ""], rows

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable values, with the verdicts; the number of resamples is stored as ``draws``."""
        return _stored(self) | {
            "differences": [
                _stored(each) | {"within_noise": each.within_noise, "verdict": each.verdict}
                for each in self.differences
            ]
        }


def compare(a: Scores, b: Scores, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compare B with A, metric by metric.

    Args:
        resamples: bootstrap resamples of the sequences, 100 or more.
        seed: of the resampling; equal seeds give equal intervals.

    Raises:
        MotipError: protocol, classes, averaged classes, split or sequences differ, or scores have no counts.
    """
    # checks
    if resamples < 100:
        raise MotipError(
            "an interval needs more resamples", where="--draws", found=resamples, expected="100 or more; 2000 are usual"
        )
    check_comparable([a, b])
    if set(a.classes_without_gt) != set(b.classes_without_gt):
        raise MotipError(
            "the two class averages are not over the same classes",
            found=f"B leaves out {', '.join(b.classes_without_gt) or 'none'}",
            expected=f"A leaves out {', '.join(a.classes_without_gt) or 'none'}",
            fix="evaluate both with the same CLASSES_TO_EVAL",
        )
    # scores of both on each resample
    weights = resample_weights(len(a.sequences), resamples, seed)
    resampled_a, resampled_b = (resample_scores(side, a.sequences, weights) for side in (a, b))
    # differences
    rows_a, rows_b = _rows(a), _rows(b)
    differences = [
        _difference(
            row, metric, rows_a[row], rows_b[row], resampled_b[row][metric] - resampled_a[row][metric], len(a.sequences)
        )
        for row in rows_a
        for metric in (*PERCENTAGES, *COUNTS)
        if metric not in ("GT", "TP")
    ]
    return Comparison(a.identity, len(a.sequences), resamples, seed, tuple(differences), _notes(a, b))


def resample_scores(scores: Scores, sequences: tuple[str, ...], weights: np.ndarray) -> dict[str, ResampledValues]:
    """Scores of every resample, under the names of ``combine_resamples``.

    Args:
        sequences: their order in ``weights``.
        weights: (S, B) how often each sequence is in each resample.

    Raises:
        MotipError: as ``sequence_counts``.
    """
    averaged = [name for name in scores.classes if name not in scores.classes_without_gt]
    return combine_resamples(sequence_counts(scores, sequences), scores.classes, weights, averaged)


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """Bounds of the middle ``COVERAGE`` percent of the (B,) values of resamples; NaN is left out."""
    edge = (100.0 - COVERAGE) / 2
    low, high = np.nanpercentile(resampled, [edge, 100.0 - edge])
    return float(low), float(high)


def sequence_counts(scores: Scores, order: tuple[str, ...]) -> list[SequenceCounts]:
    """Per-sequence counts stored with the scores, in the given order.

    Raises:
        MotipError: counts are missing or unreadable.
    """
    try:
        return [SequenceCounts.from_json(name, scores.counts[name]) for name in order]
    except (KeyError, TypeError, ValueError) as error:
        raise MotipError(
            "the scores do not contain the counts of their sequences, which the bootstrap needs",
            where="counts",
            found="no counts: written by an earlier version" if not scores.counts else f"not readable: {error!r}",
            fix="evaluate the checkpoint again with motip evaluate; stored tracks are reused",
        ) from error


def _stored(result: Difference | Comparison) -> dict[str, Any]:
    return {"draws" if name == "resamples" else name: value for name, value in asdict(result).items()}


def _rows(scores: Scores) -> dict[str, Values]:
    means = {MEAN: scores.class_averaged, ALL_BOXES: scores.detection_averaged, AGNOSTIC: scores.class_agnostic}
    return means | scores.per_class


def _difference(row: str, metric: str, a: Values, b: Values, resampled: np.ndarray, sequences: int) -> Difference:
    first, second = a[metric], b[metric]
    number = int(np.isfinite(resampled).sum())
    difference = None if first is None or second is None else float(second - first)
    low, high = interval(resampled) if sequences > 1 and number and difference is not None else (None, None)
    return Difference(row, metric, first, second, difference, low, high, number)


def _notes(a: Scores, b: Scores) -> tuple[str, ...]:
    number = len(a.sequences)
    notes = []
    if number == 1:
        notes.append("one sequence: no interval, the bootstrap needs at least two")
    elif number < _FEW_SEQUENCES:
        notes.append(
            f"only {number} sequences: the interval is wide and uncertain (with few sequences rather too narrow)"
        )
    for side, own, other in (("A", a, b), ("B", b, a)):
        notes += [f"only {side}: {text}" for text in own.notes if text not in other.notes]
    return tuple(notes)


def _text(value: float | None, metric: str, sign: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:{'+' if sign else ''}.{0 if metric in COUNTS else 1}f}"


def _interval(each: Difference) -> str:
    if each.low is None or each.high is None:
        return "-"
    return f"{_text(each.low, each.metric, sign=True)} .. {_text(each.high, each.metric, sign=True)}"


def comparisons_json(comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    """Source -> JSON-serialisable values."""
    return {source: comparison.to_json() for source, comparison in comparisons.items()}
