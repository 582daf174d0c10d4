"""Whether the files of a chain are still what its runs recorded: weights by their sha256, data by their shards."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

from motip.data.manifest import Manifest, VideoEntry, entries_digest, manifest_path
from motip.data.shards import shard_path
from motip.data.storage import Location, location, sha256
from motip.lineage.steps import CheckpointPlace, DataUsed, LineageStep

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


class _Shards:
    """Looks at each shard once, however many stages read it."""

    def __init__(self, storages: SequenceOf[Location]) -> None:
        self._storage = next((place for place in storages if manifest_path(place).is_file()), storages[0])
        self._found: dict[str, str] = {}
        there = manifest_path(self._storage).is_file()
        videos = Manifest.load(self._storage).videos if there else ()
        self._entries: dict[tuple[str, str, str], VideoEntry] = {entry.identity: entry for entry in videos}

    def check(self, stage: str, used: DataUsed) -> Iterator[FileCheck]:
        """One check for a data set that is whole, else one for everything that is wrong with it."""
        source, _, split = used.name.partition("/")
        videos = list(used.source.get("videos", ()))
        if not videos:
            return  # recorded without its videos: by whoever uses the lineage without shards
        manifest = str(manifest_path(self._storage))
        entries = [self._entries.get((source, split, video)) for video in videos]
        known = [entry for entry in entries if entry is not None]
        digest = entries_digest(known) if known else ""
        wrong = [] if digest == used.sha256 else [FileCheck(stage, manifest, used.sha256, digest, _state("-", digest))]
        for entry in known:
            path = shard_path(self._storage, entry.shard)
            found = self._sha256(path)
            if found != entry.shard_sha256:
                wrong.append(FileCheck(stage, str(path), entry.shard_sha256, found, _state(entry.shard_sha256, found)))
        for check in wrong or [FileCheck(stage, f"{used.name} ({len(videos)} videos)", used.sha256, digest, SAME)]:
            yield FileCheck(check.stage, check.path, check.expected, check.found, check.state, "data")

    def _sha256(self, path: Location) -> str:
        key = str(path)
        if key not in self._found:
            self._found[key] = sha256(path) if path.is_file() else ""
        return self._found[key]
