"""``shards/manifest.json``: which videos exist, what is in them, and which sequences are locked for val and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from motip.data.selection import pick, rank
from motip.data.sequence import UNTRACKED, Frame
from motip.data.shards import ShardHeader, shard_path
from motip.errors import MotipError
from motip.storage.atomic import digest
from motip.storage.paths import Location, read_json, write_json

MANIFEST_VERSION = 1
WINDOW_FRAMES = 30
"""Distinct ids are counted over windows of this many consecutive frames (the longest published clip)."""

_CONTENT = (
    *("source", "dataset", "split", "sequence", "video", "segment", "first_frame", "last_frame", "frames"),
    *("fps", "width", "height", "labels_sha256", "images_sha256"),
)


@dataclass(frozen=True)
class VideoEntry:
    """One video (a segment of a source sequence, or a whole one) and its shard.

    ``boxes`` and ``tracks`` count by raw category; ``ignored`` counts the boxes among them that the format itself
    marks as neither object nor background; ``objects`` counts the boxes that are tracked and not ignored.
    ``shard`` is relative to ``<storage>/shards``. ``bad_images`` names the frames left out because of their image, and
    ``image_hashes`` holds perceptual and byte hashes of a few frames, for the check that val is not in train.
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
        """What the video holds, without where and how it is stored: the part that digests are made of."""
        return {name: getattr(self, name) for name in _CONTENT}


def entries_digest(entries: Iterable[VideoEntry]) -> str:
    """Hex sha256 of the content of some videos, whatever their order: what a stage's inputs are named by."""
    return digest(sorted((entry.content() for entry in entries), key=lambda content: digest(content)))


@dataclass(frozen=True)
class Manifest:
    """All videos of a shard set.

    Attributes:
        videos: sorted by source, split and video.
        locked: source -> split -> names of the source sequences locked for evaluation.
        sequences: per source sequence that was read: what became of its label rows.
        settings: what the shards were made with (seed, rows per group, frame limits).
    """

    videos: tuple[VideoEntry, ...]
    locked: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    sequences: tuple[dict[str, Any], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Decides the order in which videos are picked."""
        return int(self.settings.get("seed", 0))

    def digest(self) -> str:
        """Hex sha256 of all videos and locks; independent of the order of listing and of the place of storage."""
        locked = {s: {split: sorted(names) for split, names in splits.items()} for s, splits in self.locked.items()}
        return digest({"videos": entries_digest(self.videos), "locked": locked})

    def of(self, source: str, split: str) -> list[VideoEntry]:
        """Videos of one split of a source, by name."""
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
        """The videos a stage gets: the same for the same arguments, and the first 56 of 150 are the 56.

        Args:
            videos: how many; None with ``frame_budget`` None means all.
            frame_budget: as many videos as fit this many frames, at least one.
            seed: order of picking (default: the seed of the conversion).

        Raises:
            MotipError: no such source or split, or fewer videos than asked for.
        """
        seed = self.seed if seed is None else seed
        entries = sorted(self.of(source, split), key=lambda entry: rank(entry.sequence, entry.segment, seed))
        if not entries:
            raise MotipError(
                f"the manifest has no {split} videos of source {source!r}",
                where="shards/manifest.json",
                found=", ".join(sorted({f"{entry.source}/{entry.split}" for entry in self.videos})) or "no videos",
                fix="run the conversion with the curriculum that uses this source",
            )
        if videos is not None and videos > len(entries) and not allow_fewer:
            raise MotipError(
                f"fewer videos than asked for: the manifest has {len(entries)} {split} videos of source {source!r}",
                where="shards/manifest.json",
                expected=f"{videos} videos",
                fix="run the conversion again with this curriculum, ask for fewer, or set `allow_fewer: true` in the "
                "stage's data",
            )
        return pick(entries, [entry.frames for entry in entries], videos=videos, frame_budget=frame_budget)

    def boxes(self, source: str) -> Counter[str]:
        """Boxes by raw category over all videos of a source, the format's own ignore regions not counted."""
        total: Counter[str] = Counter()
        for entry in self.videos:
            if entry.source == source:
                total.update({name: count - entry.ignored.get(name, 0) for name, count in entry.boxes.items()})
        return +total

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": MANIFEST_VERSION,
            "digest": self.digest(),
            "settings": self.settings,
            "locked": self.locked,
            "videos": [asdict(entry) for entry in sorted(self.videos, key=lambda entry: entry.identity)],
            "sequences": list(self.sequences),
        }

    @staticmethod
    def from_dict(values: dict[str, Any], where: object = "manifest.json") -> Manifest:
        """Raises MotipError for another version, missing fields, or content that does not match its digest."""
        if not isinstance(values, dict) or values.get("version") != MANIFEST_VERSION:
            found = values.get("version") if isinstance(values, dict) else type(values).__name__
            raise MotipError(
                "not a manifest of this version", where=where, found=found, expected=MANIFEST_VERSION,
                fix="delete it and run the conversion again (shards that still fit are kept)",
            )  # fmt: skip
        names = {item.name for item in fields(VideoEntry)}
        try:
            entries = tuple(_entry({key: entry[key] for key in names}) for entry in values["videos"])
            manifest = Manifest(entries, values["locked"], tuple(values["sequences"]), values["settings"])
        except (KeyError, TypeError) as error:
            raise MotipError(
                f"the manifest is damaged: {error}", where=where, fix="delete it and run the conversion again"
            ) from error
        if manifest.digest() != values.get("digest"):
            raise MotipError(
                "the manifest does not match its own digest",
                where=where,
                found=manifest.digest(),
                expected=values.get("digest"),
                fix="it was edited or damaged: delete it and run the conversion again (finished shards are kept)",
            )
        return manifest

    def save(self, storage: Location | str) -> Location:
        path = manifest_path(storage)
        write_json(path, self.to_dict())
        return path

    @staticmethod
    def load(storage: Location | str) -> Manifest:
        """Raises MotipError when there is none, or it is damaged."""
        path = manifest_path(storage)
        return Manifest.from_dict(read_json(path), path)


def _entry(values: dict[str, Any]) -> VideoEntry:
    lists = {name: tuple(values[name]) for name in ("bad_images", "image_hashes")}
    return VideoEntry(**{**values, **lists})


def manifest_path(storage: Location | str) -> Location:
    return shard_path(storage, "manifest.json")


def entry_path(storage: Location | str, entry: VideoEntry) -> Location:
    """Where the shard of a video lies."""
    return shard_path(storage, entry.shard)


def summarise(frames: SequenceOf[Frame]) -> dict[str, Any]:
    """Counts of a video: boxes, ignored boxes and tracks by raw category, objects and ids at most, empty frames."""
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
    return {
        "boxes": dict(sorted(boxes.items())),
        "ignored": dict(sorted(ignored.items())),
        "tracks": {name: len(ids) for name, ids in sorted(ids_by_category.items())},
        "track_count": len(set().union(*ids_by_frame)),
        "objects": sum(objects),
        "max_objects": max(objects, default=0),
        "max_window_ids": _most_ids(ids_by_frame, WINDOW_FRAMES),
        "empty_frames": sum(count == 0 for count in objects),
        "first_frame": int(frames[0].number) if frames else 0,
        "last_frame": int(frames[-1].number) if frames else 0,
    }


def _most_ids(ids_by_frame: SequenceOf[set[int]], window: int) -> int:
    seen: Counter[int] = Counter()
    most = 0
    for index, ids in enumerate(ids_by_frame):
        seen.update(ids)
        if index >= window:
            for gone in ids_by_frame[index - window]:
                seen[gone] -= 1
                if not seen[gone]:
                    del seen[gone]
        most = max(most, len(seen))
    return most


def make_entry(header: ShardHeader, *, shard: str, shard_sha256: str, shard_bytes: int) -> VideoEntry:
    """The manifest's line for a finished shard, from its own header."""
    if header.summary is None:
        raise MotipError(
            "the shard carries no summary of its labels", where=shard, fix="delete it and run the conversion again"
        )
    summary = dict(header.summary)
    return VideoEntry(
        source=header.source,
        dataset=header.dataset,
        split=header.split,
        sequence=header.sequence,
        video=header.video,
        frames=header.frames,
        fps=header.fps,
        width=header.width,
        height=header.height,
        labels_sha256=header.labels_sha256,
        images_sha256=header.images_sha256,
        shard=shard,
        shard_sha256=shard_sha256,
        shard_bytes=shard_bytes,
        rows_per_group=header.rows_per_group,
        inputs=header.inputs,
        bad_images=tuple(summary.pop("bad_images", ())),
        image_hashes=tuple(summary.pop("image_hashes", ())),
        **summary,
    )
