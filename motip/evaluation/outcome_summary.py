"""Box outcomes counted by class, size, occlusion, truncation, distance to the border, and crowding."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from motip.data.sequence import ClassMap, Sequence, TrackRows
from motip.evaluation.outcomes import SIZE_BINS, ClassOutcomes, box_outcomes
from motip.evaluation.protocols import ScoredSequence
from motip.evaluation.regions import areas, distance_to_border

_OCCLUSION = ("not occluded", "partly occluded", "heavily occluded", "unknown")
_TRUNCATION = ("not truncated", "truncated", "unknown")
_BORDER = {"at the border": 1.0, "within 50 px of it": 50.0, "farther inside": np.inf}
"""Upper bounds of the distance to the nearest image border, in pixels."""
CROWD = {"up to 4 in the frame": 4.0, "5 to 9": 9.0, "10 to 19": 19.0, "20 to 49": 49.0, "50 and more": np.inf}
"""Upper bounds of the number of labelled boxes of the class in the frame, inclusive."""
_GAPS = {"next frame": 1.0, "2 to 10 frames": 10.0, "11 to 30 frames": 30.0, "more than 30 frames": np.inf}
"""Upper bounds of the frames between an object's last match and its identity switch, inclusive."""

_HAS_BOTH_ATTRIBUTES = ("bdd100k", "visdrone")
"""Formats with occlusion and truncation of each box."""

_WORST_FRAMES = 20
"""Number of frames listed by ``worst_frames``."""

Group = Counter[str]
"""Outcome -> boxes; see ``OutcomeSummary``."""


@dataclass
class OutcomeSummary:
    """Outcomes in any number of sequences of one source.

    Attributes:
        totals: class -> outcome -> boxes: GT_OUTCOMES (which sum to ``boxes``), ``fragment``, PRED_OUTCOMES.
        groups: class -> dimension (size, occlusion, truncation, border, crowd) -> group -> outcome -> boxes. Occlusion
            and truncation are attributes of labels, so they do not group predictions. Within each dimension the groups
            sum to the totals; boxes without the attribute in their format are in the group ``unknown``.
        gaps: class -> group of GAPS -> identity switches.
        switches: every identity switch: sequence, class, frame (0-based), object, from, to, gap (frames).
        frames: (sequence, frame) -> misses + switches + false positives.
    """

    totals: dict[str, Group] = field(default_factory=dict)
    groups: dict[str, dict[str, dict[str, Group]]] = field(default_factory=dict)
    gaps: dict[str, Counter[str]] = field(default_factory=dict)
    switches: list[dict[str, Any]] = field(default_factory=list)
    frames: Counter[tuple[str, int]] = field(default_factory=Counter)

    def add(self, other: OutcomeSummary) -> None:
        """Add the counts of another sequence with the same classes."""
        for name, totals in other.totals.items():
            self.totals.setdefault(name, Counter()).update(totals)
            self.gaps.setdefault(name, Counter()).update(other.gaps[name])
            for dimension, groups in other.groups[name].items():
                own = self.groups.setdefault(name, {}).setdefault(dimension, {})
                for group, counts in groups.items():
                    own.setdefault(group, Counter()).update(counts)
        self.switches += other.switches
        self.frames += other.frames

    def table(self, class_name: str) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the text table of one class; groups without a box are omitted."""
        rows = [_row("all", "", self.totals[class_name])]
        for dimension, groups in self.groups[class_name].items():
            filled = [(group, counts) for group, counts in groups.items() if any(counts.values())]
            rows += [_row("" if index else dimension, *each) for index, each in enumerate(filled)]
        return ["", "", "boxes", "missed", "missed %", "ID switches", "fragments", "false pos.", "ignored"], rows

    def worst_frames(self, number: int = _WORST_FRAMES) -> list[dict[str, Any]]:
        """The frames with the most errors: sequence, frame (0-based), errors."""
        most = sorted(self.frames.items(), key=lambda item: (-item[1], item[0]))[:number]
        return [{"sequence": name, "frame": frame, "errors": errors} for (name, frame), errors in most]

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable values."""
        return {
            "totals": self.totals,
            "groups": self.groups,
            "switch_gaps": self.gaps,
            "switches": self.switches,
            "worst_frames": self.worst_frames(),
        }


def summarise_outcomes(
    labels: Sequence, scored: ScoredSequence, class_map: ClassMap, protocol: str = "plain"
) -> OutcomeSummary:
    """Count the box outcomes of one sequence.

    Args:
        labels: the sequence as read, with image size, occlusion and truncation.
        scored: the same sequence after ``scored_sequence``, with the predictions.

    Raises:
        MotipError: as ``metrics.score``.
    """
    summary = OutcomeSummary()
    for class_id, (name, errors) in enumerate(box_outcomes(scored, class_map.names, protocol).items()):
        gt_groups, pred_groups = _groupings(errors, labels, class_map, class_id)
        summary.totals[name] = Counter({"boxes": len(errors.gt)} | errors.counts())
        summary.groups[name] = {
            dimension: {
                group: Counter(
                    {"boxes": int(mask.sum())} | errors.counts(mask, pred_groups.get(dimension, {}).get(group))
                )
                for group, mask in groups.items()
            }
            for dimension, groups in gt_groups.items()
        }
        switches = errors.switches()
        gaps = np.array([each["gap"] for each in switches], np.float64)
        summary.gaps[name] = Counter({group: int(mask.sum()) for group, mask in _binned(gaps, _GAPS).items()})
        summary.switches += [{"sequence": scored.name, "class": name, **each} for each in switches]
        summary.frames.update({(scored.name, frame): number for frame, number in errors.errors_per_frame().items()})
    return summary


Masks = dict[str, np.ndarray]
"""Group -> (N,) bool."""


def _groupings(
    errors: ClassOutcomes, labels: Sequence, class_map: ClassMap, class_id: int
) -> tuple[dict[str, Masks], dict[str, Masks]]:
    """Dimension -> group -> mask, for the labels and for the predictions."""
    occlusion, truncation = _attributes(errors, labels, class_map, class_id)
    attributes = {
        "occlusion": {name: occlusion == level for level, name in enumerate(_OCCLUSION)},
        "truncation": {name: truncation == level for level, name in enumerate(_TRUNCATION)},
    }

    def grouped(rows: TrackRows, attributes: dict[str, Masks]) -> dict[str, Masks]:
        distances = distance_to_border(rows.boxes_xyxy, labels.width, labels.height)
        return {
            "size": _binned(areas(rows.boxes_xyxy.astype(np.float64)), SIZE_BINS, inclusive=False),
            **attributes,
            "border": _binned(distances, _BORDER, inclusive=False),
            "crowd": _binned(errors.density(rows.frames), CROWD),
        }

    return grouped(errors.gt, attributes), grouped(errors.pred, {})


def _attributes(
    errors: ClassOutcomes, labels: Sequence, class_map: ClassMap, class_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """(G,) positions in OCCLUSION and in TRUNCATION of each labelled box.

    MOTChallenge files have no truncation, and a visibility that DanceTrack and older files set to 1 throughout: a video
    without any occlusion counts as unannotated.
    """
    has_truncation = labels.dataset in _HAS_BOTH_ATTRIBUTES
    has_occlusion = has_truncation or any(frame.occlusion.any() for frame in labels.frames)
    found: dict[tuple[int, bytes], list[tuple[int, int]]] = defaultdict(list)
    for frame in labels.frames:
        for row in np.flatnonzero(class_map.class_ids(frame.categories) == class_id).tolist():
            levels_of_box = int(frame.occlusion[row]), int(frame.truncation[row])
            found[frame.number, _key(frame.boxes_xyxy[row])].append(levels_of_box)
    levels = np.full((len(errors.gt), 2), -1)
    for row, (number, box) in enumerate(zip(errors.gt.frames.tolist(), errors.gt.boxes_xyxy, strict=True)):
        # Identical boxes of one class in one frame are consumed in order.
        if same := found[number, _key(box)]:
            levels[row] = same.pop(0)
    known = (levels >= 0) & np.array([has_occlusion, has_truncation])
    unknown = np.array([_OCCLUSION.index("unknown"), _TRUNCATION.index("unknown")])
    occlusion, truncation = np.where(known, levels, unknown).T
    return occlusion, truncation


def _key(box_xyxy: np.ndarray) -> bytes:
    return np.ascontiguousarray(box_xyxy, np.float32).tobytes()


def _binned(values: np.ndarray, bounds: Mapping[str, float], inclusive: bool = True) -> Masks:
    bins = np.searchsorted(list(bounds.values()), values, side="left" if inclusive else "right")
    return {name: bins == index for index, name in enumerate(bounds)}


def _row(dimension: str, group: str, counts: Group) -> list[str]:
    share = f"{100 * counts['missed'] / counts['boxes']:.1f}" if counts["boxes"] else "-"
    columns = ("identity switch", "fragment", "false positive", "ignored")
    others = [str(counts[name]) if name in counts else "-" for name in columns]
    return [dimension, group, str(counts["boxes"]), str(counts["missed"]), share, *others]
