"""Is B better than A, or is the difference noise? A paired bootstrap over sequences (Efron and Tibshirani 1993).

Sequences are drawn with replacement, the same draw for A and B, and both are scored on each draw from the counts of
their sequences. The interval holds the middle 95 % of the differences. It says what other videos *of this kind* might
have shown; it knows nothing of another training seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from motip.errors import MotipError
from motip.evaluate.bootstrap import AGNOSTIC, ALL_BOXES, MEAN, combine_draws, draw_weights
from motip.evaluate.metrics import SequenceCounts
from motip.evaluate.scores import COUNTS, PERCENTAGES, Scores, Values, check_comparable

DRAWS = 2000
FEW_SEQUENCES = 10
COVERAGE = 95.0
"""Percent of the draws inside the interval."""

METRICS = ("HOTA", "DetA", "AssA", "MOTA", "IDF1", "IDSW", "FP", "FN")
"""What the table shows; every metric is in the JSON."""

_LESS_IS_BETTER = {"IDSW", "FP", "FN", "Frag", "ML"}


@dataclass(frozen=True)
class Difference:
    """One metric of one row (a class or a mean) in A and B.

    Attributes:
        row, metric: what is compared.
        a, b: the two values on all sequences; None where there is no ground truth.
        difference: b - a.
        low, high: the interval of the difference; None where it cannot be told (one sequence, no ground truth).
        draws: how many draws had ground truth, and so say something.
    """

    row: str
    metric: str
    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    draws: int

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval spans 0; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return self.low <= 0.0 <= self.high

    @property
    def verdict(self) -> str:
        if self.difference is None:
            return "no ground truth"
        if self.within_noise is None:
            return "cannot be told"
        if self.within_noise:
            return "within noise"
        better = (self.difference > 0) != (self.metric in _LESS_IS_BETTER)
        return "B is better" if better else "B is worse"


@dataclass(frozen=True)
class Comparison:
    """Everything that was compared for one source.

    Attributes:
        identity: protocol, classes, split and sequence digest that both share.
        sequences, draws, seed: size and seed of the bootstrap.
        differences: the means first, then the classes.
        notes: what must stand beside the table.
    """

    identity: dict[str, str]
    sequences: int
    draws: int
    seed: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def of(self, row: str, metric: str) -> Difference:
        """One entry."""
        return next(each for each in self.differences if (each.row, each.metric) == (row, metric))

    def table(self, metrics: tuple[str, ...] = METRICS) -> tuple[list[str], list[list[str]]]:
        """Header and rows of text."""
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
        """Plain values, with the verdicts."""
        return asdict(self) | {
            "differences": [
                asdict(each) | {"within_noise": each.within_noise, "verdict": each.verdict} for each in self.differences
            ]
        }


def compare(a: Scores, b: Scores, draws: int = DRAWS, seed: int = 0) -> Comparison:
    """B against A, metric by metric.

    Args:
        draws: sets of sequences to draw.
        seed: of the draws; equal seeds, equal intervals.

    Raises:
        MotipError: protocol, classes, averaged classes, split or sequences differ, or scores came without counts.
    """
    if draws < 100:
        raise MotipError(
            "an interval needs more draws", where="--draws", found=draws, expected="100 or more; 2000 are usual"
        )
    check_comparable([a, b])
    if set(a.classes_without_gt) != set(b.classes_without_gt):
        raise MotipError(
            "the two class averages are not over the same classes",
            found=f"B leaves out {', '.join(b.classes_without_gt) or 'none'}",
            expected=f"A leaves out {', '.join(a.classes_without_gt) or 'none'}",
            fix="evaluate both with the same CLASSES_TO_EVAL",
        )
    weights = draw_weights(len(a.sequences), draws, seed)
    averaged = [name for name in a.classes if name not in a.classes_without_gt]
    drawn_a, drawn_b = (
        combine_draws(sequence_counts(side, a.sequences), a.classes, weights, averaged) for side in (a, b)
    )
    rows_a, rows_b = _rows(a), _rows(b)
    differences = [
        _difference(
            row, metric, rows_a[row], rows_b[row], drawn_b[row][metric] - drawn_a[row][metric], len(a.sequences)
        )
        for row in rows_a
        for metric in (*PERCENTAGES, *COUNTS)
        if metric not in ("GT", "TP")
    ]
    return Comparison(a.identity, len(a.sequences), draws, seed, tuple(differences), _notes(a, b))


def sequence_counts(scores: Scores, order: tuple[str, ...]) -> list[SequenceCounts]:
    """Raw results of the sequences in `order`.

    Raises:
        MotipError: the scores were stored without them, or with others.
    """
    try:
        return [SequenceCounts.from_json(name, scores.counts[name]) for name in order]
    except (KeyError, TypeError, ValueError) as error:
        raise MotipError(
            "the scores do not hold the counts of their sequences, without which no interval can be drawn",
            where="counts",
            found="no counts: written by an earlier version" if not scores.counts else f"not readable: {error!r}",
            fix="evaluate the checkpoint again with motip evaluate; tracks that are there are read back",
        ) from error


def _rows(scores: Scores) -> dict[str, Values]:
    means = {MEAN: scores.class_averaged, ALL_BOXES: scores.detection_averaged, AGNOSTIC: scores.class_agnostic}
    return means | scores.per_class


def _difference(row: str, metric: str, a: Values, b: Values, drawn: np.ndarray, sequences: int) -> Difference:
    first, second = a[metric], b[metric]
    known = drawn[np.isfinite(drawn)]
    low = high = None
    if sequences > 1 and len(known) and first is not None and second is not None:
        edge = (100.0 - COVERAGE) / 2
        low, high = (float(value) for value in np.percentile(known, [edge, 100.0 - edge]))
    difference = None if first is None or second is None else float(second - first)
    return Difference(row, metric, first, second, difference, low, high, len(known))


def _notes(a: Scores, b: Scores) -> tuple[str, ...]:
    number = len(a.sequences)
    notes = []
    if number == 1:
        notes.append("one sequence: there is nothing to draw from, so no interval")
    elif number < FEW_SEQUENCES:
        notes.append(
            f"only {number} sequences: the interval is wide and itself uncertain (with few it is rather too narrow)"
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
    """Source -> plain values."""
    return {source: comparison.to_json() for source, comparison in comparisons.items()}
