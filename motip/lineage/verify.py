"""Whether the files of a chain are still what its runs recorded: weights by their sha256, data by their shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from motip.data.manifest import Manifest, VideoEntry, entries_digest, make_entry, manifest_path
from motip.data.sequence import Frame
from motip.data.shards import Shard, image_bytes, labels_digest, shard_path
from motip.errors import MotipError
from motip.lineage.steps import CheckpointPlace, DataUsed, LineageStep
from motip.storage.paths import Location, location, sha256
from motip.storage.retries import passing

SAME, CHANGED, MISSING = "same", "changed", "missing"


@dataclass(frozen=True, slots=True)
class FileCheck:
    """A file, or all shards of a data set, against the recorded digest.

    Attributes:
        stage: step that wrote the weights or read the data.
        path: of the file; for a data set its name and number of videos, for a broken one the shard or the manifest.
        state: same, changed or missing.
        what: weights or data.
    """

    stage: str
    path: str
    expected: str
    found: str
    state: str
    what: str = "weights"


def verify(
    steps: SequenceOf[LineageStep], storage: Path, shards: Location | str, *, data: bool = True
) -> list[FileCheck]:
    """Every weights file of the chain, and every data set of its stages, with its digest computed anew.

    Files that only a record tells of are known by name, not by place, and are left out.

    Args:
        storage: folder that recorded relative paths are looked for in, after the recorded absolute ones.
        shards: folder or URI that holds ``shards/``.
        data: read the shards too.
    """
    checks = [check for step in steps for check in _weights(step, storage)]
    if data:
        reader = _Shards([location(shards), *_earlier_storages(steps)])
        for step in steps:
            if not step.record:
                checks += [check for used in step.data for check in reader.check(step.stage, used)]
    return checks


def _weights(step: LineageStep, storage: Path) -> list[FileCheck]:
    place = step.checkpoint
    if place is None or not place.sha256 or (step.record and "/" not in place.path):
        return []
    path, found = _digest_of(place, storage)
    return [FileCheck(step.stage, path, place.sha256, found, _state(place.sha256, found))]


def _digest_of(place: CheckpointPlace, storage: Path) -> tuple[str, str]:
    """Where the file is now and its sha256; an empty digest if it is nowhere."""
    candidates: list[Location] = [location(place.path)]
    if place.relative:
        candidates.append(storage / place.relative)
    for path in candidates:
        if path.is_file():
            return str(path), sha256(path)
    return place.path, ""


def _state(expected: str, found: str) -> str:
    return MISSING if not found else SAME if found == expected else CHANGED


def _earlier_storages(steps: SequenceOf[LineageStep]) -> list[Location]:
    """Where the storage was when the stages ran: their checkpoints are recorded with both paths."""
    places = [step.checkpoint for step in steps if step.checkpoint is not None and step.checkpoint.relative]
    roots = [place.path.removesuffix(place.relative).rstrip("/") for place in places]
    return [location(root) for root in dict.fromkeys(roots)]


@dataclass(frozen=True, slots=True)
class _Video:
    """What became of a video: its content now (None where it cannot be read) and its shard against what is known."""

    entry: VideoEntry | None
    path: Location
    state: str
    expected: str = ""
    found: str = ""


class _Shards:
    """Looks at each shard once, however many stages read it."""

    def __init__(self, storages: SequenceOf[Location]) -> None:
        self._storage = next((place for place in storages if manifest_path(place).is_file()), storages[0])
        self._videos: dict[tuple[str, str, str], _Video] = {}
        there = manifest_path(self._storage).is_file()
        videos = Manifest.load(self._storage).videos if there else ()
        self._entries: dict[tuple[str, str, str], VideoEntry] = {entry.identity: entry for entry in videos}

    def check(self, stage: str, used: DataUsed) -> Iterator[FileCheck]:
        """One check for a data set that is whole, else one for everything that is wrong with it."""
        source, _, split = used.name.partition("/")
        names = list(used.source.get("videos", ()))
        if not names:
            return  # recorded without its videos: by whoever uses the lineage without shards
        videos = [self._video(source, split, name) for name in names]
        known = [video.entry for video in videos if video.entry is not None]
        digest = entries_digest(known) if known else ""
        manifest = str(manifest_path(self._storage))
        if not known and all(video.state == MISSING for video in videos):
            yield FileCheck(stage, manifest, used.sha256, digest, _state("-", digest), "data")
            return
        wrong = [video for video in videos if video.state != SAME]
        if len(known) == len(videos) and digest != used.sha256:
            yield FileCheck(stage, manifest, used.sha256, digest, CHANGED, "data")
        elif not wrong:
            yield FileCheck(stage, f"{used.name} ({len(names)} videos)", used.sha256, digest, SAME, "data")
        for video in wrong:
            yield FileCheck(stage, str(video.path), video.expected or used.sha256, video.found, video.state, "data")

    def _video(self, source: str, split: str, name: str) -> _Video:
        identity = source, split, name
        if identity not in self._videos:
            entry = self._entries.get(identity)
            self._videos[identity] = self._listed(entry) if entry is not None else self._unlisted(identity)
        return self._videos[identity]

    def _listed(self, entry: VideoEntry) -> _Video:
        path = shard_path(self._storage, entry.shard)
        found = sha256(path) if path.is_file() else ""
        return _Video(entry, path, _state(entry.shard_sha256, found), entry.shard_sha256, found)

    def _unlisted(self, identity: tuple[str, str, str]) -> _Video:
        """A video that the manifest has no more, since a later curriculum asked for fewer: its shard speaks for it."""
        shard = "{}/{}/{}.parquet".format(*identity)
        path = shard_path(self._storage, shard)
        if not path.is_file():
            return _Video(None, path, MISSING)
        try:
            opened = Shard(path)
            header, held = opened.header, _digests(opened)
        except (MotipError, OSError, ValueError, pa.ArrowException) as error:
            if passing(error):
                raise
            return _Video(None, path, CHANGED, found=sha256(path))
        if held != (header.labels_sha256, header.images_sha256):
            return _Video(None, path, CHANGED, found=sha256(path))
        return _Video(make_entry(header, shard=shard, shard_sha256="", shard_bytes=0), path, SAME)


def _digests(shard: Shard) -> tuple[str, str]:
    """Of the labels and the images that a shard holds, from its rows: no record has the sha256 of the file itself."""
    images = hashlib.sha256()

    def frames() -> Iterator[Frame]:
        rows = shard.header.rows_per_group
        for begin in range(0, len(shard), rows):
            for frame in shard.read_frames(range(begin, min(begin + rows, len(shard)))):
                images.update(hashlib.sha256(image_bytes(frame) or b"").digest())
                yield frame

    labels = labels_digest(frames())
    return labels, images.hexdigest()
