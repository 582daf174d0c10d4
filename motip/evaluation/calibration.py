"""Confidence histograms of true and false detections, before tracking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motip.data.sequence import TrackRows
from motip.evaluation.metrics import prepare_class
from motip.evaluation.protocols import ScoredSequence
from motip.evaluation.regions import EPS, MATCH_IOU
from motip.losses.boxes import cxcywh_to_xyxy

BINS = 20
"""Number of bins, of equal width in 0..1."""

Histogram = dict[str, np.ndarray]
"""``true`` and ``false`` -> (BINS,) int64 detections."""


def pool(histograms: Iterable[Mapping[str, Any]]) -> Histogram:
    """Sum of histograms."""
    every = list(histograms)
    return {side: np.sum([each[side] for each in every], axis=0) for side in ("true", "false")}


class DetectionCollector:
    """Collects detections above a low threshold; pass ``add`` to ``track_variants`` as ``on_detections``.

    Args:
        floor: detections must exceed this class score; most of the hundreds of queries score close to 0.
        area_thresh: as AREA_THRESH, in square pixels of the original image.
    """

    def __init__(self, floor: float, area_thresh: float = 0.0) -> None:
        self._floor = floor
        self._area_thresh = area_thresh
        self._frames: list[TrackRows] = []

    def add(self, number: int, image_size: tuple[int, int], logits: Tensor, boxes: Tensor) -> None:
        """One frame: its number, (height, width), (Q, C) logits and (Q, 4) cxcywh in 0..1."""
        height, width = image_size
        scores, classes = logits.float().sigmoid().max(dim=-1)
        scale = torch.tensor([width, height, width, height], dtype=torch.float32, device=boxes.device)
        sizes = boxes.float()[:, 2:] * scale[2:]
        keep = (scores > self._floor) & (sizes[:, 0] * sizes[:, 1] > self._area_thresh)
        queries = torch.nonzero(keep).flatten()
        self._frames.append(
            TrackRows(
                np.full(len(queries), number, np.int64),
                queries.cpu().numpy(),
                (cxcywh_to_xyxy(boxes.float()) * scale)[queries].cpu().numpy(),
                scores[queries].cpu().numpy(),
                classes[queries].cpu().numpy(),
            )
        )

    def rows(self) -> TrackRows:
        """All detections; ``track_ids`` hold the query number, which is unique in a frame."""
        fields = ("frames", "track_ids", "boxes_xyxy", "scores", "class_ids")
        every = [TrackRows.empty(), *self._frames]
        return TrackRows(*(np.concatenate([getattr(rows, name) for rows in every]) for name in fields))


def confidence_histograms(
    sequence: ScoredSequence, classes: tuple[str, ...], protocol: str = "plain"
) -> dict[str, Histogram]:
    """True and false positives per class and bin of confidence, for a sequence whose predictions are detections.

    Per frame and class, detections are matched in order of confidence as in COCO's evaluation: one is true if its IoU
    with an unmatched box is at least 0.5. Detections ignored by the protocol are not counted.
    """
    return {name: _histogram(*prepare_class(sequence, classes, name, protocol)[1:]) for name in classes}


def _histogram(pred: TrackRows, data: dict[str, Any]) -> Histogram:
    true, false = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    for columns, similarity in zip(data["tracker_rows"], data["similarity_scores"], strict=True):
        scores = pred.scores[columns]
        true_positive = _greedy(similarity, scores)
        bins = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
        np.add.at(true, bins[true_positive], 1)
        np.add.at(false, bins[~true_positive], 1)
    return {"true": true, "false": false}


def _greedy(similarity: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(P,) bool: detections matched to a ground-truth box by the (G, P) similarities, in order of confidence."""
    matched = np.zeros(len(scores), bool)
    if not len(similarity):
        return matched
    free = np.ones(len(similarity), bool)
    for column in np.argsort(-scores, kind="stable").tolist():
        overlaps = np.where(free, similarity[:, column], -1.0)
        row = int(overlaps.argmax())
        if overlaps[row] >= MATCH_IOU - EPS:
            matched[column], free[row] = True, False
    return matched
