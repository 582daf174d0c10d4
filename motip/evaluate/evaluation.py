"""Track and score a checkpoint on converted videos: each video once, spread over workers, kept as it is finished."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from motip.cluster import Cluster
from motip.data.clip_loader import read_video_frames
from motip.data.formats.result_files import read_mot, write_mot
from motip.data.manifest import VideoEntry
from motip.data.sequence import ClassMap, TrackRows
from motip.errors import MotipError
from motip.evaluate.scores import Scores
from motip.evaluate.validation import score_videos
from motip.model import MOTIP
from motip.storage.atomic import digest
from motip.storage.paths import Location, RemotePath, fetch, read_json, whole_file, write_json
from motip.track.api import track_sequence
from motip.track.settings import TrackerSettings
from motip.weights.class_names import canonical_name

logger = logging.getLogger(__name__)

FORMAT = 1
"""Part of every kept track's identity; raised when tracking comes to mean something else."""
DEATHS = 3
"""So many workers may die on one video before the video is held to be the cause."""

OnVideo = Callable[[VideoEntry, int, int], None]
"""Called with a finished video, how many are done, and how many there are."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model in eval mode on the CPU, its file's sha256, and how it tracks.

    Attributes:
        classes: names of the class ids in its tracks, where the class maps it is scored with have others: tracks of
            classes they lack are left out, and classes it lacks are missed. Empty: the same classes.
    """

    model: MOTIP
    sha256: str
    settings: TrackerSettings
    classes: tuple[str, ...] = ()

    def inputs(self, video: VideoEntry) -> str:
        """Hex digest of all that the tracks of a video follow from."""
        return track_inputs(self.sha256, self.settings, video)


def track_inputs(sha256: str, settings: TrackerSettings, video: VideoEntry) -> str:
    """Hex digest of all that a model's tracks of a video follow from; ``sha256`` is that of its file."""
    return digest([FORMAT, sha256, asdict(settings), video.shard_sha256])


@dataclass(frozen=True)
class Evaluation:
    """Outcome of an evaluation.

    Attributes:
        scores: by source; never pooled, since protocols and classes may differ.
        tracked_only: sources without a label of the averaged classes, and so without scores.
        reused: videos whose tracks were there from an earlier, interrupted or equal run.
        notes: what must stand beside the numbers.
        tracks: what was scored, by source and video; class ids index the classes of the source's class map.
    """

    scores: dict[str, Scores]
    tracked_only: tuple[str, ...]
    videos: int
    reused: int
    notes: tuple[str, ...]
    tracks: dict[str, dict[str, TrackRows]] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """Which videos are gone through, and how.

    Attributes:
        storage: folder or URI that holds ``shards/``.
        folder: keeps what is finished.
        split: of the videos; written beside the scores.
        averaged: classes the class average is taken over (CLASSES_TO_EVAL); None: all.
        cluster: where Ray actors share the videos; None tracks in this process.
        workers: actors at most; None takes one for every CPU (GPU with a CUDA ``device``).
        on_video: hears of every video that is finished.
    """

    videos: Sequence[VideoEntry]
    storage: str
    folder: Location
    split: str = "val"
    averaged: Collection[str] | None = None
    cluster: Cluster | None = None
    workers: int | None = None
    device: str = "cpu"
    on_video: OnVideo | None = None


def evaluate(
    subject: Subject, work: Work, class_maps: Mapping[str, ClassMap], protocols: Mapping[str, str]
) -> Evaluation:
    """Track the videos and score those with labels.

    Tracks are written to ``<folder>/tracks/<source>/<split>/<video>.txt`` as each video is finished; run again, the
    finished ones are read back. Scores are always those of the written files.

    Args:
        class_maps, protocols: by source.

    Raises:
        MotipError: a shard is missing or damaged, files cannot be written, more workers than there is room for.
    """
    videos, averaged = work.videos, work.averaged
    reused = track(subject, work)
    places = {(video.source, video.video): tracks_place(work.folder, video) for video in videos}
    tracked = {key: _read(path) for key, (path, _) in places.items()}
    notes = dict.fromkeys(note for _, path in places.values() for note in read_json(path)["notes"])
    scores: dict[str, Scores] = {}
    tracks: dict[str, dict[str, TrackRows]] = {}
    tracked_only = []
    for source in sorted({video.source for video in videos}):
        own = [video for video in videos if video.source == source]
        class_map = class_maps[source]
        if not labelled(own, class_map, averaged):
            tracked_only.append(source)
            continue
        own_classes = subject.classes or class_map.names
        rows_of = {
            key: in_classes(rows, own_classes, class_map.names) for key, rows in tracked.items() if key[0] == source
        }
        scores |= score_videos(own, rows_of, work.storage, class_maps, protocols, work.split, averaged).by_source
        tracks[source] = {video: rows for (_, video), rows in rows_of.items()}
    return Evaluation(scores, tuple(tracked_only), len(videos), reused, tuple(notes), tracks)


def track(subject: Subject, work: Work) -> int:
    """Track those of the videos that the folder has no tracks of; returns how many it had.

    Raises:
        MotipError: as ``evaluate``.
    """
    waiting = [video for video in work.videos if not is_tracked(work.folder, video, subject.inputs(video))]
    reused = len(work.videos) - len(waiting)
    finished = spread(VideoTracker, subject, waiting, work.storage, work.device, work.cluster, work.workers)
    for done, (video, rows, facts) in enumerate(finished, start=reused + 1):
        tracks, told = tracks_place(work.folder, video)
        with whole_file(tracks) as path:
            write_mot(path, rows)
        # Written last: tracks count as finished once their facts are there.
        write_json(told, {"inputs": subject.inputs(video), **facts})
        if work.on_video is not None:
            work.on_video(video, done, len(work.videos))
    return reused


def tracks_place(folder: Location, video: VideoEntry) -> tuple[Location, Location]:
    """Where an evaluation's folder keeps the tracks of a video, and how they came about."""
    parent = folder / f"tracks/{video.source}/{video.split}"
    return parent / f"{video.video}.txt", parent / f"{video.video}.json"


def is_tracked(folder: Location, video: VideoEntry, inputs: str) -> bool:
    """Whether there are tracks of the video that follow from these inputs (``track_inputs``)."""
    tracks, facts = tracks_place(folder, video)
    return facts.is_file() and tracks.is_file() and read_json(facts).get("inputs") == inputs


def read_tracks(folder: Location, video: VideoEntry) -> TrackRows:
    """The tracks of a video; class ids are those of the model."""
    return _read(tracks_place(folder, video)[0])


def labelled(videos: Sequence[VideoEntry], class_map: ClassMap, averaged: Collection[str] | None = None) -> bool:
    """Whether any video has a label of the averaged classes (None: of any class)."""
    wanted = class_map.names if averaged is None else averaged
    raws = {raw for name, raws in class_map.mapping.items() if name in wanted for raw in raws}
    return any(
        count > video.ignored.get(raw, 0) for video in videos for raw, count in video.boxes.items() if raw in raws
    )


def in_classes(rows: TrackRows, own: Sequence[str], wanted: Sequence[str]) -> TrackRows:
    """Rows whose class ids index ``own``, renumbered for ``wanted``; rows of other classes are left out."""
    if tuple(own) == tuple(wanted):
        return rows
    numbers = {canonical_name(name): number for number, name in enumerate(wanted)}
    lookup = np.array([numbers.get(canonical_name(name), -1) for name in own], np.int64)
    class_ids = lookup[rows.class_ids]
    keep = class_ids >= 0
    return TrackRows(rows.frames[keep], rows.track_ids[keep], rows.boxes_xyxy[keep], rows.scores[keep], class_ids[keep])


def _read(path: Location) -> TrackRows:
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="motip-") as folder:
            return read_mot(fetch(path, Path(folder) / path.name))
    return read_mot(path)


class VideoTracker:
    """Tracks one video after the other; an actor on the cluster, or a plain object here."""

    def __init__(self, subject: Subject, storage: str, device: str, threads: int | None = None) -> None:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self._model = subject.model.to(torch.device(device))
        self._settings = subject.settings
        self._storage = storage

    def track(self, video: VideoEntry) -> tuple[TrackRows, dict[str, Any]]:
        """Tracks, and how they came about."""
        result = track_sequence(self._model, read_video_frames(video, self._storage), self._settings)
        facts = {
            "frames": result.num_frames,
            "seconds": result.seconds,
            "counters": result.counters,
            "notes": list(result.notes),
        }
        return result.rows, facts


Finished = Iterator[tuple[VideoEntry, Any, dict[str, Any]]]


def spread(
    worker: Any,
    subject: Any,
    videos: Sequence[VideoEntry],
    storage: str,
    device: str,
    cluster: Cluster | None = None,
    workers: int | None = None,
) -> Finished:
    """Let workers go through videos; results come as they are finished, one for each video.

    On Ray a worker whose process or node is gone is replaced, once there is room, and another takes its video.

    Args:
        worker: class made as ``VideoTracker`` is, whose ``track(video)`` returns a result and its facts.
        subject: what each worker is given.
        cluster: where Ray actors share the videos; None does all of them in this process.
        workers: actors at most; None takes one for every CPU (GPU with a CUDA ``device``).

    Raises:
        MotipError: more workers than there is room for, or workers die again and again.
    """
    if cluster is not None:
        yield from _on_ray(worker, subject, videos, storage, device, cluster, workers)
        return
    here = worker(subject, storage, device)
    for video in videos:
        yield video, *here.track(video)


def _on_ray(
    worker: Any,
    subject: Any,
    videos: Sequence[VideoEntry],
    storage: str,
    device: str,
    cluster: Cluster,
    workers: int | None,
) -> Finished:
    import ray

    on_gpu = device.startswith("cuda")
    room = int(cluster.gpus if on_gpu else cluster.cpus)
    if workers is not None and workers > room:
        raise MotipError(
            f"more workers than {'GPUs' if on_gpu else 'CPUs'}",
            where="--workers",
            found=workers,
            expected=f"at most {room}",
            fix="lower --workers or add nodes",
        )
    count = min(workers or room, len(videos))
    if not count:
        return
    actor: Any = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0)(worker)
    shared = ray.put(subject)
    actors: list[Any] = []
    idle: list[Any] = []
    # Long videos first, so that no actor is left alone with one at the end.
    queue = sorted(videos, key=lambda video: (-video.frames, video.identity))
    running: dict[Any, tuple[Any, VideoEntry | None]] = {}  # None: the actor is starting
    deaths: Counter[str] = Counter()

    def start() -> None:
        actors.append(actor.remote(shared, storage, "cuda" if on_gpu else "cpu", 1))
        running[actors[-1].__ray_ready__.remote()] = actors[-1], None

    try:
        for _ in range(count):
            start()
        while queue or any(video is not None for _, video in running.values()):
            while queue and idle:
                free, following = idle.pop(), queue.pop(0)
                running[free.track.remote(following)] = free, following
            done, _ = ray.wait(list(running), num_returns=1)
            each, video = running.pop(done[0])
            try:
                result = ray.get(done[0])
            except ray.exceptions.RayActorError as error:
                actors.remove(each)
                ray.kill(each)  # it may only have been out of reach
                _count_death(deaths, video, error)
                queue[:0] = [video] if video is not None else []
                start()
                continue
            idle.append(each)
            if video is not None:
                yield video, *result
    finally:
        for each in actors:
            ray.kill(each)


def _count_death(deaths: Counter[str], video: VideoEntry | None, error: Exception) -> None:
    """Raises MotipError where one video, or the start of workers, has cost too many of them."""
    what = "start" if video is None else f"{video.source}/{video.video}"
    deaths[what] += 1
    told = str(error).strip().splitlines()[0]
    if deaths[what] >= DEATHS:
        raise MotipError(
            f"{DEATHS} workers died one after the other" + ("" if video is None else " on the same video"),
            where="the start of a worker" if video is None else what,
            found=told,
            expected="a worker that lives",
            fix="most often memory ran out: fewer --workers, or nodes with more memory; see `ray logs`",
        ) from error
    logger.warning("a worker is gone (%s: %s), another takes over", what, told)
