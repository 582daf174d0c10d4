"""One source sequence: read, check its images, write the shards that are missing (runs in a worker)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import cv2

from motip.data.formats.common import Place, RawSequence
from motip.data.formats.registry import reader
from motip.data.image_check import fingerprint, problem_of, sampled_positions
from motip.data.manifest import VideoEntry, make_entry, summarise
from motip.data.selection import FLOOR_FRAMES
from motip.data.sequence import Frame, ReadReport, Sequence
from motip.data.shards import (
    ROWS_PER_GROUP,
    SHARD_VERSION,
    ShardHeader,
    ShardWriter,
    header_of,
    labels_digest,
    read_header,
    shard_path,
)
from motip.errors import MotipError
from motip.storage.atomic import digest
from motip.storage.paths import Location, sha256, size_and_time, sizes_and_times

BAD_IMAGE = "image broken (named under bad images)"
NOT_ASKED = "in a part of the sequence that no stage asks for"
TAIL = f"in a tail shorter than {FLOOR_FRAMES} frames"


@dataclass(frozen=True)
class Piece:
    """Positions ``start`` to ``stop`` of the sequence's frames, the ``index``-th of ``count`` pieces."""

    index: int
    count: int
    start: int
    stop: int


@dataclass(frozen=True)
class SequenceJob:
    """Everything a worker needs; ``pieces`` None means the whole sequence as one video."""

    source: str
    format: str
    raw: RawSequence
    split: str
    fps: float | None
    pieces: tuple[Piece, ...] | None
    storage: Location
    strict: bool
    known: tuple[VideoEntry, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """How many frames a sequence has, by its labels and the listing of its images."""

    source: str
    split: str
    sequence: str
    frames: int


@dataclass(frozen=True)
class SequenceResult:
    """What became of a sequence and of every one of its label rows."""

    source: str
    split: str
    sequence: str
    entries: tuple[VideoEntry, ...]
    report: ReadReport
    written: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "split": self.split,
            "sequence": self.sequence,
            "videos": [entry.video for entry in self.entries],
            "rows": self.report.to_dict(),
        }


def read(job: SequenceJob) -> tuple[Sequence, ReadReport]:
    """The sequence under our name of its split and with the source's frame rate."""
    raw = replace(job.raw, fps=job.fps) if job.fps else job.raw
    sequence, report = reader(job.format).read_sequence(raw)
    return replace(sequence, split=job.split), report


def inspect(job: SequenceJob) -> Inspection:
    sequence, _ = read(job)
    return Inspection(job.source, job.split, job.raw.name, len(sequence.frames))


def convert_sequence(job: SequenceJob) -> SequenceResult:
    """Write what is missing of one sequence; existing shards of the same input are left as they are.

    Raises:
        MotipError: unreadable labels; with ``strict`` also broken images.
    """
    cv2.setNumThreads(1)  # The cluster's CPUs are shared out by task.
    sequence, report = read(job)
    if not sequence.frames:
        raise MotipError(
            f"sequence {sequence.name} has no frame with both image and labels", where=job.raw.labels,
            fix="remove the sequence, or fetch its images and labels again",
        )  # fmt: skip
    pieces = job.pieces if job.pieces is not None else (Piece(0, 1, 0, len(sequence.frames)),)
    sizes = sizes_and_times(job.raw.images)
    entries: list[VideoEntry] = []
    written = 0
    for piece in pieces:
        segment = replace(sequence, frames=sequence.frames[piece.start : piece.stop])
        entry, is_new = _shard(job, segment, piece, sizes)
        written += is_new
        if entry is not None:
            entries.append(entry)
        _account_bad_images(job, report, segment, entry)
    _account_left_out(report, sequence, pieces)
    report.kept = sum(sum(entry.boxes.values()) for entry in entries)
    report.check(job.raw.labels)
    return SequenceResult(job.source, job.split, sequence.name, tuple(entries), report, written)


def video_name(segment: Sequence, piece: Piece) -> str:
    """The sequence's name, with first and last frame number where it is cut into several videos."""
    if piece.count == 1:
        return segment.name
    return f"{segment.name}_{segment.frames[0].number:06d}-{segment.frames[-1].number:06d}"


def _shard(
    job: SequenceJob, segment: Sequence, piece: Piece, sizes: dict[str, tuple[int, float]]
) -> tuple[VideoEntry | None, bool]:
    """The manifest entry of a segment, and whether its shard had to be written; None if no image is whole."""
    header = header_of(segment, source=job.source, video=video_name(segment, piece))
    files = [_file(frame) for frame in segment.frames]
    images = [sizes[file.name] for file in files]
    names = [(file.name, size) for file, (size, _) in zip(files, images, strict=True)]
    header = replace(header, inputs=_inputs(header, segment, names))
    relative = f"{job.source}/{job.split}/{header.video}.parquet"
    path = shard_path(job.storage, relative)
    existing = _existing(job, path, relative, header.inputs, newest=max(time for _, time in images))
    if existing is not None:
        return existing, False
    bad = _write(job, path, header, segment, piece.index)
    if len(bad) == len(segment.frames):
        return None, False
    return _entry(path, relative), True


def _inputs(header: ShardHeader, segment: Sequence, images: list[tuple[str, int]]) -> str:
    """Digest of what a shard is made from: equal digests mean that it need not be written again."""
    fixed = [header.source, header.dataset, header.split, header.sequence, header.video, header.fps]
    fixed += [header.width, header.height, header.rows_per_group, SHARD_VERSION, ROWS_PER_GROUP]
    return digest([fixed, list(header.track_names), labels_digest(segment.frames), images])


def _existing(job: SequenceJob, path: Location, relative: str, inputs: str, newest: float) -> VideoEntry | None:
    """The entry of a shard that is there and still right: same inputs, and no image changed since it was written."""
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
        return None  # Damaged or of another version: written anew.
    return _entry(path, relative) if header.inputs == inputs else None


def _entry(path: Location, relative: str) -> VideoEntry:
    size, _ = size_and_time(path)
    return make_entry(read_header(path), shard=relative, shard_sha256=sha256(path), shard_bytes=size)


class _NothingLeft(Exception):
    """No frame of a segment has a whole image; leaving the writer by an error keeps an empty shard from appearing."""


def _write(job: SequenceJob, path: Location, header: ShardHeader, segment: Sequence, index: int) -> list[str]:
    """Write one shard; returns the names of the broken images with what is wrong with them."""
    bad: list[str] = []
    hashes: dict[int, str] = {}
    sampled = sampled_positions(len(segment.frames))
    try:
        with ShardWriter(path, header) as writer:
            for position, frame in enumerate(_whole_frames(segment, bad)):
                writer.add(frame)
                if position in sampled:
                    hashes[position] = fingerprint(cast(bytes, frame.image))
            if bad and job.strict:
                raise MotipError(
                    f"{len(bad)} images of {segment.name} are broken, such as {bad[0]}",
                    where=job.raw.images,
                    expected="whole images of one size (--strict)",
                    fix="fetch them again, or go on without --strict: they are then left out and counted",
                )
            if not writer.frames:
                raise _NothingLeft
            writer.summary = {
                **summarise(writer.frames),
                "segment": index,
                "bad_images": bad,
                "image_hashes": [hashes[position] for position in sorted(hashes)],
            }
    except _NothingLeft:
        return bad
    return bad


def _whole_frames(segment: Sequence, bad: list[str]) -> Iterator[Frame]:
    """Frames with their image bytes; those whose image is broken are named in ``bad`` instead."""
    for frame in segment.frames:
        data = _file(frame).read_bytes()
        problem = problem_of(data, (segment.width, segment.height))
        if problem:
            bad.append(f"{_file(frame).name}: {problem}")
        else:
            yield replace(frame, image=data)


def _file(frame: Frame) -> Place:
    """The image's place; readers give every frame of a sequence with an image folder one."""
    return cast(Place, frame.image)


def _account_bad_images(job: SequenceJob, report: ReadReport, segment: Sequence, entry: VideoEntry | None) -> None:
    rows = sum(len(frame.categories) for frame in segment.frames)
    lost = rows - (sum(entry.boxes.values()) if entry else 0)
    frames = len(segment.frames) - (entry.frames if entry else 0)
    if lost:
        report.dropped[BAD_IMAGE] += lost
    if frames:
        report.repaired["frame with a broken image, left out"] += frames
    if frames and job.strict:
        raise MotipError(
            f"{frames} images of {segment.name} are broken",
            where=job.raw.images,
            found="; ".join(entry.bad_images[:3]) if entry else "no whole image in the segment",
            fix="fetch them again, or go on without --strict",
        )


def _account_left_out(report: ReadReport, sequence: Sequence, pieces: tuple[Piece, ...]) -> None:
    """Rows outside the converted pieces, by reason."""
    inside = {position for piece in pieces for position in range(piece.start, piece.stop)}
    counts: dict[str, int] = {}
    last = max(piece.stop for piece in pieces)
    has_last = any(piece.index == piece.count - 1 for piece in pieces)
    for position, frame in enumerate(sequence.frames):
        if position not in inside:
            reason = TAIL if has_last and position >= last else NOT_ASKED
            counts[reason] = counts.get(reason, 0) + len(frame.categories)
    for reason, rows in counts.items():
        if rows:
            report.dropped[reason] += rows
