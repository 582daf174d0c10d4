"""Parquet shards: one file per video, one row per frame with the encoded image and its labels.

Layout: ``shards/<source>/<split>/<video>.parquet``. A row group has ``ROWS_PER_GROUP`` frames, so that a clip reads
only the groups of its frames. Image bytes are stored as they were on disk (no page compression and no statistics,
since JPEG does not compress further); every other column is small. The file metadata entry ``motip`` is a JSON
header (:class:`ShardHeader`). Any Parquet tool can read the files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from motip.data.sequence import Frame, Sequence
from motip.errors import MotipError
from motip.storage.paths import Location, atomic_output, open_parquet
from motip.storage.paths import location as to_location

SHARD_VERSION = 1
ROWS_PER_GROUP = 8
"""Frames per row group. Measured on 200 frames of 1280x720 (155 kB each), page cache: groups of 1, 8 and 32 open in
1.8, 0.4 and 0.2 ms, and read 5 frames at interval 3 in 0.5, 0.6 and 1.0 ms; 8 also keeps what S3 transfers small."""

_METADATA_KEY = b"motip"
_IMAGE = "image"
_LABEL_DTYPES = {"boxes_xyxy": "<f4", "track_ids": "<i8", "ignore": "?", "occlusion": "i1", "truncation": "i1"}
"""Numeric label columns, in the order of the digest."""
_LABEL_COLUMNS = ("frame_number", "categories", *_LABEL_DTYPES)
_FRAME_COLUMNS = (*_LABEL_COLUMNS, _IMAGE)

SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("sequence", pa.string(), nullable=False),
        pa.field("video", pa.string(), nullable=False),
        pa.field("frame_number", pa.int32(), nullable=False),  # 0-based, in the source sequence
        pa.field("position", pa.int32(), nullable=False),  # 0-based, in this video
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("fps", pa.float32(), nullable=False),
        pa.field(_IMAGE, pa.binary()),  # the encoded file; null where only labels exist
        pa.field("boxes_xyxy", pa.list_(pa.float32())),  # 4 values per object, pixels
        pa.field("track_ids", pa.list_(pa.int64())),
        pa.field("categories", pa.list_(pa.string())),
        pa.field("ignore", pa.list_(pa.bool_())),
        pa.field("occlusion", pa.list_(pa.int8())),
        pa.field("truncation", pa.list_(pa.int8())),
    ]
)
_SMALL_COLUMNS = [name for name in SCHEMA.names if name != _IMAGE]


@dataclass(frozen=True)
class ShardHeader:
    """Metadata of a shard, readable without its rows.

    ``labels_sha256`` and ``images_sha256`` digest the stored content; ``inputs`` digests what it was written from
    (labels, image names and sizes, settings) and determines whether a conversion writes the shard again.
    ``summary`` has the label counts for the manifest.
    """

    source: str
    dataset: str
    split: str
    sequence: str
    video: str
    fps: float
    width: int
    height: int
    inputs: str = ""
    labels_sha256: str = ""
    images_sha256: str = ""
    frames: int = 0
    rows_per_group: int = ROWS_PER_GROUP
    version: int = SHARD_VERSION
    track_names: tuple[str, ...] = ()
    summary: dict[str, Any] | None = None


def header_of(sequence: Sequence, *, source: str, video: str | None = None) -> ShardHeader:
    """The header of a shard for ``sequence``; ``video`` names the segment (default: the sequence itself)."""
    return ShardHeader(
        source=source,
        dataset=sequence.dataset,
        split=sequence.split,
        sequence=sequence.name,
        video=video or sequence.name,
        fps=float(sequence.fps),
        width=sequence.width,
        height=sequence.height,
        track_names=sequence.track_names,
    )


def labels_digest(frames: Iterable[Frame]) -> str:
    """Hex sha256 of frame numbers and labels; equal for equal labels on any machine."""
    total = hashlib.sha256()
    for frame in frames:
        total.update(json.dumps([int(frame.number), len(frame.categories), *frame.categories]).encode())
        for name, dtype in _LABEL_DTYPES.items():
            total.update(np.ascontiguousarray(getattr(frame, name), dtype).tobytes())
    return total.hexdigest()


def image_bytes(frame: Frame) -> bytes | None:
    """The encoded image, read from its file if necessary."""
    return frame.image if frame.image is None or isinstance(frame.image, bytes) else frame.image.read_bytes()


class ShardWriter:
    """Streams frames to a shard; the file is published on a clean exit and discarded on an error.

    Usage::

        with ShardWriter(path, header) as writer:
            for frame in frames:
                writer.add(frame)
            writer.summary = {...}
    """

    def __init__(self, path: Location, header: ShardHeader) -> None:
        self.header = header
        self.summary: dict[str, Any] | None = None
        self.frames: list[Frame] = []
        self._pending: list[Frame] = []
        self._images = hashlib.sha256()
        self._target = atomic_output(path)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ShardWriter:
        with self._stack:
            temporary = self._stack.enter_context(self._target)
            writer = pq.ParquetWriter(
                temporary,
                SCHEMA,
                compression={name: "none" if name == _IMAGE else "snappy" for name in SCHEMA.names},
                use_dictionary=[name for name in _SMALL_COLUMNS if pa.types.is_string(SCHEMA.field(name).type)],
                write_statistics=["frame_number", "position"],
                store_schema=True,
            )
            self._writer = self._stack.enter_context(writer)
            self._stack.push(self._finish)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, frame: Frame) -> None:
        """Append a frame (image as bytes, a file to read, or None)."""
        data = image_bytes(frame)
        self._images.update(hashlib.sha256(data or b"").digest())
        self._pending.append(replace(frame, image=data))
        self.frames.append(replace(frame, image=None))
        if len(self._pending) == self.header.rows_per_group:
            self._flush()

    def finished_header(self) -> ShardHeader:
        """The header with digests and counts of the frames added so far."""
        return replace(
            self.header,
            labels_sha256=labels_digest(self.frames),
            images_sha256=self._images.hexdigest(),
            frames=len(self.frames),
            summary=self.summary,
        )

    def _flush(self) -> None:
        if self._pending:
            first = len(self.frames) - len(self._pending)
            table = _table(self.header, self._pending, first)
            self._writer.write_table(table, row_group_size=len(self._pending))
            self._pending = []

    def _finish(self, kind: type[BaseException] | None, *_error: object) -> None:
        if kind is None:
            self._flush()
            text = json.dumps(asdict(self.finished_header()), sort_keys=True)
            self._writer.add_key_value_metadata({_METADATA_KEY: text.encode()})


def write_shard(
    sequence: Sequence, path: Location | str, *, source: str | None = None, video: str | None = None
) -> ShardHeader:
    """Write one video; equal input gives equal bytes.

    Args:
        sequence: a sequence or a segment of one, images as files, bytes or None.
        path: target of the Parquet file, local or S3.
        source: name of the source in the curriculum (default: the dataset's name).
        video: the segment's name (default: the sequence's).
    """
    with ShardWriter(to_location(path), header_of(sequence, source=source or sequence.dataset, video=video)) as writer:
        for frame in sequence.frames:
            writer.add(frame)
        return writer.finished_header()


def _table(header: ShardHeader, frames: SequenceOf[Frame], first_position: int) -> pa.Table:
    count = len(frames)
    columns: dict[str, Any] = {
        name: [getattr(header, name)] * count
        for name in ("source", "dataset", "split", "sequence", "video", "width", "height", "fps")
    }
    columns["frame_number"] = [int(frame.number) for frame in frames]
    columns["position"] = list(range(first_position, first_position + count))
    columns[_IMAGE] = [frame.image for frame in frames]
    columns["categories"] = [list(frame.categories) for frame in frames]
    for name, dtype in _LABEL_DTYPES.items():
        columns[name] = [np.asarray(getattr(frame, name), dtype).reshape(-1) for frame in frames]
    return pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


class Shard:
    """An open shard; frames are read by position."""

    def __init__(self, path: Location | str) -> None:
        self.path = to_location(path)
        self._file = open_parquet(self.path)
        self.header = _header(self._file, self.path)

    def __len__(self) -> int:
        return self.header.frames

    def read_frames(self, positions: Iterable[int]) -> list[Frame]:
        """Frames with image bytes at 0-based ``positions``, in that order; raises MotipError outside the video."""
        return self._frames(list(positions), _FRAME_COLUMNS)

    def __iter__(self) -> Iterator[Frame]:
        """All frames with image bytes, in order, one row group in memory."""
        rows = self.header.rows_per_group
        for begin in range(0, len(self), rows):
            yield from self.read_frames(range(begin, min(begin + rows, len(self))))

    def read_labels(self) -> Sequence:
        """The video's labels without its images (no image byte is read); ``name`` is the video's name."""
        header = self.header
        return Sequence(
            name=header.video,
            dataset=header.dataset,
            split=header.split,
            fps=header.fps,
            width=header.width,
            height=header.height,
            frames=tuple(self._frames(range(len(self)), _LABEL_COLUMNS)),
            track_names=header.track_names,
        )

    def _frames(self, positions: SequenceOf[int], columns: SequenceOf[str]) -> list[Frame]:
        outside = [position for position in positions if not 0 <= position < len(self)]
        if outside:
            raise MotipError(
                f"frame positions outside the video: {outside[:5]}",
                where=self.path,
                expected=f"0..{len(self) - 1}",
                fix="the manifest and the shard disagree: run the conversion again",
            )
        rows_per_group = self.header.rows_per_group
        groups = sorted({position // rows_per_group for position in positions})
        if not groups:
            return []
        table = self._file.read_row_groups(groups, columns=list(columns), use_threads=False)
        # Groups are read in ascending order and all but the last are full, so a position's row follows from its group.
        row_of_group = {group: index * rows_per_group for index, group in enumerate(groups)}
        rows = [row_of_group[position // rows_per_group] + position % rows_per_group for position in positions]
        chosen, index_of = np.unique(rows, return_inverse=True)
        frames = _decode(table.take(chosen).combine_chunks())
        return [frames[index] for index in index_of]


def _decode(table: pa.Table) -> list[Frame]:
    """The frames of a table of LABEL_COLUMNS and perhaps IMAGE, at least one, with one chunk per column."""

    def arrays(name: str) -> list[np.ndarray]:
        lists = table.column(name).chunk(0)
        values = np.array(lists.values)
        return [values[begin:end] for begin, end in itertools.pairwise(lists.offsets.tolist())]

    images = table.column(_IMAGE).to_pylist() if _IMAGE in table.column_names else [None] * len(table)
    columns = [table.column("frame_number").to_pylist(), images, table.column("categories").to_pylist()]
    return [
        Frame(number, image, boxes.reshape(-1, 4), track_ids, tuple(categories), *flags)
        for number, image, categories, boxes, track_ids, *flags in zip(
            *columns, *map(arrays, _LABEL_DTYPES), strict=True
        )
    ]


def _header(file: pq.ParquetFile, path: Location) -> ShardHeader:
    raw = (file.metadata.metadata or {}).get(_METADATA_KEY)
    if raw is None:
        raise MotipError(
            "a Parquet file, but not a shard of this project",
            where=path,
            expected="file metadata 'motip'",
            fix="set --storage to the folder that the conversion wrote",
        )
    values = json.loads(raw)
    if values.get("version") != SHARD_VERSION:
        raise MotipError(
            "the shard has another format version",
            where=path,
            found=values.get("version"),
            expected=SHARD_VERSION,
            fix="run the conversion again: it replaces shards of other versions",
        )
    known = {field.name for field in fields(ShardHeader)}
    values = {name: value for name, value in values.items() if name in known}
    return ShardHeader(**{**values, "track_names": tuple(values["track_names"])})


@functools.lru_cache(maxsize=64)
def open_shard(path: Location | str) -> Shard:
    """A cached open shard, so that a loader parses the footer of a video once per process."""
    return Shard(path)


def read_header(path: Location | str) -> ShardHeader:
    """The header of a shard (reads only the footer)."""
    return Shard(path).header


def read_frames(path: Location | str, positions: Iterable[int]) -> list[Frame]:
    """Frames with image bytes at 0-based ``positions``, reading only their row groups."""
    return Shard(path).read_frames(positions)


def read_labels(path: Location | str) -> Sequence:
    """All labels of a video, without reading image bytes."""
    return Shard(path).read_labels()


def shard_path(storage: Location | str, shard: str) -> Location:
    """Path under ``storage`` of a manifest's relative ``shard``."""
    root = to_location(storage)
    return root / "shards" / shard if isinstance(root, Path) else root / f"shards/{shard}"
