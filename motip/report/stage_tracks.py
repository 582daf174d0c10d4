"""Tracks of one sequence by each stage, for the side-by-side videos: stored tracks, else tracked now and stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from motip.cluster import Cluster
from motip.data.manifest import Manifest, VideoEntry
from motip.errors import MotipError
from motip.evaluation.evaluator import (
    EvalJob,
    ModelUnderTest,
    is_tracked,
    read_tracks,
    track_missing,
    tracks_digest,
)
from motip.report.page_facts import PageFacts, StageFacts
from motip.report.side_by_side import Tile
from motip.stage_folder import evaluation_folder
from motip.storage.paths import Location, local_copy, location
from motip.weights.export import load_for_tracking


@dataclass(frozen=True)
class TrackingOptions:
    """How to track sequences that have no stored tracks.

    Attributes:
        track: False uses stored tracks only.
        cluster: Ray cluster whose actors track; None tracks in this process.
        device: ``cpu`` or ``cuda``, of this process or of the actors.
    """

    track: bool = True
    cluster: Cluster | None = None
    device: str = "cpu"


def scored_domains(page: PageFacts) -> dict[str, list[str]]:
    """Domain -> sources that any stage was scored on."""
    found: dict[str, list[str]] = {}
    for stage in page.stages:
        for source in [*stage.scores, *stage.row]:
            own = found.setdefault(page.domain_of(source), [])
            if source not in own:
                own.append(source)
    return found


def choose_video(page: PageFacts, manifest: Manifest, sources: Sequence[str]) -> VideoEntry:
    """The val video with stored tracks of most stages; ties go to the one with most labelled objects.

    Raises:
        MotipError: the shards have no val video of the sources.
    """
    videos = [video for source in sources for video in manifest.of(source, "val")]
    if not videos:
        raise MotipError(
            "the shards have no val video of this domain", where=page.storage / "shards", found=", ".join(sources)
        )
    finished = [stage for stage in page.stages if stage.finished]

    def rank(video: VideoEntry) -> tuple[int, int, str]:
        stored = sum(_is_stored(stage, video, page.storage) for stage in finished)
        return -stored, -video.objects, video.video

    return min(videos, key=rank)


def tracks_of(stage: StageFacts, video: VideoEntry, storage: Location, options: TrackingOptions) -> Tile | None:
    """The stage's tracks of the video; None if they are not stored and tracking is disabled.

    Raises:
        MotipError: the checkpoint or the shard is missing or damaged.
    """
    folder = _folder(stage, storage)
    if _is_stored(stage, video, storage):
        return Tile(stage.name, read_tracks(folder, video), stage.classes)
    if not options.track or stage.settings is None or stage.record is None:
        return None
    model, classes, _ = load_for_tracking(local_copy(location(stage.record.checkpoint)))
    subject = ModelUnderTest(model, stage.record.sha256, stage.settings, classes)
    track_missing(subject, EvalJob([video], str(storage), folder, cluster=options.cluster, device=options.device))
    return Tile(stage.name, read_tracks(folder, video), classes)


def _folder(stage: StageFacts, storage: Location) -> Location:
    """Folder with the tracks of the stage's checkpoint."""
    return evaluation_folder(storage, "" if stage.record is None else stage.record.sha256)


def _is_stored(stage: StageFacts, video: VideoEntry, storage: Location) -> bool:
    """Whether tracks of this checkpoint with the stage's own settings are stored."""
    if stage.settings is None or stage.record is None:
        return False
    inputs = tracks_digest(stage.record.sha256, stage.settings, video)
    return is_tracked(_folder(stage, storage), video, inputs)
