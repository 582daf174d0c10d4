"""The tracks of one sequence by each stage: those that were stored when it was scored, else tracked now and stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from motip.cluster import Cluster
from motip.data.manifest import Manifest, VideoEntry
from motip.data.sequence import TrackRows
from motip.errors import MotipError
from motip.evaluate.evaluation import Subject, Work, is_tracked, read_tracks, track, track_inputs
from motip.report.page_facts import PageFacts, StageFacts
from motip.storage.paths import Location, local_copy, location
from motip.weights.export import load_for_tracking


@dataclass(frozen=True)
class StageTracks:
    """One stage's tracks of the sequence; class ids index ``class_names``."""

    stage: StageFacts
    rows: TrackRows
    class_names: Sequence[str]


@dataclass(frozen=True)
class Means:
    """What sequences may be tracked with that were not tracked before.

    Attributes:
        track: False uses stored tracks only.
        cluster: where Ray actors track; None tracks in this process.
        device: ``cpu`` or ``cuda``, of this process or of the actors.
    """

    track: bool = True
    cluster: Cluster | None = None
    device: str = "cpu"


def domains_shown(page: PageFacts) -> dict[str, list[str]]:
    """Domain -> sources, of all that any stage was scored on."""
    found: dict[str, list[str]] = {}
    for stage in page.stages:
        for source in [*stage.scores, *stage.row]:
            own = found.setdefault(page.domain_of(source), [])
            if source not in own:
                own.append(source)
    return found


def choose_video(page: PageFacts, manifest: Manifest, sources: Sequence[str], storage: Location) -> VideoEntry:
    """The val video that most stages have stored tracks of; of equals the one with most labelled objects.

    Raises:
        MotipError: the shards have no val video of the sources.
    """
    videos = [video for source in sources for video in manifest.of(source, "val")]
    if not videos:
        raise MotipError(
            "the shards have no val video of this domain", where=storage / "shards", found=", ".join(sources)
        )
    finished = [stage for stage in page.stages if stage.finished]

    def rank(video: VideoEntry) -> tuple[int, int, str]:
        stored = sum(_is_stored(stage, video, storage) for stage in finished)
        return -stored, -video.objects, video.video

    return min(videos, key=rank)


def tracks_of(stage: StageFacts, video: VideoEntry, storage: Location, means: Means) -> StageTracks | None:
    """The stage's tracks of the video; None where they are not stored and may not be tracked.

    Raises:
        MotipError: the checkpoint or the shard is missing or damaged.
    """
    folder = _folder(stage, storage)
    if _is_stored(stage, video, storage):
        return StageTracks(stage, read_tracks(folder, video), stage.classes)
    if not means.track or stage.settings is None:
        return None
    model, classes, _ = load_for_tracking(local_copy(location(str(stage.record["checkpoint"]))))
    subject = Subject(model, str(stage.record["sha256"]), stage.settings, classes)
    track(subject, Work([video], str(storage), folder, cluster=means.cluster, device=means.device))
    return StageTracks(stage, read_tracks(folder, video), classes)


def _folder(stage: StageFacts, storage: Location) -> Location:
    """Where the evaluation of the stage's checkpoint keeps its tracks."""
    return storage / "evaluations" / str(stage.record["sha256"])[:12]


def _is_stored(stage: StageFacts, video: VideoEntry, storage: Location) -> bool:
    """Whether the evaluation kept tracks of this checkpoint with the stage's own settings."""
    if stage.settings is None:
        return False
    inputs = track_inputs(str(stage.record["sha256"]), stage.settings, video)
    return is_tracked(_folder(stage, storage), video, inputs)
