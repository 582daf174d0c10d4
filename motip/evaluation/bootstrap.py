"""Bootstrap scores: scores of many resamples of the sequences, combined by TrackEval's rules.

A resample is a weight per sequence (how often it is in it), so all resamples are combined by arithmetic on arrays with
one column per resample.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from motip.evaluation.counts import CLEAR_FIELDS, HOTA_COUNTS, HOTA_SHARES, IDENTITY_FIELDS, Counts
from motip.evaluation.metrics import COUNT_FIELDS, FAMILIES, PERCENT_FIELDS, SequenceCounts

MEAN, ALL_BOXES, AGNOSTIC = "mean of the classes", "all boxes", "class-agnostic"
"""Names of the three means, beside those of the classes."""

ResampledValues = dict[str, np.ndarray]
"""Metric -> (B,) values, NaN if a resample has no ground truth: percentages, and counts summed over the resample."""


def resample_weights(sequences: int, resamples: int, seed: int) -> np.ndarray:
    """(sequences, resamples) int64: how often each sequence is in each resample, drawn with replacement."""
    picks = np.random.default_rng(seed).integers(0, sequences, (resamples, sequences))
    weights = np.zeros((sequences, resamples), np.int64)
    np.add.at(weights, (picks, np.arange(resamples)[:, None]), 1)
    return weights


def combine_resamples(
    results: Sequence[SequenceCounts], classes: tuple[str, ...], weights: np.ndarray, averaged: Collection[str]
) -> dict[str, ResampledValues]:
    """Scores of every resample, under the class names and MEAN, ALL_BOXES, AGNOSTIC.

    Args:
        results: raw results of the S sequences.
        classes: names of all classes.
        weights: (S, B) how often each sequence is in each of the B resamples.
        averaged: classes that MEAN is taken over; a class without ground truth in a resample is excluded there.
    """
    combined = {name: _combine([result.per_class[name] for result in results], weights) for name in classes}
    per_class = {name: _values(counts) for name, counts in combined.items()}
    every_class = {
        "HOTA": FAMILIES["HOTA"].combine_classes_det_averaged(
            {name: counts["HOTA"] for name, counts in combined.items()}
        ),
        "Identity": FAMILIES["Identity"].combine_classes_det_averaged(
            {name: counts["Identity"] for name, counts in combined.items()}
        ),
        "CLEAR": _clear({field: sum(counts["CLEAR"][field] for counts in combined.values()) for field in CLEAR_FIELDS}),
    }
    return {
        MEAN: _mean([per_class[name] for name in classes if name in averaged]),
        ALL_BOXES: _values(every_class),
        AGNOSTIC: _values(_combine([result.agnostic for result in results], weights)),
        **per_class,
    }


def _combine(cells: Sequence[Counts], weights: np.ndarray) -> Counts:
    """Counts of every resample, one column each."""
    hota, identity = {}, {}
    for number, (cell, times) in enumerate(zip(cells, weights, strict=True)):
        hota[number] = {field: cell["HOTA"][field][:, None] * times for field in HOTA_COUNTS} | {
            field: cell["HOTA"][field][:, None] for field in HOTA_SHARES
        }
        identity[number] = {field: cell["Identity"][field] * times for field in IDENTITY_FIELDS}
    clear = {field: np.array([cell["CLEAR"][field] for cell in cells], np.float64) @ weights for field in CLEAR_FIELDS}
    return {
        "HOTA": FAMILIES["HOTA"].combine_sequences(hota),
        "CLEAR": _clear(clear),
        "Identity": FAMILIES["Identity"].combine_sequences(identity),
    }


def _clear(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """CLEAR of every resample from its sums, one at a time: TrackEval's formula branches on scalars."""
    resamples = [
        FAMILIES["CLEAR"].combine_sequences({"all": dict(zip(CLEAR_FIELDS, column, strict=True))})
        for column in np.stack([sums[field] for field in CLEAR_FIELDS], axis=1).tolist()
    ]
    fields = {*CLEAR_FIELDS, *PERCENT_FIELDS["CLEAR"]}
    return {field: np.array([each[field] for each in resamples], np.float64) for field in fields}


def _values(counts: Counts) -> ResampledValues:
    boxes = counts["CLEAR"]["CLR_TP"] + counts["CLEAR"]["CLR_FN"]
    values = {}
    for family, fields in PERCENT_FIELDS.items():
        for field in fields:
            share = counts[family][field]
            share = share.mean(axis=0) if share.ndim == 2 else share
            values[field] = np.where(boxes > 0, 100.0 * share, np.nan)
    return values | {name: counts["CLEAR"][field] for name, field in COUNT_FIELDS.items()} | {"GT": boxes}


def _mean(per_class: Sequence[ResampledValues]) -> ResampledValues:
    """Mean over the classes with ground truth in a resample; counts are summed over them."""
    has_gt = np.stack([values["GT"] > 0 for values in per_class])
    number = has_gt.sum(axis=0)
    mean = {}
    for metric in per_class[0]:
        table = np.stack([values[metric] for values in per_class])
        total = np.where(has_gt, table, 0.0).sum(axis=0)
        if metric in COUNT_FIELDS or metric == "GT":
            mean[metric] = total
        else:
            mean[metric] = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    return mean
