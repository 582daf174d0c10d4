"""ID assignment: scores to ID labels by the protocols hungarian, object-max and id-max, vectorised over detections.

Each protocol takes the scores (n, V+1) of n detections over V labels and "newborn" (column V), the (V,) mask of labels
that belong to a remembered track, and the smallest accepted score. It returns (n,) int64 labels: each label below V at
most once, V for newborns (MOTIP, section 3.4; the published code's protocols of the same names).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

Assignment = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def hungarian(scores: np.ndarray, tracked: np.ndarray, id_thresh: float) -> np.ndarray:
    """The one-to-one assignment of largest total score; any number of detections may be newborn."""
    count, newborn = len(scores), scores.shape[1] - 1
    extra_newborn_columns = np.repeat(scores[:, newborn:], max(count - 1, 0), axis=1)
    rows, columns = linear_sum_assignment(1.0 - np.concatenate([scores, extra_newborn_columns], axis=1))
    labels = np.full(count, newborn, np.int64)
    labels[rows] = np.minimum(columns, newborn)
    return _accepted(labels, scores, tracked, id_thresh)


def object_max(scores: np.ndarray, tracked: np.ndarray, id_thresh: float) -> np.ndarray:
    """Each detection takes its best label; among detections with the same best label the highest score wins."""
    newborn = scores.shape[1] - 1
    labels = scores.argmax(axis=1) if len(scores) else np.zeros(0, np.int64)
    best = scores[np.arange(len(scores)), labels]
    # Assigned in ascending order of score, the last write wins; ties go to the first detection.
    order = np.lexsort((-np.arange(len(scores)), best))
    winners = np.full(newborn + 1, -1)
    winners[labels[order]] = order
    labels = np.where(winners[labels] == np.arange(len(scores)), labels, newborn)
    return _accepted(labels, scores, tracked, id_thresh)


def id_max(scores: np.ndarray, tracked: np.ndarray, id_thresh: float) -> np.ndarray:
    """Each label selects its best detection; a detection selected by several takes the label of highest score."""
    count, newborn = len(scores), scores.shape[1] - 1
    labels = np.full(count, newborn, np.int64)
    if count:
        picked = scores.argmax(axis=0)
        columns = np.arange(newborn + 1)
        order = np.lexsort((columns, scores[picked, columns]))
        labels[picked[order]] = columns[order]
    return _accepted(labels, scores, tracked, id_thresh)


ASSIGNMENTS: dict[str, Assignment] = {"hungarian": hungarian, "object-max": object_max, "id-max": id_max}


def _accepted(labels: np.ndarray, scores: np.ndarray, tracked: np.ndarray, id_thresh: float) -> np.ndarray:
    """`labels` with newborn where the label belongs to no remembered track or its score is below the threshold."""
    newborn = scores.shape[1] - 1
    assignable = np.append(tracked, False)
    accepted = assignable[labels] & (scores[np.arange(len(scores)), labels] >= id_thresh)
    return np.where(accepted, labels, newborn)
