"""Validation of a stage after each epoch: track its fixed validation videos and score them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from motip.data.clip_loader import read_video_frames
from motip.data.manifest import VideoEntry, entry_path
from motip.data.sequence import ClassMap, TrackRows
from motip.data.shards import read_labels
from motip.errors import MotipError
from motip.evaluation.metrics import SequenceCounts, combine, score_sequence
from motip.evaluation.protocols import scored_sequence
from motip.evaluation.scores import Scores
from motip.model import MOTIP
from motip.tracking.api import TrackResult, track_sequence
from motip.tracking.settings import TrackerSettings


@dataclass(frozen=True)
class StageScores:
    """Scores per source; they are never pooled, since protocols and classes may differ."""

    by_source: dict[str, Scores]

    def flat(self) -> dict[str, float]:
        """Flat metrics: the mean over sources and, with several sources, each metric also as ``<source>/<metric>``."""
        tables = {source: scores.to_dict() for source, scores in self.by_source.items()}
        if len(tables) == 1:
            return next(iter(tables.values()))
        shared = set.intersection(*(set(table) for table in tables.values()))
        means = {name: sum(table[name] for table in tables.values()) / len(tables) for name in shared}
        return means | {f"{source}/{name}": value for source, table in tables.items() for name, value in table.items()}

    def to_json(self) -> dict[str, Any]:
        """Source -> JSON-serialisable scores."""
        return {source: scores.to_json() for source, scores in self.by_source.items()}


def track_videos(
    model: MOTIP,
    videos: Iterable[VideoEntry],
    storage: str,
    settings: TrackerSettings,
    on_video: Callable[[VideoEntry, TrackResult], None],
    on_frame: Callable[[VideoEntry, int], None],
) -> dict[tuple[str, str], TrackRows]:
    """Tracks of each video, by (source, video).

    Args:
        model: in eval mode, on its device.
        on_video: called after each video with its result.
        on_frame: called after each frame with its number.
    """

    def tracked(video: VideoEntry) -> TrackRows:
        frames = read_video_frames(video, storage)
        result = track_sequence(model, frames, settings, lambda number, _: on_frame(video, number))
        on_video(video, result)
        return result.rows

    return {(video.source, video.video): tracked(video) for video in videos}


def score_videos(
    videos: Iterable[VideoEntry],
    tracked: Mapping[tuple[str, str], TrackRows],
    storage: str,
    class_maps: Mapping[str, ClassMap],
    protocols: Mapping[str, str],
    split: str,
    averaged: Collection[str] | None = None,
    notes: Sequence[str] = (),
    on_video: Callable[[str, str], None] | None = None,
) -> StageScores:
    """Score every video once, each source by its protocol.

    Args:
        averaged: classes the class average is taken over (CLASSES_TO_EVAL); None: all.
        class_maps, protocols: by source.
        notes: remarks stored with the scores.
        on_video: called with source and name of each video before it is scored.

    Raises:
        MotipError: the tracked videos are not exactly the listed ones.
    """
    listed = sorted(videos, key=lambda video: video.identity)
    keys = [(video.source, video.video) for video in listed]
    if keys != sorted(tracked):
        raise MotipError(
            "the tracked videos differ from the validation videos",
            found=", ".join("/".join(key) for key in sorted(tracked)) or "none",
            expected=", ".join("/".join(key) for key in keys),
        )

    # Counts of each sequence, by the protocol of its source.
    counts: dict[str, list[SequenceCounts]] = {}
    for video in listed:
        class_map, protocol = class_maps[video.source], protocols[video.source]
        labels = read_labels(entry_path(storage, video))
        scored = scored_sequence(labels, class_map, tracked[video.source, video.video], protocol)
        if on_video is not None:
            on_video(video.source, labels.name)
        counts.setdefault(video.source, []).append(score_sequence(scored, class_map.names, protocol))
    # Scores of each source.
    by_source = {
        source: combine(own, class_maps[source].names, protocols[source], split, averaged)
        for source, own in counts.items()
    }
    return StageScores({source: replace(scores, notes=tuple(notes)) for source, scores in by_source.items()})
