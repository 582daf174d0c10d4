"""Verification of a chain's files against the recorded digests: weights by sha256, data by shards."""

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
from motip.lineage.steps import CheckpointLocation, DataUsed, LineageStep
from motip.storage.paths import Location, location, sha256
from motip.storage.retries import is_transient

SAME, CHANGED, MISSING = "same", "changed", "missing"


@dataclass(frozen=True, slots=True)
class FileCheck:
    """Result of comparing a file, or all shards of a dataset, with the recorded digest.

    Attributes:
        stage: step that wrote the weights or read the data.
        path: path of the file; for an intact dataset its name and number of videos, else the shard or the manifest.
        state: same, changed or missing.
        what: weights or data.
    """

    stage: str
    path: str
    expected: str
    found: str
    state: str
    what: str = "weights"


def verify_chain(
    steps: SequenceOf[LineageStep], storage: Path, shards: Location | str, *, data: bool = True
) -> list[FileCheck]:
    """Recompute the digest of every weights file and every dataset of a chain.

    Files known only from a lineage record have no path and are not checked.

    Args:
        storage: folder for recorded relative paths, tried after the recorded absolute ones.
        shards: folder or URI that contains ``shards/``.
        data: also read the shards.
    """
    checks = [check for step in steps for check in _weights(step, storage)]
    if data:
        reader = _Shards([location(shards), *_earlier_storages(steps)])
        for step in steps:
            if not step.record:
                checks += [check for used in step.data for check in reader.check(step.stage, used)]
    return checks


def _weights(step: LineageStep, storage: Path) -> list[FileCheck]:
    recorded = step.checkpoint
    if recorded is None or not recorded.sha256 or (step.record and "/" not in recorded.path):
        return []
    path, found = _digest_of(recorded, storage)
    return [FileCheck(step.stage, path, recorded.sha256, found, _state(recorded.sha256, found))]


def _digest_of(recorded: CheckpointLocation, storage: Path) -> tuple[str, str]:
    """Current path of a file and its sha256; recorded path and "" if it is missing."""
    candidates: list[Location] = [location(recorded.path)]
    if recorded.relative:
        candidates.append(storage / recorded.relative)
    for path in candidates:
        if path.is_file():
            return str(path), sha256(path)
    return recorded.path, ""


def _state(expected: str, found: str) -> str:
    return MISSING if not found else SAME if found == expected else CHANGED


def _earlier_storages(steps: SequenceOf[LineageStep]) -> list[Location]:
    """Storage paths at the time the stages ran, from the two recorded paths of their checkpoints."""
    recorded = [step.checkpoint for step in steps if step.checkpoint is not None and step.checkpoint.relative]
    roots = [each.path.removesuffix(each.relative).rstrip("/") for each in recorded]
    return [location(root) for root in dict.fromkeys(roots)]


@dataclass(frozen=True, slots=True)
class _Video:
    """State of a video: its current manifest entry (None if unreadable), and its shard compared with the record."""

    entry: VideoEntry | None
    path: Location
    state: str
    expected: str = ""
    found: str = ""


class _Shards:
    """Checks each shard once, even if several stages read it."""

    def __init__(self, storages: SequenceOf[Location]) -> None:
        self._storage = next((each for each in storages if manifest_path(each).is_file()), storages[0])
        self._videos: dict[tuple[str, str, str], _Video] = {}
        exists = manifest_path(self._storage).is_file()
        videos = Manifest.load(self._storage).videos if exists else ()
        self._entries: dict[tuple[str, str, str], VideoEntry] = {entry.identity: entry for entry in videos}

    def check(self, stage: str, used: DataUsed) -> Iterator[FileCheck]:
        """One check for an intact dataset, else one per defect."""
        source, _, split = used.name.partition("/")
        names = list(used.source.get("videos", ()))
        if not names:
            return  # recorded without its videos, as by callers without shards
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
        """A video no longer in the manifest, since a later curriculum uses fewer; checked by its shard alone."""
        shard = "{}/{}/{}.parquet".format(*identity)
        path = shard_path(self._storage, shard)
        if not path.is_file():
            return _Video(None, path, MISSING)
        try:
            opened = Shard(path)
            header, digests = opened.header, _digests(opened)
        except (MotipError, OSError, ValueError, pa.ArrowException) as error:
            if is_transient(error):
                raise
            return _Video(None, path, CHANGED, found=sha256(path))
        if digests != (header.labels_sha256, header.images_sha256):
            return _Video(None, path, CHANGED, found=sha256(path))
        return _Video(make_entry(header, shard=shard, shard_sha256="", shard_bytes=0), path, SAME)


def _digests(shard: Shard) -> tuple[str, str]:
    """Digests of a shard's labels and images, computed from its rows: the file's own sha256 is recorded nowhere."""
    images = hashlib.sha256()

    def frames() -> Iterator[Frame]:
        rows = shard.header.rows_per_group
        for begin in range(0, len(shard), rows):
            for frame in shard.read_frames(range(begin, min(begin + rows, len(shard)))):
                images.update(hashlib.sha256(image_bytes(frame) or b"").digest())
                yield frame

    labels = labels_digest(frames())
    return labels, images.hexdigest()
