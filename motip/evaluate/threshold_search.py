"""Which DET_THRESH tracks best: a sweep on the validation videos, tracked once per threshold.

The threshold decides which detections the tracker sees, and so every track after them; scores of one run cannot be cut
at another threshold afterwards. The detector, which takes nearly all the time, still sees each frame only once.
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
from motip.evaluate.calibration import BINS, DetectionCollector, Histogram, confidence_histograms
from motip.evaluate.evaluation import Work, labelled, spread
from motip.evaluate.metrics import SequenceCounts, combine, score_sequence
from motip.evaluate.protocols import scored_sequence
from motip.evaluate.scores import Scores
from motip.model import MOTIP
from motip.storage.atomic import digest
from motip.storage.paths import Location, read_json, write_json
from motip.track.api import track_variants
from motip.track.settings import TrackerSettings

FORMAT = 1
"""Part of every kept video's identity; raised when what is kept of it comes to mean something else."""

GRID = tuple(round(0.05 * step, 2) for step in range(2, 19))
"""DET_THRESH that are tried: 0.1 to 0.9."""

FLOOR = 0.05
"""Detections less confident than this (or than the lowest threshold) are not in the histogram."""


def candidates(settings: TrackerSettings, thresholds: Sequence[float] | None = None) -> list[TrackerSettings]:
    """Settings to try, by rising DET_THRESH, the configured one among them.

    NEWBORN_THRESH keeps its configured distance above DET_THRESH; thresholds that would lift it to 1 or more, where no
    track could start, are left out of the default grid.

    Raises:
        MotipError: a threshold is outside 0..1, or no track could start with it.
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
class SweepSubject:
    """What is swept: a model in eval mode on the CPU, its file's sha256, the settings to try, how tracks are scored.

    Attributes:
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
        return min(FLOOR, *(each.det_thresh for each in self.variants))

    def inputs(self, video: VideoEntry) -> str:
        """Hex digest of all that the result of a video follows from."""
        class_map = self.class_maps[video.source]
        return digest(
            [
                *(FORMAT, self.sha256, [asdict(each) for each in self.variants], video.shard_sha256),
                *(list(class_map.names), {name: list(raws) for name, raws in class_map.mapping.items()}),
                self.protocols[video.source],
            ]
        )


class SweepTracker:
    """Tracks and scores one video after the other under every setting; an actor on the cluster, or an object here."""

    def __init__(self, subject: SweepSubject, storage: str, device: str, threads: int | None = None) -> None:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self._subject = subject
        self._model = subject.model.to(torch.device(device))
        self._storage = storage

    def track(self, video: VideoEntry) -> tuple[dict[str, Any], dict[str, Any]]:
        """Counts per setting and the histogram, as JSON; and what must be said beside them."""
        subject = self._subject
        collector = DetectionCollector(subject.floor, subject.variants[0].area_thresh)
        frames = read_video_frames(video, self._storage)
        results = track_variants(self._model, frames, subject.variants, on_detections=collector.add)
        labels = read_labels(entry_path(self._storage, video))
        class_map, protocol = subject.class_maps[video.source], subject.protocols[video.source]
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
class Candidate:
    """One setting and its scores by source."""

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
class Sweep:
    """Outcome of a sweep.

    Attributes:
        candidates: by rising DET_THRESH.
        configured: position of the setting that the checkpoint came with.
        confidences: source -> class -> histogram of all detections.
        floor: confidence below which nothing was counted.
        skipped: sources without a label of the averaged classes.
        videos, reused: how many, and how many of them were there from an interrupted or equal sweep.
        notes: what must stand beside the numbers.
    """

    candidates: tuple[Candidate, ...]
    configured: int
    confidences: dict[str, dict[str, Histogram]]
    floor: float
    skipped: tuple[str, ...]
    videos: int
    reused: int
    notes: tuple[str, ...]

    @property
    def best(self) -> int:
        """Position of the setting with the highest HOTA; of equals the one nearest to the configured."""
        order = range(len(self.candidates))
        return max(order, key=lambda place: (self.candidates[place].hota, -abs(place - self.configured)))

    @property
    def several(self) -> bool:
        """Whether the table is over more than one source."""
        return len(self.confidences) > 1

    @property
    def at_the_edge(self) -> bool:
        """Whether the best lies at an end of what was tried, so that a better one may lie beyond."""
        return len(self.candidates) > 1 and self.best in (0, len(self.candidates) - 1)

    def pooled(self) -> Histogram:
        """Histogram over all sources and classes."""
        every = [each for classes in self.confidences.values() for each in classes.values()]
        return {side: np.sum([each[side] for each in every], axis=0) for side in ("true", "false")}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of text, one row per setting."""
        metrics = ("HOTA", "DetA", "AssA", "DetRe", "DetPr", "IDF1")
        several = list(self.confidences) if self.several else []
        rows = []
        for place, each in enumerate(self.candidates):
            remarks = [text for text, at in (("best", self.best), ("configured", self.configured)) if at == place]
            rows.append(
                [
                    f"{each.settings.det_thresh:g}",
                    f"{each.settings.newborn_thresh:g}",
                    *(f"{each.metric(name):.1f}" for name in metrics),
                    *(f"{each.scores[source].hota:.1f}" for source in several),
                    ", ".join(remarks),
                ]
            )
        return ["DET_THRESH", "NEWBORN", *metrics, *(f"HOTA {source}" for source in several), ""], rows

    def bars(self, width: int = 50) -> list[str]:
        """The pooled histogram as lines of text, true positives as ``#``, false ones as ``-``."""
        pooled = self.pooled()
        longest = max(int((pooled["true"] + pooled["false"]).max()), 1)
        best = self.candidates[self.best].settings.det_thresh
        lines = []
        for index in range(int(self.floor * BINS + 1e-9), BINS):
            true, false = int(pooled["true"][index]), int(pooled["false"][index])
            right = round(width * true / longest)
            bar = "#" * right + "-" * (round(width * (true + false) / longest) - right)
            mark = "  <- best DET_THRESH" if int(best * BINS + 1e-9) == index else ""
            low = index / BINS
            lines.append(f"{low:.2f}-{low + 1 / BINS:.2f}  {bar.ljust(width)}  {true:7d} {false:7d}{mark}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain values; the scores of the best and of the configured setting in full."""
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


def check_sweep_split(split: str) -> None:
    """Raise MotipError unless thresholds may be chosen on this split."""
    if split != "val":
        raise MotipError(
            f"thresholds are not chosen on the {split} split",
            where="--sweep-thresholds, --split",
            found=split,
            expected="val",
            fix="sweep on val, then score once on test with the chosen threshold: a threshold chosen on the videos "
            "that are reported makes the report look better than the tracker is",
        )


def sweep(subject: SweepSubject, configured: TrackerSettings, work: Work) -> Sweep:
    """Track the videos under every setting and score each; a video's counts are kept as it is finished.

    Args:
        configured: the one of ``subject.variants`` that was in use so far.
        work: ``<folder>/thresholds/<source>/<split>/<video>.json`` keeps what is finished.

    Raises:
        MotipError: not the val split, no labels of the averaged classes, or as ``evaluate``.
    """
    check_sweep_split(work.split)
    videos, averaged = work.videos, work.averaged
    sources = sorted({video.source for video in videos})
    own = {source: [video for video in videos if video.source == source] for source in sources}
    skipped = tuple(source for source in sources if not labelled(own[source], subject.class_maps[source], averaged))
    wanted = [video for source in sources if source not in skipped for video in own[source]]
    if not wanted:
        raise MotipError(
            "no source has labels to choose a threshold by",
            found=", ".join(skipped) or "no videos",
            fix="check the class map, or name sources with labels",
        )
    place = {
        video.identity: work.folder / f"thresholds/{video.source}/{work.split}/{video.video}.json" for video in wanted
    }
    waiting = [video for video in wanted if not _kept(place[video.identity], subject.inputs(video))]
    reused = len(wanted) - len(waiting)
    finished = spread(SweepTracker, subject, waiting, work.storage, work.device, work.cluster, work.workers)
    for done, (video, found, facts) in enumerate(finished, start=reused + 1):
        write_json(place[video.identity], {"inputs": subject.inputs(video), **found, **facts})
        if work.on_video is not None:
            work.on_video(video, done, len(wanted))
    kept = {video.identity: read_json(place[video.identity]) for video in wanted}
    notes = tuple(dict.fromkeys(note for each in kept.values() for note in each["notes"]))
    found_by_source = {
        source: [kept[video.identity] for video in sorted(own[source], key=lambda video: video.identity)]
        for source in sources
        if source not in skipped
    }

    def scores_of(number: int, source: str) -> Scores:
        counts = [SequenceCounts.from_json(each["name"], each["counts"][number]) for each in found_by_source[source]]
        names, protocol = subject.class_maps[source].names, subject.protocols[source]
        return replace(combine(counts, names, protocol, work.split, averaged), notes=notes)

    return Sweep(
        candidates=tuple(
            Candidate(settings, {source: scores_of(number, source) for source in found_by_source})
            for number, settings in enumerate(subject.variants)
        ),
        configured=subject.variants.index(configured),
        confidences={source: _pooled(found) for source, found in found_by_source.items()},
        floor=subject.floor,
        skipped=skipped,
        videos=len(wanted),
        reused=reused,
        notes=notes,
    )


def _kept(path: Location, inputs: str) -> bool:
    return path.is_file() and read_json(path).get("inputs") == inputs


def _pooled(found: Sequence[Mapping[str, Any]]) -> dict[str, Histogram]:
    return {
        name: {side: np.sum([each["confidences"][name][side] for each in found], axis=0) for side in ("true", "false")}
        for name in found[0]["confidences"]
    }
