"""Writer of the demo dataset: sequences and their seeds, raw folders, reuse of an earlier dataset."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from motip.data.formats.dancetrack_writer import seqmap_path, write_seqmap
from motip.demo.aerial import FPS as AERIAL_FPS
from motip.demo.aerial import AerialScene
from motip.demo.dance import FPS as DANCE_FPS
from motip.demo.dance import DanceScene
from motip.demo.ground import FPS as GROUND_FPS
from motip.demo.ground import GroundScene
from motip.demo.rendering import Label
from motip.demo.writers import Bdd100kWriter, DanceTrackWriter, SequenceWriter, VisDroneWriter
from motip.errors import MotipError
from motip.storage.atomic import digest, write_json_atomic

_DRAWING_VERSION = 2
"""Version of the rendering; increase it when the same seed gives other images, so that old folders are replaced."""
_MARKER = "world.json"
JPEG_QUALITY = 92
_SMALLEST_SIDE = 64


class Scene(Protocol):
    """A sequence that can be rendered frame by frame, in any order."""

    def render(self, frame: int) -> tuple[np.ndarray, list[Label], int]:
        """(H, W, 3) uint8 BGR, the labels, and the number of objects without a box because they are occluded."""
        ...


@dataclass(frozen=True, slots=True)
class _Domain:
    scene: Callable[[np.random.Generator, tuple[int, int], int, bool], Scene]
    writer: Callable[[Path, str, str, float, int], SequenceWriter]
    folder: str
    format: str
    fps: float


_DOMAINS: Mapping[str, _Domain] = {
    "dance": _Domain(DanceScene, DanceTrackWriter, "dancetrack", "motchallenge", DANCE_FPS),
    "ground": _Domain(GroundScene, Bdd100kWriter, "bdd100k", "bdd100k", GROUND_FPS),
    "aerial": _Domain(AerialScene, VisDroneWriter, "visdrone", "visdrone", AERIAL_FPS),
}
"""Scene class, writer, folder under the root, format and frame rate of each domain."""

DEMO_DATASET: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "dance": {"train": {"sequences": 20}, "val": {"sequences": 15}},
    "ground": {"train": {"sequences": 24}, "val": {"sequences": 15}},
    "aerial": {"train": {"sequences": 32, "crowd": 0.25}, "val": {"sequences": 16, "crowd": 0.25}},
}
"""Sequences of the demo: enough of them for validation that a confidence interval is meaningful."""


@dataclass(frozen=True, slots=True)
class SplitSettings:
    """Size of a split.

    Attributes:
        sequences: number of sequences, at least 1.
        frames: frames per sequence, at least 2.
        crowd: share of crowded sequences, 0..1, distributed evenly over the split.
    """

    sequences: int
    frames: int = 60
    crowd: float = 0.0

    def crowded(self, index: int) -> bool:
        """Whether sequence ``index`` is crowded."""
        return math.floor((index + 1) * self.crowd + 1e-9) > math.floor(index * self.crowd + 1e-9)


@dataclass(slots=True)
class SplitReport:
    """Counts of one split of one domain.

    ``gaps`` counts object-frames without a box because the object is occluded; ``names`` are the sequences.
    """

    sequences: int = 0
    frames: int = 0
    boxes: int = 0
    tracks: int = 0
    gaps: int = 0
    regions: int = 0
    crowded: int = 0
    names: list[str] = field(default_factory=list)


@dataclass(slots=True)
class DatasetReport:
    """Contents of ``root``; ``written`` is False if an earlier call with the same settings wrote them."""

    root: Path
    digest: str
    settings: dict[str, Any]
    splits: dict[str, dict[str, SplitReport]]
    written: bool = True
    seconds: float = 0.0

    @property
    def frames(self) -> int:
        return sum(split.frames for domain in self.splits.values() for split in domain.values())

    def source(self, domain: str) -> dict[str, Any]:
        """Root, format, fps and domain of a domain's data, for the source of a curriculum."""
        spec = _DOMAINS[domain]
        return {"root": str(self.root / spec.folder), "format": spec.format, "fps": spec.fps, "domain": domain}

    def to_dict(self) -> dict[str, Any]:
        return {
            "synthetic": True,
            "digest": self.digest,
            "settings": self.settings,
            "seconds": round(self.seconds, 2),
            "splits": {
                domain: {split: asdict(report) for split, report in splits.items()}
                for domain, splits in self.splits.items()
            },
        }


def write_demo_dataset(
    root: Path | str,
    *,
    seed: int = 0,
    domains: Mapping[str, Mapping[str, int | Mapping[str, float]]] = DEMO_DATASET,
    frames: int = 60,
    size: tuple[int, int] = (128, 224),
    progress: Callable[[str, int, int], None] | None = None,
) -> DatasetReport:
    """Write the dataset under ``root`` unless it exists there with the same settings and rendering version.

    A sequence depends only on (seed, domain, split, index, frames, size, crowd), so adding sequences does not change
    the others. The folder is replaced atomically.

    Args:
        root: folder of the dataset; ``dancetrack/``, ``bdd100k/`` and ``visdrone/`` are created below it.
        seed: seed of the dataset.
        domains: domain (dance, ground, aerial) to split name to a number of sequences or to
            ``{"sequences": n, "frames": n, "crowd": share}``.
        frames: default number of frames per sequence.
        size: (height, width) of the frames in pixels; objects scale with it.
        progress: called after every sequence with (its name, sequences done, number of sequences).

    Raises:
        MotipError: invalid settings, or a root with other contents.
    """
    target = Path(root).resolve()
    plan = _plan(domains, frames)
    settings = _settings(seed, plan, size)
    key = digest(settings)
    with _write_lock(target):
        found = _read_marker(target)
        if found is not None and found.digest == key and _is_complete(found):
            found.written = False
            return found
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            started = time.perf_counter()
            splits = _render(temporary, seed, plan, size, progress)
            report = DatasetReport(target, key, settings, splits, True, time.perf_counter() - started)
            write_json_atomic(temporary / _MARKER, report.to_dict())
            _replace(temporary, target)
        except OSError as error:
            raise MotipError(
                f"cannot write the synthetic dataset: {error.strerror or error}",
                where=target,
                expected="a writable folder with free space",
                fix="choose another data root, or free some space",
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return report


def _scene_rng(seed: int, domain: str, split: str, index: int) -> np.random.Generator:
    """Random generator of a sequence."""
    return np.random.default_rng(int(digest([seed, domain, split, index])[:16], 16))


def _render(
    root: Path,
    seed: int,
    plan: Mapping[str, Mapping[str, SplitSettings]],
    size: tuple[int, int],
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, dict[str, SplitReport]]:
    """Render and write all sequences; returns the counts by domain and split."""
    total = sum(settings.sequences for splits in plan.values() for settings in splits.values())
    done = 0
    reports: dict[str, dict[str, SplitReport]] = {}
    for domain, splits in plan.items():
        spec = _DOMAINS[domain]
        reports[domain] = {}
        for split, settings in splits.items():
            report = reports[domain][split] = SplitReport()
            for index in range(settings.sequences):
                crowded = settings.crowded(index)
                name = f"{domain}-{split}-{index:04d}" + ("-crowd" if crowded else "")
                scene = spec.scene(_scene_rng(seed, domain, split, index), size, settings.frames, crowded)
                writer = spec.writer(root / spec.folder, split, name, spec.fps, JPEG_QUALITY)
                _write_sequence(scene, writer, settings.frames, report)
                report.crowded += crowded
                done += 1
                if progress is not None:
                    progress(name, done, total)
            if spec.format == "motchallenge":
                write_seqmap(seqmap_path(root / spec.folder, split), report.names)
    return reports


def _write_sequence(scene: Scene, writer: SequenceWriter, frames: int, report: SplitReport) -> None:
    tracks: set[int] = set()
    for frame in range(frames):
        image, labels, hidden = scene.render(frame)
        writer.add(image, labels)
        objects = [label for label in labels if not label.region]
        tracks.update(label.track_id for label in objects)
        report.boxes += len(objects)
        report.regions += len(labels) - len(objects)
        report.gaps += hidden
    writer.close()
    report.sequences += 1
    report.frames += frames
    report.tracks += len(tracks)
    report.names.append(writer.name)


def _plan(
    domains: Mapping[str, Mapping[str, int | Mapping[str, float]]], frames: int
) -> dict[str, dict[str, SplitSettings]]:
    if not domains:
        raise _bad("a synthetic dataset needs at least one domain", "domains", "none", ", ".join(_DOMAINS))
    plan: dict[str, dict[str, SplitSettings]] = {}
    # Sorted, so that the order of the domains in a file does not change the digest.
    for domain in sorted(domains):
        if domain not in _DOMAINS:
            raise _bad("the synthetic dataset has no such domain", "domains", domain, f"one of {', '.join(_DOMAINS)}")
        splits = domains[domain]
        if not isinstance(splits, Mapping) or not splits:
            raise _bad("a synthetic domain needs splits", domain, splits, "{train: 20, val: 15}")
        plan[domain] = {}
        for split in sorted(splits):
            where = f"{domain}.{split}"
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(split)):
                raise _bad("a split name is used as a folder name", where, split, "letters, digits, - and _")
            plan[domain][split] = _split_settings(splits[split], frames, where)
    return plan


def _split_settings(value: int | Mapping[str, float], frames: int, where: str) -> SplitSettings:
    raw = dict(value) if isinstance(value, Mapping) else {"sequences": value}
    unknown = sorted(set(raw) - {"sequences", "frames", "crowd"})
    if unknown or "sequences" not in raw:
        raise _bad("invalid settings of a synthetic split", where, value, "sequences, frames, crowd")
    raw.setdefault("frames", frames)
    for key, least in (("sequences", 1), ("frames", 2)):
        if isinstance(raw[key], bool) or not isinstance(raw[key], int) or raw[key] < least:
            raise _bad(f"{key} of a synthetic split is out of range", where, raw[key], f"an integer >= {least}")
    crowd = raw.get("crowd", 0.0)
    if isinstance(crowd, bool) or not isinstance(crowd, (int, float)) or not 0 <= crowd <= 1:
        raise _bad("crowd of a synthetic split is out of range", where, crowd, "a share between 0 and 1")
    return SplitSettings(int(raw["sequences"]), int(raw["frames"]), float(crowd))


def _settings(seed: int, plan: Mapping[str, Mapping[str, SplitSettings]], size: tuple[int, int]) -> dict[str, Any]:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise _bad("the seed of the synthetic dataset is out of range", "seed", seed, "an integer >= 0")
    if len(size) != 2 or any(not isinstance(side, int) or not _SMALLEST_SIDE <= side <= 8192 for side in size):
        expected = f"(height, width), {_SMALLEST_SIDE} to 8192"
        raise _bad("the size of the synthetic frames is out of range", "size", size, expected)
    return {
        "drawing": _DRAWING_VERSION,
        "seed": seed,
        "size": list(size),
        "domains": {
            domain: {split: asdict(settings) for split, settings in splits.items()} for domain, splits in plan.items()
        },
    }


def _bad(what: str, where: str, found: object, expected: str) -> MotipError:
    return MotipError(
        what, where=f"synthetic dataset: {where}", found=found, expected=expected, fix="correct the synthetic settings"
    )


@contextlib.contextmanager
def _write_lock(target: Path) -> Iterator[None]:
    """Exclusive lock of the dataset: of several processes, one writes and the others reuse the result."""
    lock = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("w")
    except OSError as error:
        raise MotipError(
            f"cannot write next to the synthetic dataset: {error.strerror or error}",
            where=target.parent,
            expected="a writable folder",
            fix="choose another data root",
        ) from error
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        # With the lock held, temporary folders here are leftovers of killed processes.
        for left in target.parent.glob(f".{target.name}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _read_marker(target: Path) -> DatasetReport | None:
    """The dataset at ``target``, or None for an absent or empty folder; MotipError for other contents."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    marker = target / _MARKER
    try:
        raw = json.loads(marker.read_text())
        splits = {
            domain: {split: SplitReport(**report) for split, report in reports.items()}
            for domain, reports in raw["splits"].items()
        }
        return DatasetReport(target, raw["digest"], raw["settings"], splits, False, raw["seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MotipError(
            "the folder for the synthetic dataset has other contents",
            where=target,
            found=f"no readable {_MARKER} ({type(error).__name__})",
            expected="an absent or empty folder, or a synthetic dataset written earlier",
            fix="choose another folder, or remove this one if it is not needed",
        ) from error


def _is_complete(report: DatasetReport) -> bool:
    """Whether the sequences exist with all their frames."""
    for domain, splits in report.splits.items():
        spec = _DOMAINS[domain]
        for split, written in splits.items():
            frames = 0
            for name in written.names:
                images, annotations = spec.writer(report.root / spec.folder, split, name, spec.fps, 1).paths()
                if not annotations.is_file() or not images.is_dir():
                    return False
                frames += sum(entry.name.endswith(".jpg") for entry in os.scandir(images))
            if frames != written.frames:
                return False
    return True


def _replace(temporary: Path, target: Path) -> None:
    """Move the new dataset to ``target``, replacing an earlier dataset (recognised by ``_read_marker``)."""
    if not target.exists():
        os.replace(temporary, target)
        return
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    os.replace(target, old)
    os.replace(temporary, target)
    shutil.rmtree(old)
