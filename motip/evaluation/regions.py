"""Box overlaps: IoU, one-to-one matching, share of a box inside ignore regions (numpy, float64)."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

MATCH_IOU = 0.5
"""Smallest IoU of a match between prediction and ground truth (TrackEval, BDD100K, MOTChallenge)."""

EPS = float(np.finfo(np.float64).eps)
"""Slack of comparisons between shares or IoUs, as in TrackEval."""


def areas(boxes_xyxy: np.ndarray) -> np.ndarray:
    """(N,) areas of (N, 4) xyxy boxes, 0 for inverted ones."""
    sides = np.maximum(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 0.0)
    return sides[:, 0] * sides[:, 1]


def distance_to_border(boxes_xyxy: np.ndarray, width: int, height: int) -> np.ndarray:
    """(N,) pixels between each box and the nearest image border, 0 where it touches or crosses it."""
    sides = np.concatenate([boxes_xyxy[:, :2], np.array([width, height]) - boxes_xyxy[:, 2:]], axis=1)
    return np.maximum(sides.min(axis=1), 0.0)


def _intersections(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """(N, M) areas shared by (N, 4) and (M, 4) xyxy boxes."""
    low = np.maximum(boxes_a[:, None, :2], boxes_b[None, :, :2])
    high = np.minimum(boxes_a[:, None, 2:], boxes_b[None, :, 2:])
    sides = np.maximum(high - low, 0.0)
    return sides[..., 0] * sides[..., 1]


def box_iou(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """(N, M) IoU of (N, 4) and (M, 4) xyxy boxes; 0 for a box without area."""
    shared = _intersections(boxes_a, boxes_b)
    area_a, area_b = areas(boxes_a), areas(boxes_b)
    union = area_a[:, None] + area_b[None, :] - shared
    valid = (area_a[:, None] > EPS) & (area_b[None, :] > EPS) & (union > EPS)
    return np.where(valid, shared / np.where(valid, union, 1.0), 0.0)


def share_in_one(boxes_xyxy: np.ndarray, regions_xyxy: np.ndarray) -> np.ndarray:
    """(N,) largest share of each box's own area inside a single region."""
    return _share_of_area(_intersections(boxes_xyxy, regions_xyxy).max(axis=1, initial=0.0), boxes_xyxy)


def share_in_union(boxes_xyxy: np.ndarray, regions_xyxy: np.ndarray) -> np.ndarray:
    """(N,) share of each box's own area inside the union of the regions: an overlap of two regions counts once."""
    # The regions' edges cut the plane into cells that are entirely inside or outside the union.
    x_edges = np.unique(regions_xyxy[:, [0, 2]])
    y_edges = np.unique(regions_xyxy[:, [1, 3]])
    x_inside = (regions_xyxy[:, None, 0] <= x_edges[:-1]) & (x_edges[1:] <= regions_xyxy[:, None, 2])
    y_inside = (regions_xyxy[:, None, 1] <= y_edges[:-1]) & (y_edges[1:] <= regions_xyxy[:, None, 3])
    covered = (x_inside[:, :, None] & y_inside[:, None, :]).any(axis=0).astype(np.float64)
    x_overlap = _interval_overlaps(boxes_xyxy[:, [0, 2]], x_edges)
    y_overlap = _interval_overlaps(boxes_xyxy[:, [1, 3]], y_edges)
    return _share_of_area(((x_overlap @ covered) * y_overlap).sum(axis=1), boxes_xyxy)


def match(similarity: np.ndarray, bonus: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """One-to-one pairs (rows, columns) of largest total similarity + bonus among those that reach ``MATCH_IOU``."""
    scores = np.where(similarity < MATCH_IOU - EPS, 0.0, similarity + bonus)
    rows, columns = linear_sum_assignment(scores, maximize=True)
    valid = scores[rows, columns] > EPS
    return rows[valid], columns[valid]


def _share_of_area(inside: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
    area = areas(boxes_xyxy)
    return np.where(area > EPS, inside / np.where(area > EPS, area, 1.0), 0.0)


def _interval_overlaps(spans: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(N, E-1) lengths shared by N spans (start, end) and the cells between consecutive edges."""
    return np.maximum(np.minimum(spans[:, 1:], edges[1:]) - np.maximum(spans[:, :1], edges[:-1]), 0.0)
