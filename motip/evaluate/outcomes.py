"""Why a score is what it is: the fate of every ground-truth and every predicted box.

The matching is CLEAR's (Bernardin and Stiefelhagen 2008, as TrackEval counts it): in each frame a pair that was matched
in the previous one goes first, then the largest IoU. Counts therefore equal TP, FN, FP, IDSW and Frag of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from motip.data.sequence import TrackRows
from motip.evaluate.metrics import prepare
from motip.evaluate.protocols import ScoredSequence
from motip.evaluate.regions import MATCH_IOU, distance_to_border

GT_FATES = ("tracked", "identity switch", "missed")
PRED_FATES = ("true positive", "false positive", "ignored")
SIZE_BINS = {"tiny": 16.0**2, "small": 32.0**2, "medium": 96.0**2, "large": np.inf}
"""Upper bounds of a box's area in square pixels: COCO's three bins, the smallest split for aerial images."""

_CONTINUES = 1000.0  # outweighs any IoU, so a pair of the previous frame is kept wherever it still overlaps enough


@dataclass(frozen=True)
class ClassErrors:
    """Fates of the boxes of one class in one sequence.

    Attributes:
        gt, pred: the boxes, sorted by frame.
        gt_fates: (G,) index into GT_FATES.
        pred_fates: (P,) index into PRED_FATES.
        matched_ids: (G,) predicted track id on each ground-truth box, -1 where missed.
        previous_ids: (G,) predicted id the object had when it was last matched, -1 if it never was.
        gaps: (G,) frames since that match, 0 if none.
        resumed: (G,) bool, matched again after being unmatched: each is one fragment.
        ious: (G,) IoU with the matched prediction, 0 where missed.
    """

    gt: TrackRows
    pred: TrackRows
    gt_fates: np.ndarray
    pred_fates: np.ndarray
    matched_ids: np.ndarray
    previous_ids: np.ndarray
    gaps: np.ndarray
    resumed: np.ndarray
    ious: np.ndarray

    def counts(self) -> dict[str, int]:
        """Boxes by fate, and fragments; a switch is also a true positive of the predictions."""
        found = {name: int((self.gt_fates == index).sum()) for index, name in enumerate(GT_FATES)}
        found |= {name: int((self.pred_fates == index).sum()) for index, name in enumerate(PRED_FATES)}
        return found | {"fragment": int(self.resumed.sum())}

    def switches(self) -> list[dict[str, int]]:
        """Every identity switch: frame (0-based), ground-truth id, id before, id after, frames in between."""
        return [
            {
                "frame": int(self.gt.frames[row]),
                "object": int(self.gt.track_ids[row]),
                "from": int(self.previous_ids[row]),
                "to": int(self.matched_ids[row]),
                "gap": int(self.gaps[row]),
            }
            for row in np.flatnonzero(self.gt_fates == GT_FATES.index("identity switch")).tolist()
        ]

    def errors_per_frame(self) -> dict[int, int]:
        """Frame number -> misses + switches + false positives, to find the frames worth looking at."""
        wrong = np.concatenate([self.gt.frames[self.gt_fates > 0], self.pred.frames[self.pred_fates == 1]])
        frames, numbers = np.unique(wrong, return_counts=True)
        return dict(zip(frames.tolist(), numbers.tolist(), strict=True))

    def distance_to_border(self, width: int, height: int) -> np.ndarray:
        """(G,) pixels between each ground-truth box and the nearest image border, 0 where it touches or crosses."""
        return distance_to_border(self.gt.boxes_xyxy, width, height)

    def density(self) -> np.ndarray:
        """(G,) ground-truth boxes of the class in the same frame."""
        _, inverse, numbers = np.unique(self.gt.frames, return_inverse=True, return_counts=True)
        density: np.ndarray = numbers[inverse]
        return density


def explain(sequence: ScoredSequence, classes: tuple[str, ...], protocol: str = "plain") -> dict[str, ClassErrors]:
    """Sort every box of a sequence, per class (arguments and errors as in ``metrics.score``)."""
    return {name: _explain_class(*prepare(sequence, classes, name, protocol)) for name in classes}


def _explain_class(gt: TrackRows, pred: TrackRows, data: dict[str, Any]) -> ClassErrors:
    missed = GT_FATES.index("missed")
    false_positive, ignored = PRED_FATES.index("false positive"), PRED_FATES.index("ignored")
    gt_fates = np.full(len(gt), missed)
    pred_fates = np.full(len(pred), ignored)
    matched_ids, previous_ids = np.full(len(gt), -1), np.full(len(gt), -1)
    gaps, resumed, ious = np.zeros(len(gt), np.int64), np.zeros(len(gt), bool), np.zeros(len(gt))
    # Per object, by TrackEval's contiguous number: the last match ever, and the match in the last judged frame.
    last_id = np.full(data["num_gt_ids"], -1)
    last_frame = np.full(data["num_gt_ids"], -1)
    current_id = np.full(data["num_gt_ids"], -1)
    for step, frame in enumerate(data["frames"].tolist()):
        rows, columns = data["gt_rows"][step], data["tracker_rows"][step]
        pred_fates[columns] = false_positive
        if not len(rows) or not len(columns):
            continue  # as TrackEval: such a frame leaves the memory of current matches alone
        objects, similarity = data["gt_ids"][step], data["similarity_scores"][step]
        row_picks, column_picks = _match(similarity, current_id[objects][:, None] == pred.track_ids[columns][None])
        hit, by, objects = rows[row_picks], columns[column_picks], objects[row_picks]
        ids = pred.track_ids[by]
        seen_before = last_id[objects] >= 0
        switched = seen_before & (last_id[objects] != ids)
        gt_fates[hit] = np.where(switched, GT_FATES.index("identity switch"), GT_FATES.index("tracked"))
        pred_fates[by] = PRED_FATES.index("true positive")
        matched_ids[hit], previous_ids[hit] = ids, last_id[objects]
        gaps[hit] = np.where(seen_before, frame - last_frame[objects], 0)
        resumed[hit] = seen_before & (current_id[objects] < 0)
        ious[hit] = similarity[row_picks, column_picks]
        last_id[objects], last_frame[objects] = ids, frame
        current_id[:] = -1
        current_id[objects] = ids
    return ClassErrors(gt, pred, gt_fates, pred_fates, matched_ids, previous_ids, gaps, resumed, ious)


def _match(similarity: np.ndarray, continues: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    slack = float(np.finfo(np.float64).eps)
    scores = np.where(similarity < MATCH_IOU - slack, 0.0, similarity + _CONTINUES * continues)
    rows, columns = linear_sum_assignment(scores, maximize=True)
    real = scores[rows, columns] > slack
    return rows[real], columns[real]
