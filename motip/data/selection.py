"""Which videos a stage gets: segments cut from source sequences, picked in one fixed order.

A *video* is a segment of at most ``max_frames_per_video`` frames of one source sequence.

Cutting depends on the sequence's own length and on a length limit alone (:func:`cut`): a sequence is cut into the
fewest segments that respect the limit, of equal length to within a frame. Asking for more videos therefore leaves
every boundary where it was, as long as there are enough segments. Only when there are too few is the limit lowered,
to the largest value that yields enough (:func:`limit_for`), and even then only those sequences are cut anew whose
number of segments changes.

Picking (:func:`rank`) takes the first segment of every sequence in a seeded order before any second segment, so that
few videos come from many scenes, and the first 56 of 150 are the 56.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TypeVar

from motip.errors import MotipError

FLOOR_FRAMES = 20
"""Segments are never cut shorter than this to reach a number of videos; a shorter tail is left out, and counted."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions ``start`` (included) to ``stop`` (excluded) of a source sequence; ``index`` counts its segments."""

    sequence: str
    index: int
    count: int
    start: int
    stop: int

    @property
    def frames(self) -> int:
        return self.stop - self.start


def segment_count(length: int, limit: int) -> int:
    """Fewest segments of at most ``limit`` frames, not counting a tail shorter than the floor."""
    full, rest = divmod(length, limit)
    return max(1, full + (rest >= min(FLOOR_FRAMES, limit))) if length else 0


def cut(sequence: str, length: int, max_frames: int, limit: int | None = None) -> list[Segment]:
    """Cut a sequence of ``length`` frames evenly.

    Args:
        max_frames: no segment is longer.
        limit: decides the number of segments (default ``max_frames``); lowered by :func:`limit_for` in a shortage.

    Returns:
        segments in order, lengths equal to within one frame; together they cover the sequence except for a tail
        shorter than ``FLOOR_FRAMES`` that would not fit (a 203-frame video at 200 is one video of 200).
    """
    count = segment_count(length, limit or max_frames)
    covered = min(length, count * max_frames)
    bounds = [round(index * covered / count) for index in range(count + 1)] if count else []
    return [Segment(sequence, index, count, bounds[index], bounds[index + 1]) for index in range(count)]


def limit_for(lengths: Mapping[str, int], videos: int, max_frames: int) -> int | None:
    """The largest limit in ``FLOOR_FRAMES..max_frames`` that cuts at least ``videos`` segments; None if none does."""

    def total(limit: int) -> int:
        return sum(segment_count(length, limit) for length in lengths.values())

    if total(max_frames) >= videos:
        return max_frames
    # total() is not strictly monotonic (tails below the floor come and go), so every limit is looked at.
    for limit in range(max_frames - 1, FLOOR_FRAMES - 1, -1):
        if total(limit) >= videos:
            return limit
    return None


def rank(sequence: str, index: int, seed: int) -> tuple[int, str, str]:
    """Sort key of a segment: round (first segments first), then a seeded order of the sequences."""
    return index, hashlib.sha256(f"{seed}/{sequence}".encode()).hexdigest(), sequence


T = TypeVar("T")


def pick(
    ordered: SequenceOf[T], frames_of: SequenceOf[int], *, videos: int | None, frame_budget: int | None
) -> list[T]:
    """The first ``videos`` of an ordered list, or as many as fit a frame budget (at least one), or all.

    A larger request always returns a list that begins with the smaller request's.
    """
    if videos is not None:
        return list(ordered[:videos])
    if frame_budget is None:
        return list(ordered)
    picked: list[T] = []
    total = 0
    for item, frames in zip(ordered, frames_of, strict=True):
        total += frames
        if picked and total > frame_budget:
            break
        picked.append(item)
    return picked


def fewer_than_asked(
    source: str, asked: int, lengths: Mapping[str, int], max_frames: int, *, where: object = None
) -> MotipError:
    """The error that does the arithmetic when a source cannot give the videos a stage asks for."""
    frames = sum(lengths.values())
    at_limit = sum(segment_count(length, max_frames) for length in lengths.values())
    at_floor = sum(segment_count(length, min(FLOOR_FRAMES, max_frames)) for length in lengths.values())
    return MotipError(
        f"fewer videos than asked for: source {source!r} has {at_floor} at most, a stage asks for {asked}",
        where=where,
        found=f"{len(lengths)} training sequences with {frames} frames = {at_limit} videos of at most {max_frames} "
        f"frames, or {at_floor} of at least {min(FLOOR_FRAMES, max_frames)}",
        expected=f"{asked} videos",
        fix="ask for fewer videos, add sequences, or set `allow_fewer: true` in the stage's data to go on with what is "
        "there (a conversion alone also takes --allow-fewer)",
    )


def shortage_note(source: str, asked: int, lengths: Mapping[str, int], max_frames: int, limit: int) -> str:
    """What was done, in numbers, when segments had to be cut shorter to reach the number asked for."""
    before = sum(segment_count(length, max_frames) for length in lengths.values())
    after = sum(segment_count(length, limit) for length in lengths.values())
    return (
        f"{source}: {len(lengths)} sequences with {sum(lengths.values())} frames make {before} videos of at most "
        f"{max_frames} frames; {asked} were asked for, so sequences are cut at {limit} frames "
        f"instead, which makes {after}"
    )


def overlapping(names: Iterable[str], locked: Iterable[str]) -> list[str]:
    """Sequence names on both sides, sorted."""
    return sorted(set(names) & set(locked))
