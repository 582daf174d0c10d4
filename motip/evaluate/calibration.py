"""How sure the detector is where it is right, and where it is wrong: detections by confidence, before any tracking."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from motip.data.sequence import TrackRows
from motip.evaluate.metrics import prepare
from motip.evaluate.protocols import ScoredSequence
from motip.evaluate.regions import MATCH_IOU
from motip.losses.boxes import cxcywh_to_xyxy

BINS = 20
"""Of equal width between 0 and 1."""

Histogram = dict[str, np.ndarray]
"""``true`` and ``false`` -> (BINS,) int64 detections."""

_SLACK = float(np.finfo(np.float64).eps)


class DetectionCollector:
    """Keeps the detections of a sequence that exceed a low threshold; give ``add`` to ``track_variants``.

    Args:
        floor: lowest class score of interest; detectors have hundreds of queries that hardly say anything.
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
        """All of them; in place of a track id stands the query, which is unique in a frame."""
        fields = ("frames", "track_ids", "boxes_xyxy", "scores", "class_ids")
        every = [TrackRows.empty(), *self._frames]
        return TrackRows(*(np.concatenate([getattr(rows, name) for rows in every]) for name in fields))


def confidence_histograms(
    sequence: ScoredSequence, classes: tuple[str, ...], protocol: str = "plain"
) -> dict[str, Histogram]:
    """True and false positives per class and bin of confidence, for a sequence whose predictions are detections.

    Per frame and class the most confident detection chooses first, as in COCO's evaluation: it is true if a box that
    is still free overlaps it with an IoU of at least 0.5. What the protocol ignores is in neither count.
    """
    return {name: _histogram(sequence, classes, name, protocol) for name in classes}


def _histogram(sequence: ScoredSequence, classes: tuple[str, ...], name: str, protocol: str) -> Histogram:
    _, pred, data = prepare(sequence, classes, name, protocol)
    true, false = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    for columns, similarity in zip(data["tracker_rows"], data["similarity_scores"], strict=True):
        scores = pred.scores[columns]
        right = _greedy(similarity, scores)
        bins = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
        np.add.at(true, bins[right], 1)
        np.add.at(false, bins[~right], 1)
    return {"true": true, "false": false}


def _greedy(similarity: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(P,) bool: detections that find a ground-truth box of the (G, P) similarities, the most confident first."""
    right = np.zeros(len(scores), bool)
    if not len(similarity):
        return right
    free = np.ones(len(similarity), bool)
    for column in np.argsort(-scores, kind="stable").tolist():
        overlaps = np.where(free, similarity[:, column], -1.0)
        row = int(overlaps.argmax())
        if overlaps[row] >= MATCH_IOU - _SLACK:
            right[column], free[row] = True, False
    return right
