"""Threshold search: score DET_THRESH candidates on the validation videos.

DET_THRESH selects the detections passed to the tracker and so changes all later tracks; scores of another threshold
cannot be derived from stored tracks. The detector, which takes nearly all the time, runs once per frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from motip.data.clip_loader import read_video_frames
from motip.data.manifest import VideoEntry, entry_path
from motip.data.sequence import ClassMap
from motip.data.shards import read_labels
from motip.errors import MotipError
from motip.evaluation.calibration import BINS, DetectionCollector, Histogram, confidence_histograms, pool
from motip.evaluation.evaluator import EvalJob, VideoWorker, has_labels, is_current, map_videos
from motip.evaluation.metrics import SequenceCounts, combine, score_sequence
from motip.evaluation.protocols import scored_sequence
from motip.evaluation.scores import Scores
from motip.model import MOTIP
from motip.storage.atomic import digest
from motip.storage.paths import read_json, write_json
from motip.tracking.api import track_variants
from motip.tracking.settings import TrackerSettings

FORMAT_VERSION = 1
"""Part of the digest of stored results; raised when their meaning changes."""

GRID = tuple(round(0.05 * step, 2) for step in range(2, 19))
"""Default candidates of DET_THRESH: 0.1 to 0.9."""

_FLOOR = 0.05
"""Lowest confidence in the histogram, unless a candidate is lower."""


def candidate_settings(settings: TrackerSettings, thresholds: Sequence[float] | None = None) -> list[TrackerSettings]:
    """Candidate settings in ascending order of DET_THRESH, including the configured one.

    NEWBORN_THRESH keeps its configured distance to DET_THRESH. Thresholds of the default grid that would raise it to 1
    or more, where no track could start, are dropped.

    Raises:
        MotipError: a given threshold, or the NEWBORN_THRESH that follows from it, is outside 0..1.
    """
    distance = settings.newborn_thresh - settings.det_thresh
    if thresholds is not None:
        for value in thresholds:
            if not 0.0 <= value < 1.0 or not 0.0 <= value + distance < 1.0:
                raise MotipError(
                    f"no track can start with DET_THRESH {value:g}",
                    where="--thresholds",
                    found=f"NEWBORN_THRESH {value + distance:.2f} ({distance:+.2f}, as configured)",
                    expected="both at least 0 and below 1",
                )
    tried = GRID if thresholds is None else thresholds
    values = {round(value, 4) for value in tried if 0.0 <= value + distance < 1.0} | {round(settings.det_thresh, 4)}
    return [
        settings
        if value == round(settings.det_thresh, 4)
        else replace(settings, det_thresh=value, newborn_thresh=round(value + distance, 4))
        for value in sorted(values)
    ]


@dataclass(frozen=True)
class ThresholdSearchInput:
    """Model and candidate settings of a threshold search.

    Attributes:
        model: in eval mode on the CPU.
        sha256: hex digest of its weights file.
        variants: candidate settings, see ``candidate_settings``.
        class_maps, protocols: by source; the class names are the model's.
    """

    model: MOTIP
    sha256: str
    variants: tuple[TrackerSettings, ...]
    class_maps: Mapping[str, ClassMap]
    protocols: Mapping[str, str]

    @property
    def floor(self) -> float:
        """Lowest confidence in the histogram."""
        return min(_FLOOR, *(each.det_thresh for each in self.variants))

    def result_digest(self, video: VideoEntry) -> str:
        """Hex digest of everything the result of a video depends on."""
        class_map = self.class_maps[video.source]
        return digest(
            [
                FORMAT_VERSION,
                self.sha256,
                [asdict(each) for each in self.variants],
                video.shard_sha256,
                list(class_map.names),
                {name: list(raws) for name, raws in class_map.mapping.items()},
                self.protocols[video.source],
            ]
        )


class VariantTracker(VideoWorker[ThresholdSearchInput, dict[str, Any]]):
    """Worker that tracks and scores videos under every candidate."""

    def track(self, video: VideoEntry) -> tuple[dict[str, Any], dict[str, Any]]:
        """JSON-serialisable counts per candidate and histograms, and notes and seconds."""
        search = self._subject
        collector = DetectionCollector(search.floor, search.variants[0].area_thresh)
        frames = read_video_frames(video, self._storage)
        results = track_variants(self._model, frames, search.variants, on_detections=collector.add)
        labels = read_labels(entry_path(self._storage, video))
        class_map, protocol = search.class_maps[video.source], search.protocols[video.source]
        counts = [
            score_sequence(
                scored_sequence(labels, class_map, result.rows, protocol), class_map.names, protocol
            ).to_json()
            for result in results
        ]
        histograms = confidence_histograms(
            scored_sequence(labels, class_map, collector.rows(), protocol), class_map.names, protocol
        )
        found = {
            "name": labels.name,
            "counts": counts,
            "confidences": {
                name: {side: each[side].tolist() for side in ("true", "false")} for name, each in histograms.items()
            },
        }
        return found, {"notes": list(results[0].notes), "seconds": results[0].seconds}


@dataclass(frozen=True)
class ScoredSettings:
    """A candidate and its scores by source."""

    settings: TrackerSettings
    scores: dict[str, Scores]

    @property
    def hota(self) -> float:
        """Mean over sources of the class-averaged HOTA."""
        return self.metric("HOTA")

    def metric(self, name: str) -> float:
        """Mean over sources of a class-averaged metric."""
        return float(np.mean([scores.class_averaged[name] for scores in self.scores.values()]))


@dataclass(frozen=True)
class ThresholdSearchResult:
    """Result of a threshold search.

    Attributes:
        candidates: in ascending order of DET_THRESH.
        configured: index of the checkpoint's own settings.
        confidences: source -> class -> histogram of all detections.
        floor: lowest confidence in the histograms.
        skipped: sources without a label of the averaged classes.
        videos, reused: number of videos, and of those whose results were stored by an earlier search.
        notes: remarks that must be shown with the scores.
    """

    candidates: tuple[ScoredSettings, ...]
    configured: int
    confidences: dict[str, dict[str, Histogram]]
    floor: float
    skipped: tuple[str, ...]
    videos: int
    reused: int
    notes: tuple[str, ...]

    @property
    def best(self) -> int:
        """Index of the candidate with the highest HOTA; ties go to the one nearest to the configured."""
        order = range(len(self.candidates))
        return max(order, key=lambda index: (self.candidates[index].hota, -abs(index - self.configured)))

    @property
    def has_several_sources(self) -> bool:
        """Whether the scores are means over more than one source."""
        return len(self.confidences) > 1

    @property
    def best_at_edge(self) -> bool:
        """Whether the best candidate is the lowest or highest, so that a better threshold may lie outside the range."""
        return len(self.candidates) > 1 and self.best in (0, len(self.candidates) - 1)

    def pooled(self) -> Histogram:
        """Histogram over all sources and classes."""
        return pool(each for classes in self.confidences.values() for each in classes.values())

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the text table, one row per candidate."""
        metrics = ("HOTA", "DetA", "AssA", "DetRe", "DetPr", "IDF1")
        sources = list(self.confidences) if self.has_several_sources else []
        rows = []
        for index, each in enumerate(self.candidates):
            remarks = [text for text, at in (("best", self.best), ("configured", self.configured)) if at == index]
            rows.append(
                [
                    f"{each.settings.det_thresh:g}",
                    f"{each.settings.newborn_thresh:g}",
                    *(f"{each.metric(name):.1f}" for name in metrics),
                    *(f"{each.scores[source].hota:.1f}" for source in sources),
                    ", ".join(remarks),
                ]
            )
        return ["DET_THRESH", "NEWBORN", *metrics, *(f"HOTA {source}" for source in sources), ""], rows

    def bars(self, width: int = 50) -> list[str]:
        """The pooled histogram as lines of text, true positives as ``#``, false positives as ``-``."""
        pooled = self.pooled()
        longest = max(int((pooled["true"] + pooled["false"]).max()), 1)
        best = self.candidates[self.best].settings.det_thresh
        lines = []
        for index in range(int(self.floor * BINS + 1e-9), BINS):
            true, false = int(pooled["true"][index]), int(pooled["false"][index])
            filled = round(width * true / longest)
            bar = "#" * filled + "-" * (round(width * (true + false) / longest) - filled)
            mark = "  <- best DET_THRESH" if int(best * BINS + 1e-9) == index else ""
            low = index / BINS
            lines.append(f"{low:.2f}-{low + 1 / BINS:.2f}  {bar.ljust(width)}  {true:7d} {false:7d}{mark}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable values, with the full settings of the best and the configured candidate."""
        return {
            "best": asdict(self.candidates[self.best].settings),
            "configured": asdict(self.candidates[self.configured].settings),
            "candidates": [
                {
                    "det_thresh": each.settings.det_thresh,
                    "newborn_thresh": each.settings.newborn_thresh,
                    "mean": {name: each.metric(name) for name in next(iter(each.scores.values())).class_averaged},
                    "sources": {source: scores.to_dict() for source, scores in each.scores.items()},
                }
                for each in self.candidates
            ],
            "confidences": {
                source: {name: {side: each[side].tolist() for side in each} for name, each in classes.items()}
                for source, classes in self.confidences.items()
            },
            "bins": [index / BINS for index in range(BINS + 1)],
            "floor": self.floor,
            "skipped": list(self.skipped),
            "videos": self.videos,
            "notes": list(self.notes),
        }


def check_search_split(split: str) -> None:
    """Raise MotipError unless the split is val."""
    if split != "val":
        raise MotipError(
            f"thresholds cannot be chosen on the {split} split",
            where="--sweep-thresholds, --split",
            found=split,
            expected="val",
            fix="search on val, then score once on test with the chosen threshold: a threshold chosen on the reported "
            "videos biases their scores upwards",
        )


def search_thresholds(search: ThresholdSearchInput, configured: TrackerSettings, job: EvalJob) -> ThresholdSearchResult:
    """Track and score the videos under every candidate.

    Counts are written to ``<folder>/thresholds/<source>/<split>/<video>.json`` as each video finishes; a later search
    reads them back.

    Args:
        configured: the checkpoint's own settings, one of ``search.variants``.
        job: videos, output folder and resources.

    Raises:
        MotipError: the split is not val, no source has labels of the averaged classes, or as ``evaluate``.
    """
    check_search_split(job.split)
    # videos with labels
    own: dict[str, list[VideoEntry]] = {}
    for video in sorted(job.videos, key=lambda video: video.identity):
        own.setdefault(video.source, []).append(video)
    skipped = tuple(each for each in own if not has_labels(own[each], search.class_maps[each], job.averaged))
    scored = [video for source in own if source not in skipped for video in own[source]]
    if not scored:
        raise MotipError(
            "no source has labels to score thresholds with",
            found=", ".join(skipped) or "no videos",
            fix="check the class map, or name sources with labels",
        )
    # track, score and store the missing ones
    paths = {
        video.identity: job.folder / f"thresholds/{video.source}/{job.split}/{video.video}.json" for video in scored
    }
    missing = [video for video in scored if not is_current(paths[video.identity], search.result_digest(video))]
    reused = len(scored) - len(missing)
    results = map_videos(VariantTracker, search, missing, job)
    for done, (video, found, facts) in enumerate(results, start=reused + 1):
        write_json(paths[video.identity], {"inputs": search.result_digest(video), **found, **facts})
        if job.on_video is not None:
            job.on_video(video, done, len(scored))
    # combine by source
    stored = {video.identity: read_json(paths[video.identity]) for video in scored}
    notes = tuple(dict.fromkeys(note for each in stored.values() for note in each["notes"]))
    by_source = {source: [stored[video.identity] for video in own[source]] for source in own if source not in skipped}

    def scores_of(number: int, source: str) -> Scores:
        counts = [SequenceCounts.from_json(each["name"], each["counts"][number]) for each in by_source[source]]
        names, protocol = search.class_maps[source].names, search.protocols[source]
        return replace(combine(counts, names, protocol, job.split, job.averaged), notes=notes)

    return ThresholdSearchResult(
        candidates=tuple(
            ScoredSettings(settings, {source: scores_of(number, source) for source in by_source})
            for number, settings in enumerate(search.variants)
        ),
        configured=search.variants.index(configured),
        confidences={
            source: {name: pool(each["confidences"][name] for each in found) for name in found[0]["confidences"]}
            for source, found in by_source.items()
        },
        floor=search.floor,
        skipped=skipped,
        videos=len(scored),
        reused=reused,
        notes=notes,
    )
