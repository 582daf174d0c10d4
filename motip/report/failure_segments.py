"""Failure segments: annotated boxes of a matched video, and its worst sequences, segments and frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from motip.evaluation.outcomes import GT_OUTCOMES, PRED_OUTCOMES, ClassOutcomes

TRACKED, MISSED, SWITCH, FALSE, IGNORED = "tracked", "missed", "identity switch", "false positive", "ignored"
KINDS = (TRACKED, MISSED, SWITCH, FALSE, IGNORED)

SWITCH_WEIGHT = 5
"""Weight of a switch: it counts in one frame although the track stays wrong, a miss counts in every frame it lasts."""
_SEGMENT_S = 4.0
_SEGMENT_FRAMES = (8, 120)
"""Shortest and longest segment in frames."""
_SWITCH_SHOWN_S = 0.6
"""Seconds a switched box stays orange in a video: a single frame is too short to see."""

Images = Callable[[Sequence[int]], Iterator[np.ndarray]]


@dataclass(frozen=True)
class BoxAnnotation:
    """A box of one frame with the outcome of matching.

    Attributes:
        kind: one of KINDS.
        box: (4,) xyxy pixels; the prediction if there is one, else the label.
        truth: (4,) xyxy pixels; the label that the prediction was matched with, None if unmatched.
        text: label of the box: the track id (from 1, as in MOT files), at a switch the ids before and after, for a
            missed box the class.
    """

    kind: str
    box: np.ndarray
    truth: np.ndarray | None = None
    text: str = ""


@dataclass(frozen=True)
class MatchedVideo:
    """A video with the matching outcome of every labelled and predicted box.

    Attributes:
        frames: (F,) 0-based numbers of the labelled frames, in order; positions below index it.
        errors: class -> outcomes of its boxes (``motip.evaluation.outcomes.box_outcomes``).
        ignore_frames, ignore_xyxy: (K,), (K, 4) ignore regions in pixels.
        images: yields the images at positions, (H, W, 3) uint8 RGB each.
    """

    source: str
    name: str
    fps: float
    frames: np.ndarray
    errors: dict[str, ClassOutcomes]
    ignore_frames: np.ndarray
    ignore_xyxy: np.ndarray
    images: Images

    @property
    def title(self) -> str:
        return f"{self.source}/{self.name}"

    @cached_property
    def per_frame(self) -> dict[str, np.ndarray]:
        """Kind -> (F,) number of boxes at each position."""
        found = {kind: np.zeros(len(self.frames), np.int64) for kind in KINDS}
        for own in self.errors.values():
            for frames, outcomes, names in (
                (own.gt.frames, own.gt_outcomes, GT_OUTCOMES),
                (own.pred.frames, own.pred_outcomes, PRED_OUTCOMES),
            ):
                for kind in found.keys() & set(names):
                    positions = np.searchsorted(self.frames, frames[outcomes == names.index(kind)])
                    found[kind] += np.bincount(positions, minlength=len(self.frames))
        return found

    @cached_property
    def weights(self) -> np.ndarray:
        """(F,) error weight of each position: misses + false positives + SWITCH_WEIGHT * switches."""
        counts = self.per_frame
        weights: np.ndarray = counts[MISSED] + counts[FALSE] + SWITCH_WEIGHT * counts[SWITCH]
        return weights

    def counts(self, first: int = 0, last: int | None = None) -> dict[str, int]:
        """Kind -> number of boxes at the positions from first to last, both included."""
        end = len(self.frames) if last is None else last + 1
        return {kind: int(values[first:end].sum()) for kind, values in self.per_frame.items()}

    @property
    def boxes(self) -> int:
        """Number of labelled boxes outside ignore regions."""
        counts = self.counts()
        return counts[TRACKED] + counts[MISSED] + counts[SWITCH]

    @property
    def wrong_share(self) -> float:
        """(Misses + false positives + switches) / labelled boxes, 1 - MOTA; without labels, their number."""
        counts = self.counts()
        wrong = counts[MISSED] + counts[FALSE] + counts[SWITCH]
        return wrong / self.boxes if self.boxes else float(wrong)

    def switches(self, first: int, last: int) -> list[dict[str, Any]]:
        """Identity switches at positions first to last; frames and ids count from 1."""
        low, high = int(self.frames[first]), int(self.frames[last])
        return [
            {"class": name, "frame": each["frame"] + 1, "object": each["object"] + 1}
            | {"from": each["from"] + 1, "to": each["to"] + 1, "gap": each["gap"]}
            for name, own in self.errors.items()
            for each in own.switches()
            if low <= each["frame"] <= high
        ]

    def annotations(self, position: int, repeat_switches: bool = False) -> list[BoxAnnotation]:
        """Boxes to draw at a position; errors come last, so that they are on top.

        Args:
            repeat_switches: show a switch for _SWITCH_SHOWN_S seconds.
        """
        frame = int(self.frames[position])
        found = [BoxAnnotation(IGNORED, box) for box in self.ignore_xyxy[self.ignore_frames == frame]]
        repeats = round(_SWITCH_SHOWN_S * self.fps) if repeat_switches else 0
        for name, own in self.errors.items():
            found += _class_annotations(own, name, frame, repeats)
        return sorted(found, key=lambda each: _ORDER.index(each.kind))


_ORDER = (IGNORED, TRACKED, MISSED, FALSE, SWITCH)


def _class_annotations(own: ClassOutcomes, name: str, frame: int, repeats: int) -> Iterator[BoxAnnotation]:
    predicted = {
        int(own.pred.track_ids[row]): own.pred.boxes_xyxy[row] for row in np.flatnonzero(own.pred.frames == frame)
    }
    for row in np.flatnonzero(own.gt.frames == frame).tolist():
        kind, truth = GT_OUTCOMES[own.gt_outcomes[row]], own.gt.boxes_xyxy[row]
        if kind == MISSED:
            yield BoxAnnotation(MISSED, truth, text=name)
            continue
        number = int(own.matched_ids[row])
        before = int(own.previous_ids[row]) if kind == SWITCH else _switched_from(own, row, repeats)
        if before is None:
            yield BoxAnnotation(TRACKED, predicted[number], truth, str(number + 1))
        else:
            yield BoxAnnotation(SWITCH, predicted[number], truth, f"{before + 1} -> {number + 1}")
    for row in np.flatnonzero(own.pred.frames == frame).tolist():
        kind = PRED_OUTCOMES[own.pred_outcomes[row]]
        if kind in (FALSE, IGNORED):
            yield BoxAnnotation(kind, own.pred.boxes_xyxy[row], text=str(int(own.pred.track_ids[row]) + 1))


def _switched_from(own: ClassOutcomes, row: int, repeats: int) -> int | None:
    """The track id before the object's last switch, None if that was more than ``repeats`` frames ago."""
    if not repeats:
        return None
    age = own.gt.frames[row] - own.gt.frames
    same = (own.gt.track_ids == own.gt.track_ids[row]) & (own.gt_outcomes == GT_OUTCOMES.index(SWITCH))
    rows = np.flatnonzero(same & (age > 0) & (age <= repeats))
    return int(own.previous_ids[rows[-1]]) if len(rows) else None


@dataclass(frozen=True)
class FailureSegment:
    """A segment of a video; ``first``, ``last`` (both included) and ``worst`` are positions, ``weight`` its errors."""

    video: MatchedVideo
    first: int
    last: int
    worst: int
    weight: int

    @property
    def counts(self) -> dict[str, int]:
        return self.video.counts(self.first, self.last)


def worst_sequences(videos: Sequence[MatchedVideo]) -> list[MatchedVideo]:
    """Videos with errors by falling share of wrong boxes, ties by falling number of errors."""
    wrong = [video for video in videos if video.weights.sum()]
    return sorted(wrong, key=lambda video: (-video.wrong_share, -int(video.weights.sum()), video.title))


def worst_segments(videos: Sequence[MatchedVideo], number: int) -> list[FailureSegment]:
    """Up to ``number`` disjoint segments by falling weight.

    One video contributes at most max(2, a third of them) as long as other videos have any.
    """
    share = max(2, -(-number // 3))
    ranked = sorted(
        (segment for video in videos for segment in _segments_of(video, number)),
        key=lambda each: (-each.weight, each.video.title, each.first),
    )
    # Beyond its share a video's segments come after those of all others.
    taken = Counter[str]()
    beyond = []
    for segment in ranked:
        taken[segment.video.title] += 1
        beyond.append(taken[segment.video.title] > share)
    chosen = sorted(range(len(ranked)), key=beyond.__getitem__)[:number]
    return [ranked[index] for index in sorted(chosen)]


def worst_frames(video: MatchedVideo, number: int) -> list[int]:
    """Positions of up to ``number`` frames by falling weight, at a minimum distance so that they differ."""
    apart = max(1, min(_length(video) // 2, len(video.frames) // (2 * number)))
    found: list[int] = []
    for position in np.argsort(-video.weights, kind="stable").tolist():
        if len(found) == number or not video.weights[position]:
            break
        if all(abs(position - other) >= apart for other in found):
            found.append(position)
    return found


def _segments_of(video: MatchedVideo, limit: int) -> list[FailureSegment]:
    """Greedy: the heaviest segment of the remaining gaps, until ``limit`` or no errors are left."""
    length, free = _length(video), [(0, len(video.frames))]
    sums = np.concatenate([[0], np.cumsum(video.weights)])
    found: list[FailureSegment] = []
    while free and len(found) < limit:
        windows = [_heaviest(sums, begin, end, length) for begin, end in free]
        best = max(range(len(free)), key=lambda index: windows[index][0])
        weight, first, last = windows[best]
        if not weight:
            break
        worst = first + int(video.weights[first : last + 1].argmax())
        found.append(FailureSegment(video, first, last, worst, weight))
        begin, end = free.pop(best)
        free += [span for span in ((begin, first), (last + 1, end)) if span[0] < span[1]]
    return found


def _heaviest(sums: np.ndarray, begin: int, end: int, length: int) -> tuple[int, int, int]:
    """(weight, first, last) of the heaviest window of ``length`` positions inside [begin, end).

    Of ties it is the middle one, which also shows the frames before and after an error.
    """
    length = min(length, end - begin)
    totals = sums[begin + length : end + 1] - sums[begin : end + 1 - length]
    ties = np.flatnonzero(totals == totals.max())
    first = begin + int(ties[len(ties) // 2])
    return int(totals.max()), first, first + length - 1


def _length(video: MatchedVideo) -> int:
    """Length of the video's segments in frames."""
    low, high = _SEGMENT_FRAMES
    return min(max(round(_SEGMENT_S * video.fps), low), high)
