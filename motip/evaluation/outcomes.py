"""Outcome of every ground-truth and every predicted box: tracked, switched, missed, true or false positive, ignored.

The matching is CLEAR's (Bernardin and Stiefelhagen 2008, as TrackEval counts it): in each frame pairs matched in the
previous one come first, then the largest IoU. Counts therefore equal TP, FN, FP, IDSW and Frag of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from motip.data.sequence import TrackRows
from motip.evaluation.metrics import prepare_class
from motip.evaluation.protocols import ScoredSequence
from motip.evaluation.regions import match

GT_OUTCOMES = ("tracked", "identity switch", "missed")
PRED_OUTCOMES = ("true positive", "false positive", "ignored")
SIZE_BINS = {"tiny": 16.0**2, "small": 32.0**2, "medium": 96.0**2, "large": np.inf}
"""Upper bounds of a box's area in square pixels: COCO's three bins, the smallest split for aerial images."""

Selection = np.ndarray | slice
"""(N,) bool mask of boxes, or a slice."""

ALL = slice(None)

_CONTINUES = 1000.0  # outweighs any IoU, so a pair of the previous frame is kept while its IoU reaches the threshold


@dataclass(frozen=True)
class ClassOutcomes:
    """Outcomes of the boxes of one class in one sequence.

    Attributes:
        gt, pred: the boxes, sorted by frame.
        gt_outcomes: (G,) index into GT_OUTCOMES.
        pred_outcomes: (P,) index into PRED_OUTCOMES.
        matched_ids: (G,) predicted track id of each ground-truth box, -1 where missed.
        previous_ids: (G,) predicted id of the object's last match, -1 if there is none.
        gaps: (G,) frames since that match, 0 if none.
        resumed: (G,) bool, first match after a miss: each is one fragment.
        ious: (G,) IoU with the matched prediction, 0 where missed.
    """

    gt: TrackRows
    pred: TrackRows
    gt_outcomes: np.ndarray
    pred_outcomes: np.ndarray
    matched_ids: np.ndarray
    previous_ids: np.ndarray
    gaps: np.ndarray
    resumed: np.ndarray
    ious: np.ndarray

    def counts(self, gt: Selection = ALL, pred: Selection | None = ALL) -> dict[str, int]:
        """Boxes by outcome, and fragments; the prediction of a switch is also a true positive.

        Args:
            gt: the counted ground-truth boxes.
            pred: the counted predictions; None leaves their outcomes out.
        """
        gt_outcomes = self.gt_outcomes[gt]
        found = {name: int((gt_outcomes == index).sum()) for index, name in enumerate(GT_OUTCOMES)}
        if pred is not None:
            pred_outcomes = self.pred_outcomes[pred]
            found |= {name: int((pred_outcomes == index).sum()) for index, name in enumerate(PRED_OUTCOMES)}
        return found | {"fragment": int(self.resumed[gt].sum())}

    def switches(self) -> list[dict[str, int]]:
        """Identity switches: frame (0-based), ground-truth id, predicted id before and after, frames since match."""
        return [
            {
                "frame": int(self.gt.frames[row]),
                "object": int(self.gt.track_ids[row]),
                "from": int(self.previous_ids[row]),
                "to": int(self.matched_ids[row]),
                "gap": int(self.gaps[row]),
            }
            for row in np.flatnonzero(self.gt_outcomes == GT_OUTCOMES.index("identity switch")).tolist()
        ]

    def errors_per_frame(self) -> dict[int, int]:
        """Frame number -> misses + switches + false positives."""
        wrong = np.concatenate([self.gt.frames[self.gt_outcomes > 0], self.pred.frames[self.pred_outcomes == 1]])
        frames, numbers = np.unique(wrong, return_counts=True)
        return dict(zip(frames.tolist(), numbers.tolist(), strict=True))

    def density(self, frames: np.ndarray) -> np.ndarray:
        """(N,) ground-truth boxes of the class in each of these frames."""
        starts, stops = (np.searchsorted(self.gt.frames, frames, side=side) for side in ("left", "right"))
        density: np.ndarray = stops - starts
        return density


def box_outcomes(
    sequence: ScoredSequence, classes: tuple[str, ...], protocol: str = "plain"
) -> dict[str, ClassOutcomes]:
    """Outcomes of every box of a sequence, by class (arguments and errors as in ``metrics.score``)."""
    return {name: _class_outcomes(*prepare_class(sequence, classes, name, protocol)) for name in classes}


def _class_outcomes(gt: TrackRows, pred: TrackRows, data: dict[str, Any]) -> ClassOutcomes:
    missed = GT_OUTCOMES.index("missed")
    false_positive, ignored = PRED_OUTCOMES.index("false positive"), PRED_OUTCOMES.index("ignored")
    gt_outcomes = np.full(len(gt), missed)
    pred_outcomes = np.full(len(pred), ignored)
    matched_ids, previous_ids = np.full(len(gt), -1), np.full(len(gt), -1)
    gaps, resumed, ious = np.zeros(len(gt), np.int64), np.zeros(len(gt), bool), np.zeros(len(gt))
    # Per object, by TrackEval's contiguous number: the last match of all, and the match in the last scored frame.
    last_id = np.full(data["num_gt_ids"], -1)
    last_frame = np.full(data["num_gt_ids"], -1)
    current_id = np.full(data["num_gt_ids"], -1)
    for step, frame in enumerate(data["frames"].tolist()):
        rows, columns = data["gt_rows"][step], data["tracker_rows"][step]
        pred_outcomes[columns] = false_positive
        if not len(rows) or not len(columns):
            continue  # as TrackEval: such a frame does not change the current matches
        objects, similarity = data["gt_ids"][step], data["similarity_scores"][step]
        continues = current_id[objects][:, None] == pred.track_ids[columns][None]
        row_picks, column_picks = match(similarity, _CONTINUES * continues)
        matched, predictions, objects = rows[row_picks], columns[column_picks], objects[row_picks]
        ids = pred.track_ids[predictions]
        matched_before = last_id[objects] >= 0
        switched = matched_before & (last_id[objects] != ids)
        gt_outcomes[matched] = np.where(switched, GT_OUTCOMES.index("identity switch"), GT_OUTCOMES.index("tracked"))
        pred_outcomes[predictions] = PRED_OUTCOMES.index("true positive")
        matched_ids[matched], previous_ids[matched] = ids, last_id[objects]
        gaps[matched] = np.where(matched_before, frame - last_frame[objects], 0)
        resumed[matched] = matched_before & (current_id[objects] < 0)
        ious[matched] = similarity[row_picks, column_picks]
        last_id[objects], last_frame[objects] = ids, frame
        current_id[:] = -1
        current_id[objects] = ids
    return ClassOutcomes(gt, pred, gt_outcomes, pred_outcomes, matched_ids, previous_ids, gaps, resumed, ious)
