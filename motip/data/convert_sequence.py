"""Conversion of one source sequence: read its labels, check its images, write missing shards (runs in a worker)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import cv2

from motip.data.formats.common import RawSequence
from motip.data.formats.registry import reader
from motip.data.image_check import image_hash, image_problem, sampled_positions
from motip.data.manifest import SequenceEntry, VideoEntry, make_entry, summarise_labels
from motip.data.selection import MIN_SEGMENT_FRAMES, Segment
from motip.data.sequence import Frame, ReadReport, Sequence
from motip.data.shards import (
    ROWS_PER_GROUP,
    SHARD_VERSION,
    ShardHeader,
    ShardWriter,
    header_of,
    image_bytes,
    labels_digest,
    read_header,
    shard_path,
)
from motip.errors import MotipError
from motip.storage.atomic import digest
from motip.storage.paths import Location, sha256, size_and_time, sizes_and_times

BAD_IMAGE = "image broken (named under bad images)"
NOT_SELECTED = "in a part of the sequence that no stage asks for"
TAIL = f"in a tail shorter than {MIN_SEGMENT_FRAMES} frames"


@dataclass(frozen=True)
class SequenceJob:
    """Input of a worker.

    Attributes:
        source: name of the source in the curriculum.
        format: key of :data:`motip.data.formats.registry.READERS`.
        split: split in the storage (train, val, test); the raw dataset may name it differently.
        fps: overrides the frame rate of the raw data.
        segments: segments to convert; None converts the uncut sequence as one video.
        strict: raise on broken images instead of dropping their frames.
        known: manifest entries of the sequence from an earlier conversion.
    """

    source: str
    format: str
    raw: RawSequence
    split: str
    fps: float | None
    segments: tuple[Segment, ...] | None
    storage: Location
    strict: bool
    known: tuple[VideoEntry, ...] = ()


@dataclass(frozen=True)
class SequenceResult:
    """Manifest entries of a converted sequence and of its videos.

    ``written`` counts the shards that this conversion wrote; the others were up to date.
    """

    sequence: SequenceEntry
    entries: tuple[VideoEntry, ...]
    written: int


def read(job: SequenceJob) -> tuple[Sequence, ReadReport]:
    """Labels of the sequence, with the split's name in the storage and the source's frame rate."""
    raw = replace(job.raw, fps=job.fps) if job.fps else job.raw
    sequence, report = reader(job.format).read_sequence(raw)
    return replace(sequence, split=job.split), report


def count_frames(job: SequenceJob) -> tuple[str, int]:
    """Name of a sequence and its number of frames that have labels and a listed image."""
    sequence, _ = read(job)
    return job.raw.name, len(sequence.frames)


def convert_sequence(job: SequenceJob) -> SequenceResult:
    """Write the missing or outdated shards of one sequence.

    Raises:
        MotipError: unreadable labels, no labelled frame with an image, or, with ``strict``, broken images.
    """
    cv2.setNumThreads(1)  # Tasks, not threads, share the CPUs.
    sequence, report = read(job)
    if not sequence.frames:
        raise MotipError(
            f"sequence {sequence.name} has no frame with both image and labels",
            where=job.raw.labels,
            fix="remove the sequence, or download its images and labels again",
        )
    segments = job.segments
    if segments is None:
        segments = (Segment(sequence.name, index=0, count=1, start=0, stop=len(sequence.frames)),)
    if job.raw.images is None:
        raise MotipError("the sequence has no image folder", where=f"{job.raw.labels}, sequence {sequence.name}")
    sizes = sizes_and_times(job.raw.images)
    entries: list[VideoEntry] = []
    written = 0
    for segment in segments:
        video = replace(sequence, frames=sequence.frames[segment.start : segment.stop])
        entry, is_new = _shard(job, video, segment, sizes)
        written += is_new
        if entry is not None:
            entries.append(entry)
        _count_bad_images(job, report, video, entry)
    _count_unselected(report, sequence, segments)
    report.kept = sum(sum(entry.boxes.values()) for entry in entries)
    report.check(job.raw.labels)
    videos = tuple(entry.video for entry in entries)
    converted = SequenceEntry(job.source, job.split, sequence.name, videos, report)
    return SequenceResult(converted, tuple(entries), written)


def video_name(video: Sequence, segment: Segment) -> str:
    """The sequence's name, plus first and last frame number if it is cut into several videos."""
    if segment.count == 1:
        return video.name
    return f"{video.name}_{video.frames[0].number:06d}-{video.frames[-1].number:06d}"


def _shard(
    job: SequenceJob, video: Sequence, segment: Segment, sizes: dict[str, tuple[int, float]]
) -> tuple[VideoEntry | None, bool]:
    """The manifest entry of a video (None if it has no intact image), and whether its shard was written now."""
    header = header_of(video, source=job.source, video=video_name(video, segment))
    files = [_file_name(frame) for frame in video.frames]
    images = [sizes[file] for file in files]
    names = [(file, size) for file, (size, _) in zip(files, images, strict=True)]
    header = replace(header, inputs=_inputs_digest(header, video, names))
    relative = f"{job.source}/{job.split}/{header.video}.parquet"
    path = shard_path(job.storage, relative)
    existing = _existing(job, path, relative, header.inputs, newest=max(time for _, time in images))
    if existing is not None:
        return existing, False
    try:
        _write(job, path, header, video, segment.index)
    except _NoIntactImage:
        return None, False
    return _entry(path, relative), True


def _inputs_digest(header: ShardHeader, video: Sequence, images: list[tuple[str, int]]) -> str:
    """Digest of everything a shard is written from; a shard with an equal digest is up to date."""
    fixed = [header.source, header.dataset, header.split, header.sequence, header.video, header.fps]
    fixed += [header.width, header.height, header.rows_per_group, SHARD_VERSION, ROWS_PER_GROUP]
    return digest([fixed, list(header.track_names), labels_digest(video.frames), images])


def _existing(job: SequenceJob, path: Location, relative: str, inputs: str, newest: float) -> VideoEntry | None:
    """The entry of an up-to-date shard: same inputs and no image modified after it was written; else None."""
    if not path.is_file():
        return None
    size, time = size_and_time(path)
    if time < newest:
        return None
    for entry in job.known:
        if entry.shard == relative and entry.inputs == inputs and entry.shard_bytes == size:
            return entry
    try:
        header = read_header(path)
    except MotipError:
        return None  # Corrupt or of another version: written again.
    return _entry(path, relative) if header.inputs == inputs else None


def _entry(path: Location, relative: str) -> VideoEntry:
    size, _ = size_and_time(path)
    return make_entry(read_header(path), shard=relative, shard_sha256=sha256(path), shard_bytes=size)


class _NoIntactImage(Exception):
    """No frame of a video has an intact image; raised inside the writer so that no empty shard is published."""


def _write(job: SequenceJob, path: Location, header: ShardHeader, video: Sequence, index: int) -> None:
    """Write one shard; its broken images are listed in the summary as "name: defect"."""
    bad: list[str] = []
    hashes: list[str] = []
    sampled = sampled_positions(len(video.frames))
    with ShardWriter(path, header) as writer:
        for position, (frame, data) in enumerate(_intact_frames(video, bad)):
            writer.add(frame)
            if position in sampled:
                hashes.append(image_hash(data))
        if bad and job.strict:
            raise MotipError(
                f"{len(bad)} images of {video.name} are broken, such as {bad[0]}",
                where=job.raw.images,
                expected="intact images of one size (--strict)",
                fix="download them again, or convert without --strict: they are then left out and counted",
            )
        if not writer.frames:
            raise _NoIntactImage
        labels = summarise_labels(writer.frames)
        writer.summary = {**labels, "segment": index, "bad_images": bad, "image_hashes": hashes}


def _intact_frames(video: Sequence, bad: list[str]) -> Iterator[tuple[Frame, bytes]]:
    """Frames with their images, and the images; broken images are appended to ``bad`` instead."""
    for frame in video.frames:
        data = image_bytes(frame) or b""
        problem = image_problem(data, (video.width, video.height))
        if problem:
            bad.append(f"{_file_name(frame)}: {problem}")
        else:
            yield replace(frame, image=data), data


def _file_name(frame: Frame) -> str:
    """File name of a frame's image; raises MotipError if the reader found none."""
    if frame.image is None or isinstance(frame.image, bytes):
        raise MotipError("the frame has no image file", where=f"frame {frame.number}", fix="check the image folder")
    return frame.image.name


def _count_bad_images(job: SequenceJob, report: ReadReport, video: Sequence, entry: VideoEntry | None) -> None:
    """Count the label rows and frames lost to broken images; with ``strict``, raise if there are any."""
    rows = sum(len(frame.categories) for frame in video.frames)
    lost = rows - (sum(entry.boxes.values()) if entry else 0)
    frames = len(video.frames) - (entry.frames if entry else 0)
    if lost:
        report.dropped[BAD_IMAGE] += lost
    if frames:
        report.repaired["frame with a broken image, left out"] += frames
    if frames and job.strict:
        raise MotipError(
            f"{frames} images of {video.name} are broken",
            where=job.raw.images,
            found="; ".join(entry.bad_images[:3]) if entry else "no intact image in the segment",
            fix="download them again, or convert without --strict",
        )


def _count_unselected(report: ReadReport, sequence: Sequence, segments: tuple[Segment, ...]) -> None:
    """Count the label rows outside the converted segments, by reason."""
    inside = {position for segment in segments for position in range(segment.start, segment.stop)}
    lost: Counter[str] = Counter()
    last = max(segment.stop for segment in segments)
    has_last = any(segment.index == segment.count - 1 for segment in segments)
    for position, frame in enumerate(sequence.frames):
        if position not in inside:
            lost[TAIL if has_last and position >= last else NOT_SELECTED] += len(frame.categories)
    report.dropped.update(+lost)
