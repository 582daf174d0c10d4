"""Manifest of a shard set, ``shards/manifest.json``: videos with counts and digests, locked val and test sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from motip.data.selection import selection_key, take_first
from motip.data.sequence import UNTRACKED, Frame, ReadReport
from motip.data.shards import ShardHeader, shard_path
from motip.errors import MotipError
from motip.storage.atomic import digest
from motip.storage.paths import Location, read_json, write_json

_MANIFEST_VERSION = 1
WINDOW_FRAMES = 30
"""Window, in consecutive frames, over which distinct track ids are counted (the longest published clip)."""

_CONTENT = (
    *("source", "dataset", "split", "sequence", "video", "segment", "first_frame", "last_frame", "frames"),
    *("fps", "width", "height", "labels_sha256", "images_sha256"),
)


@dataclass(frozen=True)
class VideoEntry:
    """One video (a source sequence or a segment of one) and its shard.

    Attributes:
        shard: path relative to ``<storage>/shards``.
        boxes, tracks: counts by raw category.
        ignored: boxes by raw category that the format itself marks as neither object nor background.
        objects: boxes that are tracked and not ignored.
        max_objects: maximum of ``objects`` in one frame.
        max_window_ids: maximum number of distinct track ids within ``WINDOW_FRAMES`` frames.
        bad_images: dropped frames with the defect of their image.
        image_hashes: perceptual and byte hashes of a few frames, to detect overlap of train and val.
        inputs: digest of everything the shard was written from.
    """

    source: str
    dataset: str
    split: str
    sequence: str
    video: str
    segment: int
    first_frame: int
    last_frame: int
    frames: int
    fps: float
    width: int
    height: int
    labels_sha256: str
    images_sha256: str
    shard: str
    shard_sha256: str
    shard_bytes: int
    rows_per_group: int
    boxes: dict[str, int]
    ignored: dict[str, int]
    tracks: dict[str, int]
    track_count: int
    objects: int
    max_objects: int
    max_window_ids: int
    empty_frames: int
    bad_images: tuple[str, ...] = ()
    image_hashes: tuple[str, ...] = ()
    inputs: str = ""

    @property
    def identity(self) -> tuple[str, str, str]:
        return self.source, self.split, self.video

    def content(self) -> dict[str, Any]:
        """Content of the video without storage details: the fields that digests cover."""
        return {name: getattr(self, name) for name in _CONTENT}


def entries_digest(entries: Iterable[VideoEntry]) -> str:
    """Hex sha256 of the content of some videos, independent of their order; part of a stage's digest of inputs."""
    return digest(sorted((entry.content() for entry in entries), key=lambda content: digest(content)))


@dataclass(frozen=True)
class SequenceEntry:
    """One converted source sequence: its videos and the counts of its label rows."""

    source: str
    split: str
    sequence: str
    videos: tuple[str, ...]
    rows: ReadReport

    @property
    def identity(self) -> tuple[str, str, str]:
        return self.source, self.split, self.sequence


@dataclass(frozen=True)
class Manifest:
    """All videos of a shard set.

    Attributes:
        videos: sorted by source, split and video.
        locked: source -> split -> names of the source sequences locked for evaluation.
        sequences: sorted by source, split and name.
        settings: conversion settings (seed, rows per group, frame limits).
    """

    videos: tuple[VideoEntry, ...]
    locked: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    sequences: tuple[SequenceEntry, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Seed of the order in which videos are selected."""
        return int(self.settings.get("seed", 0))

    def digest(self) -> str:
        """Hex sha256 of all videos and locks; independent of listing order and storage location."""
        locked = {s: {split: sorted(names) for split, names in splits.items()} for s, splits in self.locked.items()}
        return digest({"videos": entries_digest(self.videos), "locked": locked})

    def of(self, source: str, split: str) -> list[VideoEntry]:
        """Videos of one split of a source, sorted by name."""
        return [entry for entry in self.videos if entry.source == source and entry.split == split]

    def sources(self) -> list[str]:
        return sorted({entry.source for entry in self.videos} | set(self.locked))

    def select(
        self,
        source: str,
        split: str = "train",
        *,
        videos: int | None = None,
        frame_budget: int | None = None,
        seed: int | None = None,
        allow_fewer: bool = False,
    ) -> list[VideoEntry]:
        """Videos of a stage: deterministic, and a smaller request is a prefix of a larger one.

        Args:
            videos: number of videos; all if ``frame_budget`` is None too.
            frame_budget: as many videos as fit this many frames, at least one.
            seed: seed of the selection order (default: the seed of the conversion).
            allow_fewer: return what is available instead of raising.

        Raises:
            MotipError: no such source or split, or fewer videos than requested.
        """
        seed = self.seed if seed is None else seed
        entries = sorted(self.of(source, split), key=lambda entry: selection_key(entry.sequence, entry.segment, seed))
        if not entries:
            raise MotipError(
                f"the manifest has no {split} videos of source {source!r}",
                where="shards/manifest.json",
                found=", ".join(sorted({f"{entry.source}/{entry.split}" for entry in self.videos})) or "no videos",
                fix="run the conversion with the curriculum that uses this source",
            )
        if videos is not None and videos > len(entries) and not allow_fewer:
            raise MotipError(
                f"fewer videos than requested: the manifest has {len(entries)} {split} videos of source {source!r}",
                where="shards/manifest.json",
                expected=f"{videos} videos",
                fix="run the conversion again with this curriculum, request fewer, or set `allow_fewer: true` in the "
                "stage's data",
            )
        return take_first(entries, [entry.frames for entry in entries], videos=videos, frame_budget=frame_budget)

    def to_dict(self) -> dict[str, Any]:
        ordered = replace(self, videos=tuple(sorted(self.videos, key=lambda entry: entry.identity)))
        return {"version": _MANIFEST_VERSION, "digest": self.digest(), **_MANIFEST.dump_python(ordered)}

    @staticmethod
    def from_dict(values: Any, where: object = "manifest.json") -> Manifest:
        """Parse a manifest; raises MotipError for another version, missing fields or a wrong digest."""
        if not isinstance(values, dict) or values.get("version") != _MANIFEST_VERSION:
            raise MotipError(
                "not a manifest of this version",
                where=where,
                found=values.get("version") if isinstance(values, dict) else type(values).__name__,
                expected=_MANIFEST_VERSION,
                fix="delete it and run the conversion again (up-to-date shards are kept)",
            )
        try:
            manifest = _MANIFEST.validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise MotipError(
                f"the manifest is corrupt: {'.'.join(map(str, first['loc']))}: {first['msg']}",
                where=where,
                fix="delete it and run the conversion again",
            ) from error
        if manifest.digest() != values.get("digest"):
            raise MotipError(
                "the manifest does not match its own digest",
                where=where,
                found=manifest.digest(),
                expected=values.get("digest"),
                fix="it was edited or corrupted: delete it and run the conversion again (finished shards are kept)",
            )
        return manifest

    def save(self, storage: Location | str) -> Location:
        """Write the manifest atomically; returns its path."""
        path = manifest_path(storage)
        write_json(path, self.to_dict())
        return path

    @staticmethod
    def load(storage: Location | str) -> Manifest:
        """Read the manifest of a storage; raises MotipError if it is absent or corrupt."""
        path = manifest_path(storage)
        return Manifest.from_dict(read_json(path), path)


_MANIFEST, _ENTRY = TypeAdapter(Manifest), TypeAdapter(VideoEntry)


def manifest_path(storage: Location | str) -> Location:
    """Path of a storage's manifest."""
    return shard_path(storage, "manifest.json")


def entry_path(storage: Location | str, entry: VideoEntry) -> Location:
    """Path of a video's shard."""
    return shard_path(storage, entry.shard)


def summarise_labels(frames: SequenceOf[Frame]) -> dict[str, Any]:
    """Label counts of a video: the statistics fields of :class:`VideoEntry`, by their names."""
    boxes: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    ids_by_category: dict[str, set[int]] = {}
    ids_by_frame: list[set[int]] = []
    objects: list[int] = []
    for frame in frames:
        tracked = (frame.track_ids != UNTRACKED) & ~frame.ignore
        boxes.update(frame.categories)
        for category, is_ignored, track_id in zip(frame.categories, frame.ignore, frame.track_ids, strict=True):
            if is_ignored:
                ignored[category] += 1
            elif track_id != UNTRACKED:
                ids_by_category.setdefault(category, set()).add(int(track_id))
        ids_by_frame.append(set(frame.track_ids[tracked].tolist()))
        objects.append(int(tracked.sum()))
    windows = (ids_by_frame[begin : begin + WINDOW_FRAMES] for begin in range(len(ids_by_frame)))
    return {
        "boxes": dict(sorted(boxes.items())),
        "ignored": dict(sorted(ignored.items())),
        "tracks": {name: len(ids) for name, ids in sorted(ids_by_category.items())},
        "track_count": len(set().union(*ids_by_frame)),
        "objects": sum(objects),
        "max_objects": max(objects, default=0),
        "max_window_ids": max((len(set().union(*window)) for window in windows), default=0),
        "empty_frames": sum(count == 0 for count in objects),
        "first_frame": int(frames[0].number) if frames else 0,
        "last_frame": int(frames[-1].number) if frames else 0,
    }


def make_entry(header: ShardHeader, *, shard: str, shard_sha256: str, shard_bytes: int) -> VideoEntry:
    """The manifest entry of a finished shard, from the shard's header."""
    if header.summary is None:
        raise MotipError(
            "the shard header has no label summary", where=shard, fix="delete it and run the conversion again"
        )
    stored = {"shard": shard, "shard_sha256": shard_sha256, "shard_bytes": shard_bytes}
    return _ENTRY.validate_python({**asdict(header), **header.summary, **stored})
