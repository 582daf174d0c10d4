"""Evaluation protocols: which boxes count, and the preparation of a labelled sequence for scoring.

Scores are comparable only with the same protocol, classes and sequences. The source of each rule is cited.

``plain``
    Any classes. Unmatched predictions with at least half of their area in the union of the ignore regions (boxes of
    unmapped categories, and regions marked by the format) are removed after matching.
``bdd100k``
    BDD100K MOT: unmatched predictions with more than half of their own area inside one crowd box or one distractor
    (other person, trailer, other vehicle) are removed after matching (bdd100k docs, "Evaluation"; TrackEval BDD100K).
``visdrone``
    VisDrone MOT toolkit: ground truth and predictions with at least half of their area in the union of the ignored
    regions (categories 0 and 11) are removed before matching; a ground-truth track that changes class becomes a new
    track; predictions after the last labelled frame are cut; a class absent from a sequence is not scored in it.
``motchallenge``
    MOTChallenge / DanceTrack, one class: every labelled box takes part in a first matching, and predictions matched to
    a distractor (person on vehicle, static person, distractor, reflection) are removed (TrackEval, MOT17 rules).
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from motip.config import Source
from motip.data.sequence import UNTRACKED, ClassMap, Sequence, TrackRows
from motip.errors import MotipError

PLAN_CLASSES = ("pedestrian", "car")
BDD100K_CLASSES = ("pedestrian", "rider", "car", "bus", "truck", "train", "motorcycle", "bicycle")
BDD100K_DISTRACTORS = frozenset({"other person", "trailer", "other vehicle"})
_MOTCHALLENGE_DISTRACTORS = frozenset({"person on vehicle", "static person", "distractor", "reflection"})
VISDRONE_CLASSES = ("car", "bus", "truck", "pedestrian", "van")

_RegionRule = Literal["unmatched in one", "unmatched in union", "before matching", "matched one-to-one"]


@dataclass(frozen=True)
class EvaluationProtocol:
    """Rules of one evaluation protocol.

    Attributes:
        name: as shown in tables.
        class_lists: class lists the protocol is defined for (in any order); empty: any.
        region_rule: condition that removes a box inside an ignore region.
        region_overlap: share of the box's own area that must lie inside (unused for one-to-one matching).
        strict: whether the share must exceed ``region_overlap`` instead of reaching it.
        split_class_flips: a ground-truth track that changes class becomes another track.
        cut_after_labels: predictions after the last frame with ground truth are cut.
        score_absent_classes: false positives count in a sequence without ground truth of the class.
    """

    name: str
    class_lists: tuple[tuple[str, ...], ...] = ()
    region_rule: _RegionRule = "unmatched in union"
    region_overlap: float = 0.5
    strict: bool = False
    split_class_flips: bool = False
    cut_after_labels: bool = False
    score_absent_classes: bool = True

    def check_classes(self, classes: tuple[str, ...]) -> None:
        """Raise MotipError if the protocol is not defined for this class list."""
        if not classes or len(set(classes)) != len(classes):
            raise MotipError(
                "scores need a list of distinct classes", where="classes", found=", ".join(classes) or "none"
            )
        if self.class_lists and not any(set(classes) == set(allowed) for allowed in self.class_lists):
            raise MotipError(
                f"the {self.name} protocol is not defined for these classes",
                where="classes",
                found=", ".join(classes),
                expected=" or ".join("[" + ", ".join(allowed) + "]" for allowed in self.class_lists),
                fix="use the protocol `plain` for other class lists; its scores are not comparable with others",
            )


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        EvaluationProtocol("plain"),
        EvaluationProtocol("bdd100k", (BDD100K_CLASSES, PLAN_CLASSES), "unmatched in one", strict=True),
        EvaluationProtocol(
            "visdrone",
            (VISDRONE_CLASSES, PLAN_CLASSES),
            "before matching",
            split_class_flips=True,
            cut_after_labels=True,
            score_absent_classes=False,
        ),
        EvaluationProtocol("motchallenge", (("pedestrian",), ("person",)), "matched one-to-one"),
    )
}


def find_protocol(name: str) -> EvaluationProtocol:
    """The protocol with this name.

    Raises:
        MotipError: the name is unknown; the error lists the valid names.
    """
    if name not in PROTOCOLS:
        raise MotipError(f"there is no protocol {name}", where="protocol", found=name, expected=" | ".join(PROTOCOLS))
    return PROTOCOLS[name]


@dataclass(frozen=True)
class ScoredSequence:
    """Ground truth and predictions of one sequence, prepared for a protocol.

    Attributes:
        name: unique among the sequences scored together.
        gt, pred: boxes in pixels with ids unique per frame; class ids index the scored class list.
        frames: (F,) 0-based numbers of the labelled frames; None: those with a box. Predictions in other frames are an
            error, unless the protocol cuts them.
        ignore_frames: (K,) frame number of each ignore region.
        ignore_xyxy: (K, 4) ignore regions in pixels.
        ignore_removes: (K,) bool, False for a box that takes part in one-to-one matching without removing its match;
            None: all remove.
    """

    name: str
    gt: TrackRows
    pred: TrackRows
    frames: np.ndarray | None = None
    ignore_frames: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    ignore_xyxy: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    ignore_removes: np.ndarray | None = None


def scored_sequence(
    sequence: Sequence, class_map: ClassMap, pred: TrackRows, protocol: str = "plain"
) -> ScoredSequence:
    """Split the boxes of a labelled sequence into ground truth and ignore regions, by `protocol`.

    Args:
        pred: rows of the tracker; class ids index ``class_map.names``.

    Raises:
        MotipError: the protocol is unknown or not defined for the class list.
    """
    rules = find_protocol(protocol)
    rules.check_classes(class_map.names)
    # boxes of all frames
    numbers = np.array([frame.number for frame in sequence.frames], np.int64)
    box_frames = np.repeat(numbers, [len(frame.categories) for frame in sequence.frames])
    empty = TrackRows.empty()
    ids = np.concatenate([empty.track_ids, *(frame.track_ids for frame in sequence.frames)])
    boxes = np.concatenate([empty.boxes_xyxy, *(frame.boxes_xyxy for frame in sequence.frames)])
    categories = [category for frame in sequence.frames for category in frame.categories]
    class_ids = class_map.class_ids(categories)
    # regions: the readers mark VisDrone's categories 0 and 11 and BDD100K's crowds as ignored
    region = np.concatenate([np.zeros(0, bool), *(frame.ignore for frame in sequence.frames)]) | (ids == UNTRACKED)
    if rules.name in ("plain", "motchallenge"):
        region |= class_ids < 0
    elif rules.name == "bdd100k":
        region |= _is_any_of(categories, BDD100K_DISTRACTORS)
    removes = np.ones(len(ids), bool)
    if rules.name == "motchallenge":
        removes = _is_any_of(categories, _MOTCHALLENGE_DISTRACTORS)
    # ground truth
    keep = (class_ids >= 0) & ~region
    gt = TrackRows(box_frames[keep], ids[keep], boxes[keep], np.ones(int(keep.sum()), np.float32), class_ids[keep])
    if rules.split_class_flips:
        gt = split_class_flips(gt)
    return ScoredSequence(
        sequence.name, gt, pred, numbers, box_frames[region], boxes[region].astype(np.float64), removes[region]
    )


def split_class_flips(rows: TrackRows) -> TrackRows:
    """Assign a track a new id at each change of its class; the first segment keeps its id."""
    order = np.lexsort((rows.frames, rows.track_ids))
    ids, classes = rows.track_ids[order], rows.class_ids[order]
    same_track = np.concatenate([[False], ids[1:] == ids[:-1]])
    flips = same_track & np.concatenate([[False], classes[1:] != classes[:-1]])
    if not flips.any():
        return rows
    # `segment` counts the class changes of a track so far.
    changes = np.cumsum(flips)
    track_starts = np.maximum.accumulate(np.where(~same_track, np.arange(len(ids)), 0))
    segment = changes - changes[track_starts]
    new_ids = np.where(segment > 0, ids.max() + changes, ids)
    split = np.empty_like(rows.track_ids)
    split[order] = new_ids
    return replace(rows, track_ids=split)


def _is_any_of(categories: SequenceOf[str], wanted: frozenset[str]) -> np.ndarray:
    # Datasets and their tools disagree on underscores in category names.
    return np.array([category.lower().replace("_", " ") in wanted for category in categories], bool)


def protocol_for(source: Source, class_names: Collection[str]) -> str:
    """Name of the format's own protocol if it has one and it is defined for these classes, else `plain`."""
    defined_for = {"pedestrian"} if source.format == "motchallenge" else set(PLAN_CLASSES)
    return source.format if source.format in PROTOCOLS and set(class_names) == defined_for else "plain"
