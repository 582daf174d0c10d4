"""HOTA, CLEAR and Identity metrics, by TrackEval's metric classes (no other module imports TrackEval).

``score`` is ``score_sequence`` (one sequence, the expensive part) followed by ``combine``; callers that distribute
sequences over processes call the two separately.

Sources: HOTA, Luiten et al., IJCV 2021; CLEAR MOT, Bernardin and Stiefelhagen 2008; IDF1, Ristani et al. 2016.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from motip.data.sequence import TrackRows
from motip.errors import MotipError
from motip.evaluation.counts import Counts, StoredCell, from_stored, to_stored
from motip.evaluation.protocols import EvaluationProtocol, ScoredSequence, find_protocol
from motip.evaluation.regions import EPS, box_iou, match, share_in_one, share_in_union
from motip.evaluation.scores import Scores, Values

with contextlib.redirect_stdout(io.StringIO()):  # TrackEval prints at import where pycocotools is missing
    from trackeval.metrics import CLEAR, HOTA, Identity


class SparseIdentity(Identity):
    """TrackEval's Identity with the assignment solved over (ground-truth ids × tracker ids) only.

    An unmatched pair costs exactly its boxes, so the (n+m)² problem of the definition has the same optimum as the
    largest total of common boxes: equal results in a fraction of the time and memory.
    """

    def eval_sequence(self, data: dict[str, Any]) -> dict[str, Any]:
        """Identity fields of one sequence in TrackEval's form."""
        result: dict[str, Any] = dict.fromkeys(self.fields, 0)
        common = np.zeros((data["num_gt_ids"], data["num_tracker_ids"]))
        for gt_ids, tracker_ids, similarity in zip(
            data["gt_ids"], data["tracker_ids"], data["similarity_scores"], strict=True
        ):
            rows, columns = np.nonzero(similarity >= self.threshold)
            common[gt_ids[rows], tracker_ids[columns]] += 1
        rows, columns = linear_sum_assignment(common, maximize=True)
        result["IDTP"] = int(common[rows, columns].sum())
        result["IDFN"] = data["num_gt_dets"] - result["IDTP"]
        result["IDFP"] = data["num_tracker_dets"] - result["IDTP"]
        return self._compute_final_fields(result)


FAMILIES = {
    "HOTA": HOTA(),
    "CLEAR": CLEAR({"PRINT_CONFIG": False}),
    "Identity": SparseIdentity({"PRINT_CONFIG": False}),
}
PERCENT_FIELDS = {
    "HOTA": ("HOTA", "DetA", "AssA", "DetRe", "DetPr", "AssRe", "AssPr", "LocA"),
    "CLEAR": ("MOTA", "MOTP"),
    "Identity": ("IDF1", "IDR", "IDP"),
}
COUNT_FIELDS = {"IDSW": "IDSW", "FP": "CLR_FP", "FN": "CLR_FN", "TP": "CLR_TP", "Frag": "Frag", "MT": "MT", "ML": "ML"}


@dataclass(frozen=True)
class SequenceCounts:
    """Counts of one sequence, in picklable containers.

    Attributes:
        name: the sequence.
        per_class: class name -> counts, for every class.
        agnostic: counts with all classes taken as one.
        removed: boxes removed by the protocol, by reason.
    """

    name: str
    per_class: dict[str, Counts]
    agnostic: Counts
    removed: Counter[str]

    def to_json(self) -> dict[str, Any]:
        """The fields that ``combine`` needs, as JSON-serialisable values."""
        return {
            "per_class": {name: to_stored(cell) for name, cell in self.per_class.items()},
            "agnostic": to_stored(self.agnostic),
            "removed": dict(sorted(self.removed.items())),
        }

    @classmethod
    def from_json(cls, name: str, stored: Mapping[str, Any]) -> SequenceCounts:
        """Inverse of ``to_json``; raises KeyError if a field is missing."""

        def restored(cell: StoredCell) -> Counts:
            # Combining a single cell computes the fields that were not stored.
            return _combined("sequences", {name: from_stored(cell)})

        per_class = {label: restored(cell) for label, cell in stored["per_class"].items()}
        return cls(name, per_class, restored(stored["agnostic"]), Counter(stored["removed"]))


def score(
    sequences: Iterable[ScoredSequence],
    classes: Iterable[str],
    protocol: str = "plain",
    split: str = "val",
    averaged: Collection[str] | None = None,
) -> Scores:
    """Score every sequence × class and combine.

    Args:
        sequences: ground truth and predictions; names must be distinct.
        classes: names in the order of the class ids in the rows.
        protocol: see ``motip.evaluation.protocols``.
        split: stored with the scores.
        averaged: classes that the class average is taken over; None: all. The others are scored as well.

    Returns:
        Scores; shares are in percent.

    Raises:
        MotipError: unknown protocol, duplicate ids in a frame, a class id outside the list, boxes that are not finite,
            predictions in frames that were not labelled, or no ground truth at all.
    """
    names = tuple(classes)
    results = [score_sequence(sequence, names, protocol) for sequence in sequences]
    return combine(results, names, protocol, split, averaged)


def score_sequence(sequence: ScoredSequence, classes: tuple[str, ...], protocol: str = "plain") -> SequenceCounts:
    """Counts of one sequence (arguments and errors as for ``score``)."""
    rules = find_protocol(protocol)
    rules.check_classes(tuple(classes))
    removed: Counter[str] = Counter()
    sequence = _clean(sequence, len(classes), rules, removed)
    per_class = {name: _counts(sequence, index, rules, removed) for index, name in enumerate(classes)}
    return SequenceCounts(sequence.name, per_class, _counts(sequence, None, rules, Counter()), removed)


def prepare_class(
    sequence: ScoredSequence, classes: tuple[str, ...], class_name: str, protocol: str = "plain"
) -> tuple[TrackRows, TrackRows, dict[str, Any]]:
    """TrackEval's input for one class, for box-by-box analysis of the scores.

    Returns:
        ground truth, predictions (both sorted by frame, after the protocol's filters) and TrackEval's dictionary with
        three more lists: ``frames``, and per frame ``gt_rows`` and ``tracker_rows``, positions in the two.
        Predictions in no frame's ``tracker_rows`` were ignored.
    """
    rules = find_protocol(protocol)
    rules.check_classes(classes)
    removed: Counter[str] = Counter()
    cleaned = _clean(sequence, len(classes), rules, removed)
    return _class_data(cleaned, classes.index(class_name), rules, removed)


def combine(
    results: list[SequenceCounts],
    classes: tuple[str, ...],
    protocol: str = "plain",
    split: str = "val",
    averaged: Collection[str] | None = None,
) -> Scores:
    """Scores over all sequences: sums within a class, then means over the classes with ground truth.

    Raises:
        MotipError: a sequence is repeated, or no averaged class has ground truth.
    """
    # Input: each sequence once, at least one averaged class with ground truth.
    names = [result.name for result in results]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise MotipError("a sequence is scored twice", where="sequences", found=", ".join(repeated))
    per_class = {
        name: _combined("sequences", {result.name: result.per_class[name] for result in results}) for name in classes
    }
    headline = tuple(name for name in classes if averaged is None or name in averaged)
    labelled = {name: per_class[name] for name in headline if _gt_boxes(per_class[name])}
    if not labelled:
        raise MotipError(
            "no ground truth to score against",
            where=f"{len(results)} sequences, split {split}",
            expected=f"labelled boxes of at least one of: {', '.join(headline) or 'no class'}",
            fix="check the class map, or track this split without scores",
        )
    # Means: over labelled classes, over detections, and without classes.
    return Scores(
        protocol=protocol,
        classes=classes,
        split=split,
        sequences=tuple(names),
        class_averaged=_values(_combined("classes_class_averaged", labelled)),
        detection_averaged=_values(_combined("classes_det_averaged", per_class)),
        class_agnostic=_values(_combined("sequences", {result.name: result.agnostic for result in results})),
        per_class={name: _values(counts) for name, counts in per_class.items()},
        per_sequence={
            result.name: {name: _values(counts) for name, counts in result.per_class.items()} for result in results
        },
        classes_without_gt=tuple(name for name in classes if name not in labelled),
        removed=dict(sorted(sum((result.removed for result in results), Counter()).items())),
        counts={result.name: result.to_json() for result in results},
    )


def _combined(over: str, cells: dict[str, Counts]) -> Counts:
    """One cell from several, by TrackEval's method ``combine_<over>`` of each metric family."""
    return {
        family: getattr(metric, f"combine_{over}")({name: cell[family] for name, cell in cells.items()})
        for family, metric in FAMILIES.items()
    }


def _gt_boxes(counts: Counts) -> int:
    return int(counts["CLEAR"]["CLR_TP"] + counts["CLEAR"]["CLR_FN"])


def _values(counts: Counts) -> Values:
    """Percentages and counts; a share without ground truth is None, since 0 would read as a bad score."""
    scored = _gt_boxes(counts) > 0
    values: Values = {
        field: float(100.0 * np.mean(counts[family][field])) if scored else None
        for family, fields in PERCENT_FIELDS.items()
        for field in fields
    }
    for name, field in COUNT_FIELDS.items():
        values[name] = int(counts["CLEAR"][field])
    return values | {"GT": _gt_boxes(counts)}


def _clean(
    sequence: ScoredSequence, num_classes: int, rules: EvaluationProtocol, removed: Counter[str]
) -> ScoredSequence:
    """Check both sides and apply the filters of the protocol that precede matching."""
    # checks
    sequence = replace(sequence, gt=_sorted(sequence.gt), pred=_sorted(sequence.pred))
    _check_rows(sequence.gt, sequence.name, "ground truth", num_classes)
    _check_rows(sequence.pred, sequence.name, "prediction", num_classes)
    # predictions after the last label
    if rules.cut_after_labels:
        last = sequence.gt.frames.max(initial=-1)
        sequence = replace(
            sequence, pred=_keep(sequence.pred, sequence.pred.frames <= last, "predictions cut", removed)
        )
    # frames outside the sequence
    if sequence.frames is not None:
        for rows, what in ((sequence.gt, "ground truth"), (sequence.pred, "prediction")):
            outside = rows.frames[~np.isin(rows.frames, sequence.frames)]
            if len(outside):
                raise MotipError(
                    f"{what} boxes lie in frames that are not part of the sequence",
                    where=f"sequence {sequence.name}",
                    found=f"frame {int(outside[0])} (0-based) and {len(outside) - 1} more boxes",
                    expected=f"frames {sequence.frames.min()}..{sequence.frames.max()}",
                    fix="frame numbers are 0-based inside motip and 1-based in MOT files: check the conversion",
                )
    # ignored regions
    if rules.region_rule == "before matching":
        sequence = replace(
            sequence,
            gt=_drop_in_regions(sequence, sequence.gt, rules, "ground truth in ignored regions", removed),
            pred=_drop_in_regions(sequence, sequence.pred, rules, "predictions in ignored regions", removed),
        )
    return sequence


def _check_rows(rows: TrackRows, name: str, what: str, num_classes: int) -> None:
    where = f"sequence {name}, {what}"
    if not np.isfinite(rows.boxes_xyxy).all():
        raise MotipError(
            "a box is not finite", where=where, fix="usually the model has diverged: check its training losses"
        )
    wrong = (rows.class_ids < 0) | (rows.class_ids >= num_classes)
    if wrong.any():
        raise MotipError(
            "a class id is outside the class list",
            where=where,
            found=int(rows.class_ids[wrong][0]),
            expected=f"0..{num_classes - 1}",
            fix="class ids are 0-based inside motip and 1-based in MOT files: check the conversion and the class list",
        )
    order = np.lexsort((rows.track_ids, rows.frames))
    frames, ids = rows.frames[order], rows.track_ids[order]
    twice = np.flatnonzero((frames[1:] == frames[:-1]) & (ids[1:] == ids[:-1]))
    if len(twice):
        raise MotipError(
            "a track id occurs twice in one frame",
            where=where,
            found=f"id {int(ids[twice[0]])} in frame {int(frames[twice[0]])} (0-based); {len(twice)} such boxes in all",
            expected="each id at most once per frame",
        )


def _sorted(rows: TrackRows) -> TrackRows:
    return _select(rows, np.argsort(rows.frames, kind="stable"))


def _select(rows: TrackRows, index: np.ndarray) -> TrackRows:
    return TrackRows(
        rows.frames[index], rows.track_ids[index], rows.boxes_xyxy[index], rows.scores[index], rows.class_ids[index]
    )


def _keep(rows: TrackRows, keep: np.ndarray, reason: str, removed: Counter[str]) -> TrackRows:
    if not keep.all():
        removed[reason] += int((~keep).sum())
    return _select(rows, np.flatnonzero(keep))


def _drop_in_regions(
    sequence: ScoredSequence, rows: TrackRows, rules: EvaluationProtocol, reason: str, removed: Counter[str]
) -> TrackRows:
    keep = np.ones(len(rows), bool)
    for frame in np.intersect1d(rows.frames, sequence.ignore_frames):
        inside = rows.frames == frame
        regions = sequence.ignore_xyxy[sequence.ignore_frames == frame].astype(np.float64)
        keep[inside] = ~_covered(rows.boxes_xyxy[inside].astype(np.float64), regions, rules)
    return _keep(rows, keep, reason, removed)


def _covered(boxes: np.ndarray, regions: np.ndarray, rules: EvaluationProtocol) -> np.ndarray:
    """(N,) bool: the share of the box inside the regions reaches the protocol's threshold."""
    in_one = rules.region_rule == "unmatched in one"
    share = share_in_one(boxes, regions) if in_one else share_in_union(boxes, regions)
    return share > rules.region_overlap + EPS if rules.strict else share >= rules.region_overlap - EPS


def _counts(sequence: ScoredSequence, class_id: int | None, rules: EvaluationProtocol, removed: Counter[str]) -> Counts:
    """TrackEval's results for one class of one sequence."""
    _, _, data = _class_data(sequence, class_id, rules, removed)
    return {family: metric.eval_sequence(data) for family, metric in FAMILIES.items()}


def _class_data(
    sequence: ScoredSequence, class_id: int | None, rules: EvaluationProtocol, removed: Counter[str]
) -> tuple[TrackRows, TrackRows, dict[str, Any]]:
    """Rows of one class (None: all classes as one) and TrackEval's input: contiguous ids, similarities as IoU."""
    # rows of the class
    gt, pred = sequence.gt, sequence.pred
    if class_id is not None:
        gt = _select(gt, np.flatnonzero(gt.class_ids == class_id))
        pred = _select(pred, np.flatnonzero(pred.class_ids == class_id))
    if not rules.score_absent_classes and not len(gt):
        pred = _keep(pred, np.zeros(len(pred), bool), "predictions of classes absent from a sequence", removed)
    frames = sequence.frames
    if frames is None:
        frames = np.union1d(gt.frames, pred.frames)
    frames = np.unique(frames)
    # rows and regions of each frame
    gt_cuts = _frame_slices(gt.frames, frames)
    pred_cuts = _frame_slices(pred.frames, frames)
    region_order = np.argsort(sequence.ignore_frames, kind="stable")
    region_cuts = _frame_slices(sequence.ignore_frames[region_order], frames)
    regions = sequence.ignore_xyxy[region_order].astype(np.float64)
    removes = np.ones(len(regions), bool) if sequence.ignore_removes is None else sequence.ignore_removes[region_order]
    gt_boxes, pred_boxes = gt.boxes_xyxy.astype(np.float64), pred.boxes_xyxy.astype(np.float64)
    after_matching = rules.region_rule != "before matching" and len(regions) > 0
    # predictions to score, and their IoU with the ground truth
    similarities, pred_kept = [], []
    for gt_cut, pred_cut, region_cut in zip(gt_cuts, pred_cuts, region_cuts, strict=True):
        similarity = box_iou(gt_boxes[gt_cut], pred_boxes[pred_cut])
        kept = np.arange(pred_cut.start, pred_cut.stop)
        if after_matching and len(kept) and region_cut.stop > region_cut.start:
            scored = ~_to_ignore(similarity, pred_boxes[pred_cut], regions[region_cut], removes[region_cut], rules)
            removed["predictions in ignored regions"] += int((~scored).sum())
            kept, similarity = kept[scored], similarity[:, scored]
        similarities.append(similarity)
        pred_kept.append(kept)
    # contiguous ids
    gt_ids, gt_numbers = np.unique(gt.track_ids, return_inverse=True)
    all_kept = np.concatenate([np.zeros(0, np.int64), *pred_kept])
    pred_ids = np.unique(pred.track_ids[all_kept])
    return (
        gt,
        pred,
        {
            "seq": sequence.name,
            "num_timesteps": len(frames),
            "num_gt_ids": len(gt_ids),
            "num_tracker_ids": len(pred_ids),
            "num_gt_dets": len(gt),
            "num_tracker_dets": len(all_kept),
            "gt_ids": [gt_numbers[cut] for cut in gt_cuts],
            "tracker_ids": [np.searchsorted(pred_ids, pred.track_ids[kept]) for kept in pred_kept],
            "similarity_scores": similarities,
            "frames": frames,
            "gt_rows": [np.arange(cut.start, cut.stop) for cut in gt_cuts],
            "tracker_rows": pred_kept,
        },
    )


def _to_ignore(
    similarity: np.ndarray, pred_boxes: np.ndarray, regions: np.ndarray, removes: np.ndarray, rules: EvaluationProtocol
) -> np.ndarray:
    """(P,) bool: predictions of one frame that the protocol ignores."""
    ignored = np.zeros(len(pred_boxes), bool)
    if rules.region_rule == "matched one-to-one":
        rows, columns = match(np.concatenate([similarity, box_iou(regions, pred_boxes)]))
        removing = np.concatenate([np.zeros(len(similarity), bool), removes])
        ignored[columns[removing[rows]]] = True
        return ignored
    unmatched = np.ones(len(pred_boxes), bool)
    unmatched[match(similarity)[1]] = False
    ignored[unmatched] = _covered(pred_boxes[unmatched], regions, rules)
    return ignored


def _frame_slices(row_frames: np.ndarray, frames: np.ndarray) -> list[slice]:
    """For each of the sorted `frames`, its slice of the sorted `row_frames`."""
    starts = np.searchsorted(row_frames, frames, side="left")
    stops = np.searchsorted(row_frames, frames, side="right")
    return [slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]
