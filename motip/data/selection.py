"""Selection of training videos: segments cut from source sequences, taken in a fixed order.

A *video* is a segment of at most ``max_frames_per_video`` frames of one source sequence.

The cuts depend only on the sequence's length and on a length limit (:func:`cut_segments`): a sequence is cut into
the fewest segments that respect the limit, of equal length to within a frame. Requesting more videos therefore keeps
all boundaries while there are enough segments. If there are too few, the limit is lowered to the largest value that
yields enough (:func:`segment_limit_for`); only sequences whose number of segments changes are cut differently.

The order (:func:`selection_key`) takes the first segment of every sequence, in a seeded order, before any second
segment. A few videos thus come from many scenes, and the first 56 of 150 videos are those of a request for 56.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TypeVar

from motip.errors import MotipError

MIN_SEGMENT_FRAMES = 20
"""Minimum length of a segment; a shorter tail of a sequence is dropped and counted."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Frames ``start`` (included) to ``stop`` (excluded) of a source sequence, segment ``index`` of ``count``."""

    sequence: str
    index: int
    count: int
    start: int
    stop: int

    @property
    def frames(self) -> int:
        return self.stop - self.start


def segment_count(length: int, limit: int) -> int:
    """Minimum number of segments of at most ``limit`` frames, without a tail shorter than the minimum length."""
    full, rest = divmod(length, limit)
    return max(1, full + (rest >= min(MIN_SEGMENT_FRAMES, limit))) if length else 0


def cut_segments(sequence: str, length: int, max_frames: int, limit: int | None = None) -> list[Segment]:
    """Cut a sequence of ``length`` frames into segments of equal length.

    Args:
        max_frames: maximum length of a segment.
        limit: determines the number of segments (default ``max_frames``); :func:`segment_limit_for` lowers it.

    Returns:
        Segments in order, lengths equal to within one frame. They cover the sequence except for a tail shorter than
        ``MIN_SEGMENT_FRAMES`` (203 frames at a limit of 200 are one video of 200).
    """
    count = segment_count(length, limit or max_frames)
    covered = min(length, count * max_frames)
    bounds = [round(index * covered / count) for index in range(count + 1)] if count else []
    return [Segment(sequence, index, count, bounds[index], bounds[index + 1]) for index in range(count)]


def segment_limit_for(lengths: Mapping[str, int], videos: int, max_frames: int) -> int | None:
    """The largest limit in ``MIN_SEGMENT_FRAMES..max_frames`` that yields at least ``videos`` segments, or None."""

    def total(limit: int) -> int:
        return sum(segment_count(length, limit) for length in lengths.values())

    if total(max_frames) >= videos:
        return max_frames
    # total() is not monotonic (tails below the minimum length appear and vanish), so every limit is tested.
    for limit in range(max_frames - 1, MIN_SEGMENT_FRAMES - 1, -1):
        if total(limit) >= videos:
            return limit
    return None


def selection_key(sequence: str, index: int, seed: int) -> tuple[int, str, str]:
    """Sort key of a segment: its index first, then a seeded order of the sequences."""
    return index, hashlib.sha256(f"{seed}/{sequence}".encode()).hexdigest(), sequence


T = TypeVar("T")


def take_first(
    ordered: SequenceOf[T], frames_of: SequenceOf[int], *, videos: int | None, frame_budget: int | None
) -> list[T]:
    """The first ``videos`` items, or as many as fit ``frame_budget`` (at least one), or all if both are None.

    The result of a smaller request is always a prefix of that of a larger one.
    """
    if videos is not None:
        return list(ordered[:videos])
    if frame_budget is None:
        return list(ordered)
    taken: list[T] = []
    total = 0
    for item, frames in zip(ordered, frames_of, strict=True):
        total += frames
        if taken and total > frame_budget:
            break
        taken.append(item)
    return taken


def too_few_videos(
    source: str, requested: int, lengths: Mapping[str, int], max_frames: int, *, where: object = None
) -> MotipError:
    """The error, with its arithmetic, for a source that has fewer videos than a stage requests."""
    frames = sum(lengths.values())
    at_limit = sum(segment_count(length, max_frames) for length in lengths.values())
    shortest = sum(segment_count(length, min(MIN_SEGMENT_FRAMES, max_frames)) for length in lengths.values())
    return MotipError(
        f"fewer videos than requested: source {source!r} has {shortest} at most, a stage requests {requested}",
        where=where,
        found=f"{len(lengths)} training sequences with {frames} frames = {at_limit} videos of at most {max_frames} "
        f"frames, or {shortest} of at least {min(MIN_SEGMENT_FRAMES, max_frames)}",
        expected=f"{requested} videos",
        fix="request fewer videos, add sequences, or set `allow_fewer: true` in the stage's data to take those "
        "available (a conversion alone also takes --allow-fewer)",
    )


def shortage_note(source: str, requested: int, lengths: Mapping[str, int], max_frames: int, limit: int) -> str:
    """The note, with its arithmetic, that segments were cut shorter to reach the requested number of videos."""
    before = sum(segment_count(length, max_frames) for length in lengths.values())
    after = sum(segment_count(length, limit) for length in lengths.values())
    return (
        f"{source}: {len(lengths)} sequences with {sum(lengths.values())} frames make {before} videos of at most "
        f"{max_frames} frames; {requested} were requested, so sequences are cut at {limit} frames "
        f"instead, which makes {after}"
    )
