"""Where a tracker is wrong most: its boxes as marks on frames, and the worst sequences, moments and frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from motip.evaluate.outcomes import GT_FATES, PRED_FATES, ClassErrors

TRACKED, MISSED, SWITCH, FALSE, IGNORED = "tracked", "missed", "identity switch", "false positive", "ignored"
KINDS = (TRACKED, MISSED, SWITCH, FALSE, IGNORED)

SWITCH_WEIGHT = 5
"""A miss or a false positive is counted in every frame it lasts, a switch only once, though the track stays wrong."""
MOMENT_S = 4.0
MOMENT_FRAMES = (8, 120)
HELD_S = 0.6
"""Seconds a switched box stays orange in a video: one frame is not seen."""

Images = Callable[[Sequence[int]], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Mark:
    """A box of one frame and what became of it.

    Attributes:
        kind: one of KINDS.
        box: (4,) xyxy pixels; the prediction where there is one, else the label.
        truth: (4,) the label that the prediction was matched with, None where there is none.
        text: shown at the box: the id (from 1, as in MOT files), at a switch the ids before and after, else the class.
        held: an earlier frame's switch that is still shown.
    """

    kind: str
    box: np.ndarray
    truth: np.ndarray | None = None
    text: str = ""
    held: bool = False


@dataclass(frozen=True)
class JudgedVideo:
    """A video whose every box is judged.

    Attributes:
        frames: (F,) 0-based numbers of the labelled frames, in order; positions below index it.
        errors: class -> fates of its boxes (``motip.evaluate.outcomes.explain``).
        ignore_frames, ignore_xyxy: (K,), (K, 4) regions to ignore.
        images: gives the images at positions, (H, W, 3) uint8 RGB each.
    """

    source: str
    name: str
    fps: float
    frames: np.ndarray
    errors: dict[str, ClassErrors]
    ignore_frames: np.ndarray
    ignore_xyxy: np.ndarray
    images: Images

    @property
    def title(self) -> str:
        return f"{self.source}/{self.name}"

    @cached_property
    def per_frame(self) -> dict[str, np.ndarray]:
        """Kind -> (F,) boxes at each position."""
        found = {kind: np.zeros(len(self.frames), np.int64) for kind in KINDS}
        for own in self.errors.values():
            for kind, frames in (
                *((kind, own.gt.frames[own.gt_fates == GT_FATES.index(kind)]) for kind in (TRACKED, MISSED, SWITCH)),
                *((kind, own.pred.frames[own.pred_fates == PRED_FATES.index(kind)]) for kind in (FALSE, IGNORED)),
            ):
                np.add.at(found[kind], self._positions(frames), 1)
        return found

    @cached_property
    def weights(self) -> np.ndarray:
        """(F,) how wrong each position is: misses + false positives + SWITCH_WEIGHT * switches."""
        counts = self.per_frame
        weights: np.ndarray = counts[MISSED] + counts[FALSE] + SWITCH_WEIGHT * counts[SWITCH]
        return weights

    def counts(self, first: int = 0, last: int | None = None) -> dict[str, int]:
        """Kind -> boxes at the positions from first to last, both included."""
        end = len(self.frames) if last is None else last + 1
        return {kind: int(values[first:end].sum()) for kind, values in self.per_frame.items()}

    @property
    def boxes(self) -> int:
        """Labelled boxes that are judged."""
        counts = self.counts()
        return counts[TRACKED] + counts[MISSED] + counts[SWITCH]

    @property
    def wrong_share(self) -> float:
        """Misses, false positives and switches per labelled box, 1 - MOTA; without labels, per box."""
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

    def marks(self, position: int, hold: bool = False) -> list[Mark]:
        """What to draw at a position; errors come last, so that they lie on top.

        Args:
            hold: keep a switched box orange for a while.
        """
        frame = int(self.frames[position])
        marks = [Mark(IGNORED, box) for box in self.ignore_xyxy[self.ignore_frames == frame]]
        for name, own in self.errors.items():
            marks += _class_marks(own, name, frame, round(HELD_S * self.fps) if hold else 0)
        return sorted(marks, key=lambda mark: _ORDER.index(mark.kind))

    def _positions(self, frames: np.ndarray) -> np.ndarray:
        positions: np.ndarray = np.searchsorted(self.frames, frames)
        return positions


_ORDER = (IGNORED, TRACKED, MISSED, FALSE, SWITCH)


def _class_marks(own: ClassErrors, name: str, frame: int, hold: int) -> Iterator[Mark]:
    predicted = {
        int(own.pred.track_ids[row]): own.pred.boxes_xyxy[row] for row in np.flatnonzero(own.pred.frames == frame)
    }
    for row in np.flatnonzero(own.gt.frames == frame).tolist():
        kind, truth = GT_FATES[own.gt_fates[row]], own.gt.boxes_xyxy[row]
        if kind == MISSED:
            yield Mark(MISSED, truth, text=name)
            continue
        number = int(own.matched_ids[row])
        before = int(own.previous_ids[row]) if kind == SWITCH else _switched_from(own, row, hold)
        if before is None:
            yield Mark(TRACKED, predicted[number], truth, str(number + 1))
        else:
            yield Mark(SWITCH, predicted[number], truth, f"{before + 1} -> {number + 1}", held=kind != SWITCH)
    for row in np.flatnonzero(own.pred.frames == frame).tolist():
        kind = PRED_FATES[own.pred_fates[row]]
        if kind in (FALSE, IGNORED):
            yield Mark(kind, own.pred.boxes_xyxy[row], text=str(int(own.pred.track_ids[row]) + 1))


def _switched_from(own: ClassErrors, row: int, hold: int) -> int | None:
    """The id before the object's last switch, where that is at most ``hold`` frames ago."""
    if not hold:
        return None
    age = own.gt.frames[row] - own.gt.frames
    same = (own.gt.track_ids == own.gt.track_ids[row]) & (own.gt_fates == GT_FATES.index(SWITCH))
    rows = np.flatnonzero(same & (age > 0) & (age <= hold))
    return int(own.previous_ids[rows[-1]]) if len(rows) else None


@dataclass(frozen=True)
class Moment:
    """A stretch of a video; ``first``, ``last`` (both included) and ``worst`` are positions."""

    video: JudgedVideo
    first: int
    last: int
    worst: int
    weight: int

    @property
    def counts(self) -> dict[str, int]:
        return self.video.counts(self.first, self.last)


def worst_sequences(videos: Sequence[JudgedVideo]) -> list[JudgedVideo]:
    """Videos with errors, the largest share of wrong boxes first; of equals the one with most errors."""
    wrong = [video for video in videos if video.weights.sum()]
    return sorted(wrong, key=lambda video: (-video.wrong_share, -int(video.weights.sum()), video.title))


def worst_moments(videos: Sequence[JudgedVideo], number: int) -> list[Moment]:
    """Up to ``number`` moments that do not overlap, the heaviest first.

    One video gives at most a third of them (but two) while others have any.
    """
    share = max(2, -(-number // 3))
    ranked = sorted(
        (moment for video in videos for moment in _moments_of(video, number)),
        key=lambda each: (-each.weight, each.video.title, each.first),
    )
    taken: dict[str, int] = {}
    first: list[Moment] = []
    rest: list[Moment] = []
    for moment in ranked:
        taken[moment.video.title] = taken.get(moment.video.title, 0) + 1
        (first if taken[moment.video.title] <= share else rest).append(moment)
    chosen = [*first, *rest][:number]
    return sorted(chosen, key=ranked.index)


def worst_frames(video: JudgedVideo, number: int) -> list[int]:
    """Positions of the worst frames, the worst first, apart from each other so that they show different things."""
    apart = max(1, min(_length(video) // 2, len(video.frames) // (2 * number)))
    found: list[int] = []
    for position in np.argsort(-video.weights, kind="stable").tolist():
        if len(found) == number or not video.weights[position]:
            break
        if all(abs(position - other) >= apart for other in found):
            found.append(position)
    return found


def _moments_of(video: JudgedVideo, most: int) -> list[Moment]:
    length, free = _length(video), [(0, len(video.frames))]
    sums = np.concatenate([[0], np.cumsum(video.weights)])
    found: list[Moment] = []
    while free and len(found) < most:
        windows = [_heaviest(sums, begin, end, length) for begin, end in free]
        best = max(range(len(free)), key=lambda index: windows[index][0])
        weight, first, last = windows[best]
        if not weight:
            break
        worst = first + int(video.weights[first : last + 1].argmax())
        found.append(Moment(video, first, last, worst, weight))
        begin, end = free.pop(best)
        free += [span for span in ((begin, first), (last + 1, end)) if span[0] < span[1]]
    return found


def _heaviest(sums: np.ndarray, begin: int, end: int, length: int) -> tuple[int, int, int]:
    """(weight, first, last) of the heaviest stretch of ``length`` positions inside [begin, end).

    Of equal ones it is the middle one, which shows how an error comes and goes.
    """
    length = min(length, end - begin)
    totals = sums[begin + length : end + 1] - sums[begin : end + 1 - length]
    ties = np.flatnonzero(totals == totals.max())
    first = begin + int(ties[len(ties) // 2])
    return int(totals.max()), first, first + length - 1


def _length(video: JudgedVideo) -> int:
    low, high = MOMENT_FRAMES
    return min(max(round(MOMENT_S * video.fps), low), high)
