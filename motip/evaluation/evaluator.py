"""Evaluation of a checkpoint on converted videos: track each video once, over Ray actors or here, and score it."""

from __future__ import annotations

import logging
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from motip.cluster import Cluster
from motip.data.clip_loader import read_video_frames
from motip.data.formats.result_files import read_mot, write_mot
from motip.data.manifest import VideoEntry
from motip.data.sequence import ClassMap, TrackRows
from motip.errors import MotipError
from motip.evaluation.scores import Scores
from motip.evaluation.validation import score_videos
from motip.model import MOTIP
from motip.storage.atomic import digest
from motip.storage.paths import Location, RemotePath, atomic_output, download, read_json, write_json
from motip.tracking.api import track_sequence
from motip.tracking.settings import TrackerSettings
from motip.weights.class_names import canonical_name

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of the digest of stored tracks; raised when the meaning of tracks changes."""
_MAX_WORKER_DEATHS = 3
"""Worker deaths on one video (or at start-up) after which the evaluation fails."""

_OnVideo = Callable[[VideoEntry, int, int], None]
"""Called with a finished video, the number of finished videos, and their total."""

_ResultT = TypeVar("_ResultT")


class HasModel(Protocol):
    """What the actors of ``map_videos`` share."""

    @property
    def model(self) -> MOTIP:
        """The network, in eval mode on the CPU."""


_SubjectT = TypeVar("_SubjectT", bound=HasModel)


@dataclass(frozen=True)
class ModelUnderTest:
    """A model to evaluate.

    Attributes:
        model: in eval mode on the CPU.
        sha256: hex digest of its weights file.
        settings: of the tracker.
        classes: names of the class ids in its tracks. Where the class map of a source has other classes, tracks of
            classes missing in the map are dropped, and classes missing here count as missed. Empty: those of the map.
    """

    model: MOTIP
    sha256: str
    settings: TrackerSettings
    classes: tuple[str, ...] = ()

    def tracks_digest(self, video: VideoEntry) -> str:
        """Hex digest of everything the tracks of a video depend on."""
        return tracks_digest(self.sha256, self.settings, video)


def tracks_digest(sha256: str, settings: TrackerSettings, video: VideoEntry) -> str:
    """Hex digest of everything a model's tracks of a video depend on; ``sha256`` is that of the weights file."""
    return digest([FORMAT_VERSION, sha256, asdict(settings), video.shard_sha256])


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        scores: by source; never pooled, since protocols and classes may differ.
        tracked_only: sources without a label of the averaged classes, and therefore without scores.
        videos: number of videos.
        reused: videos whose tracks were stored by an earlier run.
        notes: remarks that must be shown with the numbers.
        tracks: scored tracks by source and video; class ids index the classes of the source's class map.
    """

    scores: dict[str, Scores]
    tracked_only: tuple[str, ...]
    videos: int
    reused: int
    notes: tuple[str, ...]
    tracks: dict[str, dict[str, TrackRows]] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalJob:
    """Videos to track, and where and how.

    Attributes:
        videos: entries of the manifest.
        storage: folder or URI that contains ``shards/``.
        folder: output folder for tracks and results; see ``evaluation_folder``.
        split: of the videos; written with the scores.
        averaged: classes the class average is taken over (CLASSES_TO_EVAL); None: all.
        cluster: Ray cluster whose actors share the videos; None tracks in this process.
        workers: maximum number of actors; None: one per CPU (per GPU with a CUDA ``device``).
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        on_video: progress callback.
    """

    videos: Sequence[VideoEntry]
    storage: str
    folder: Location
    split: str = "val"
    averaged: Collection[str] | None = None
    cluster: Cluster | None = None
    workers: int | None = None
    device: str = "cpu"
    on_video: _OnVideo | None = None


def evaluate_videos(
    model: ModelUnderTest, job: EvalJob, class_maps: Mapping[str, ClassMap], protocols: Mapping[str, str]
) -> Evaluation:
    """Track videos and score those with labels.

    Tracks are written to ``<folder>/tracks/<source>/<split>/<video>.txt`` as each video finishes; a later run reads
    them back. Scores are always computed from the written files.

    Args:
        model: the model with its tracker settings.
        job: videos, output folder and resources.
        class_maps: source -> class map, for every source of the videos.
        protocols: source -> name of an evaluation protocol (``motip.evaluation.protocols``).

    Returns:
        Scores by source, and the tracks they were computed from.

    Raises:
        MotipError: a shard is missing or damaged, files cannot be written, or more workers than CPUs or GPUs.

    Examples:
        Two frames with one labelled car, written as a shard and tracked with random weights:

        >>> import cv2
        >>> from motip.data.manifest import make_entry, summarise_labels
        >>> from motip.data.sequence import Frame, Sequence as Video
        >>> from motip.data.shards import ShardWriter, header_of, read_header
        >>> from motip.model import ModelSpec, build_model
        >>> from motip.stage_folder import evaluation_folder
        >>> from motip.storage.atomic import sha256_file
        >>> storage = Path(tempfile.mkdtemp())
        >>> png = cv2.imencode(".png", np.zeros((96, 128, 3), np.uint8))[1].tobytes()
        >>> box, zero = np.array([[10, 10, 40, 40]], np.float32), np.zeros(1, np.int8)
        >>> frames = [Frame(n, png, box, np.array([1]), ("car",), zero > 0, zero, zero) for n in range(2)]
        >>> shard = storage / "shards" / "toy.parquet"
        >>> header = header_of(Video("v0", "toy", "val", 10.0, 128, 96, tuple(frames)), source="toy")
        >>> with ShardWriter(shard, header) as writer:
        ...     for frame in frames:
        ...         writer.add(frame)
        ...     writer.summary = {**summarise_labels(frames), "segment": 0}
        >>> entry = {"shard": "toy.parquet", "shard_sha256": sha256_file(shard), "shard_bytes": shard.stat().st_size}
        >>> video = make_entry(read_header(shard), **entry)
        >>> spec = ModelSpec(backbone="tiny_gn", hidden_dim=32, num_heads=2, enc_layers=1, dec_layers=1,
        ...                  feature_dim=32, id_dim=32, num_id_decoder_layers=1, rel_pe_length=32)
        >>> model = ModelUnderTest(build_model(spec).eval(), "0" * 64, TrackerSettings(short_side=64))
        >>> job = EvalJob([video], str(storage), evaluation_folder(storage, model.sha256))
        >>> result = evaluate_videos(model, job, {"toy": ClassMap(("car",), {"car": ("car",)})}, {"toy": "plain"})
        >>> result.videos, result.scores["toy"].class_averaged["GT"]
        (1, 2)
    """
    # tracks
    videos, averaged = job.videos, job.averaged
    reused = track_missing(model, job)
    facts = [read_json(track_paths(job.folder, video)[1]) for video in videos]
    notes = dict.fromkeys(note for each in facts for note in each["notes"])
    # scores by source
    scores: dict[str, Scores] = {}
    tracks: dict[str, dict[str, TrackRows]] = {}
    tracked_only = []
    for source in sorted({video.source for video in videos}):
        own = [video for video in videos if video.source == source]
        names = class_maps[source].names
        if not has_labels(own, class_maps[source], averaged):
            tracked_only.append(source)
            continue
        tracks[source] = {
            video.video: remap_classes(read_tracks(job.folder, video), model.classes or names, names) for video in own
        }
        tracked = {(source, video): rows for video, rows in tracks[source].items()}
        scores |= score_videos(own, tracked, job.storage, class_maps, protocols, job.split, averaged).by_source
    return Evaluation(scores, tuple(tracked_only), len(videos), reused, tuple(notes), tracks)


def track_missing(model: ModelUnderTest, job: EvalJob) -> int:
    """Track the videos of a job without stored tracks; returns how many had them.

    Raises:
        MotipError: as ``evaluate``.
    """
    missing = [video for video in job.videos if not is_tracked(job.folder, video, model.tracks_digest(video))]
    reused = len(job.videos) - len(missing)
    results = map_videos(VideoTracker, model, missing, job)
    for done, (video, rows, facts) in enumerate(results, start=reused + 1):
        tracks_path, facts_path = track_paths(job.folder, video)
        with atomic_output(tracks_path) as path:
            write_mot(path, rows)
        # Written last: the facts mark the tracks as complete.
        write_json(facts_path, {"inputs": model.tracks_digest(video), **facts})
        if job.on_video is not None:
            job.on_video(video, done, len(job.videos))
    return reused


def track_paths(folder: Location, video: VideoEntry) -> tuple[Location, Location]:
    """Paths of a video's tracks (MOT rows) and of their facts (JSON: digest, counters, notes, seconds)."""
    parent = folder / f"tracks/{video.source}/{video.split}"
    return parent / f"{video.video}.txt", parent / f"{video.video}.json"


def is_tracked(folder: Location, video: VideoEntry, inputs: str) -> bool:
    """Whether the folder contains tracks of the video with this digest (``tracks_digest``)."""
    tracks, facts = track_paths(folder, video)
    return tracks.is_file() and is_current(facts, inputs)


def is_current(path: Location, inputs: str) -> bool:
    """Whether a stored JSON file exists and was computed from inputs with this digest."""
    return path.is_file() and read_json(path).get("inputs") == inputs


def read_tracks(folder: Location, video: VideoEntry) -> TrackRows:
    """Stored tracks of a video; class ids are those of the model."""
    path, _ = track_paths(folder, video)
    if not isinstance(path, RemotePath):
        return read_mot(path)
    with tempfile.TemporaryDirectory(prefix="motip-") as local:
        return read_mot(download(path, Path(local) / path.name))


def has_labels(videos: Sequence[VideoEntry], class_map: ClassMap, averaged: Collection[str] | None = None) -> bool:
    """Whether any video has a label of the averaged classes (None: of any class)."""
    names = class_map.names if averaged is None else averaged
    raws = {raw for name, raws in class_map.mapping.items() if name in names for raw in raws}
    return any(
        count > video.ignored.get(raw, 0) for video in videos for raw, count in video.boxes.items() if raw in raws
    )


def remap_classes(rows: TrackRows, source: Sequence[str], target: Sequence[str]) -> TrackRows:
    """Rows with class ids of the list ``source``, converted to ``target``; rows of classes not in it are dropped."""
    if tuple(source) == tuple(target):
        return rows
    numbers = {canonical_name(name): number for number, name in enumerate(target)}
    lookup = np.array([numbers.get(canonical_name(name), -1) for name in source], np.int64)
    class_ids = lookup[rows.class_ids]
    keep = class_ids >= 0
    return TrackRows(rows.frames[keep], rows.track_ids[keep], rows.boxes_xyxy[keep], rows.scores[keep], class_ids[keep])


class VideoWorker(ABC, Generic[_SubjectT, _ResultT]):
    """Worker of ``map_videos``: one video per call, in this process or as a Ray actor."""

    def __init__(self, subject: _SubjectT, storage: str, device: str, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._subject = subject
        self._model = subject.model.to(torch.device(device))
        self._storage = storage

    @abstractmethod
    def track(self, video: VideoEntry) -> tuple[_ResultT, dict[str, Any]]:
        """Result of one video, and JSON-serialisable facts about it."""


class VideoTracker(VideoWorker[ModelUnderTest, TrackRows]):
    """Worker that tracks videos."""

    def track(self, video: VideoEntry) -> tuple[TrackRows, dict[str, Any]]:
        """Tracks, and their frames, seconds, counters and notes."""
        result = track_sequence(self._model, read_video_frames(video, self._storage), self._subject.settings)
        facts = {
            "frames": result.num_frames,
            "seconds": result.seconds,
            "counters": result.counters,
            "notes": list(result.notes),
        }
        return result.rows, facts


def map_videos(
    worker: type[VideoWorker[_SubjectT, _ResultT]], subject: _SubjectT, videos: Sequence[VideoEntry], job: EvalJob
) -> Iterator[tuple[VideoEntry, _ResultT, dict[str, Any]]]:
    """Run a worker over some videos of a job; yields one result per video in order of completion.

    On Ray a worker whose process or node dies is replaced, and its video is tracked by another.

    Raises:
        MotipError: more workers than CPUs or GPUs, or workers die ``_MAX_WORKER_DEATHS`` times on one video.
    """
    if job.cluster is not None:
        yield from _map_on_ray(worker, subject, videos, job, job.cluster)
        return
    local = worker(subject, job.storage, job.device)
    for video in videos:
        yield video, *local.track(video)


def _map_on_ray(
    worker: type[VideoWorker[_SubjectT, _ResultT]],
    subject: _SubjectT,
    videos: Sequence[VideoEntry],
    job: EvalJob,
    cluster: Cluster,
) -> Iterator[tuple[VideoEntry, _ResultT, dict[str, Any]]]:
    import ray

    # number of actors
    on_gpu = job.device.startswith("cuda")
    available = int(cluster.gpus if on_gpu else cluster.cpus)
    if job.workers is not None and job.workers > available:
        raise MotipError(
            f"more workers than {'GPUs' if on_gpu else 'CPUs'}",
            where="--workers",
            found=job.workers,
            expected=f"at most {available}",
            fix="lower --workers or add nodes",
        )
    count = min(job.workers or available, len(videos))
    if not count:
        return
    # actors and queue
    actor_class: Any = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0)(worker)
    shared = ray.put(subject)
    actors: list[Any] = []
    # Longest videos first, so that the actors finish at about the same time.
    queue = sorted(videos, key=lambda video: (-video.frames, video.identity))
    running: dict[Any, tuple[Any, VideoEntry | None]] = {}  # None: the actor is starting
    deaths: Counter[str] = Counter()

    def start() -> None:
        actors.append(actor_class.remote(shared, job.storage, "cuda" if on_gpu else "cpu", 1))
        running[actors[-1].__ray_ready__.remote()] = actors[-1], None

    def stop(actor: Any) -> None:
        actors.remove(actor)
        ray.kill(actor)

    try:
        for _ in range(count):
            start()
        while queue or any(video is not None for _, video in running.values()):
            (done,), _ = ray.wait(list(running), num_returns=1)
            actor, video = running.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayActorError as error:
                stop(actor)  # it may only be unreachable
                _count_death(deaths, video, error)
                queue[:0] = [video] if video is not None else []
                start()
                continue
            if queue:
                following = queue.pop(0)
                running[actor.track.remote(following)] = actor, following
            else:
                stop(actor)  # its CPU or GPU is free for the replacement of another
            if video is not None:
                yield video, *result
    finally:
        for each in actors:
            ray.kill(each)


def _count_death(deaths: Counter[str], video: VideoEntry | None, error: Exception) -> None:
    """Count a worker death; raise MotipError at ``_MAX_WORKER_DEATHS`` on one video or at start-up."""
    place = "worker start-up" if video is None else f"{video.source}/{video.video}"
    deaths[place] += 1
    reason = str(error).strip().splitlines()[0]
    if deaths[place] >= _MAX_WORKER_DEATHS:
        raise MotipError(
            f"{_MAX_WORKER_DEATHS} workers died" + (" while starting" if video is None else " on the same video"),
            where=place,
            found=reason,
            expected="a worker that stays alive",
            fix="the usual cause is memory: fewer --workers, or nodes with more memory; see `ray logs`",
        ) from error
    logger.warning("worker died (%s: %s), starting a replacement", place, reason)
