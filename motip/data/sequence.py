"""The one in-memory form every raw format is read into and every result is written from (numpy only)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from motip.errors import MotipError

UNTRACKED = -1
"""Track id of a region that has no identity (ignore regions)."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame and everything labelled in it, in raw categories of its dataset.

    Attributes:
        number: 0-based frame number in the source sequence; may start above 0 and have gaps.
        image: path of the encoded image, its bytes, or None where only labels exist.
        boxes_xyxy: (N, 4) float32, pixels of the full image, may cross the border.
        track_ids: (N,) int64, unique within a frame; UNTRACKED for regions without identity.
        categories: N raw category names as the dataset spells them.
        ignore: (N,) bool, True where the format itself says "neither object nor background"
            (BDD100K ``crowd``, VisDrone category 0/11 or score 0).
        occlusion: (N,) int8, 0 none, 1 partial, 2 heavy (BDD100K: 0/1).
        truncation: (N,) int8, 0 none, 1 truncated.
    """

    number: int
    image: Path | bytes | None
    boxes_xyxy: np.ndarray
    track_ids: np.ndarray
    categories: tuple[str, ...]
    ignore: np.ndarray
    occlusion: np.ndarray
    truncation: np.ndarray


@dataclass(frozen=True, slots=True)
class Sequence:
    """A video: frames in the order of their numbers.

    ``track_names[i]`` is the dataset's own spelling of track id ``i`` where ids are not integers on disk.
    """

    name: str
    dataset: str
    split: str
    fps: float
    width: int
    height: int
    frames: tuple[Frame, ...]
    track_names: tuple[str, ...] = ()


@dataclass(slots=True)
class ReadReport:
    """What happened to every label row: kept + dropped == raw, by reason; repairs are counted beside."""

    raw: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def check(self, where: object) -> None:
        """Raise if a row is unaccounted for: a reader that loses rows must not pass as one that works."""
        if self.raw != self.kept + sum(self.dropped.values()):
            raise MotipError(
                "label rows are unaccounted for",
                where=where,
                found=f"{self.kept} kept + {dict(self.dropped)} dropped",
                expected=f"{self.raw} raw rows",
                fix="this is a defect of the reader: report it with the file",
            )

    def add(self, other: ReadReport) -> None:
        self.raw += other.raw
        self.kept += other.kept
        self.dropped += other.dropped
        self.repaired += other.repaired
        self.notes += other.notes

    def to_dict(self) -> dict[str, object]:
        return {
            "raw": self.raw,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "repaired": dict(sorted(self.repaired.items())),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class ClassMap:
    """Raw categories of a dataset to the classes a stage trains: mapped by name, everything else is ignored.

    Args:
        names: class names in the order of their 0-based ids.
        mapping: class name to the raw categories that count as it.
    """

    names: tuple[str, ...]
    mapping: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.mapping) - set(self.names))
        if unknown:
            raise MotipError(
                f"the class map names classes that are not trained: {', '.join(unknown)}",
                where="classes",
                expected=f"some of {', '.join(self.names)}",
                fix="add the class to CLASSES or drop it from the source's classes",
            )
        claimed = Counter(raw for raws in self.mapping.values() for raw in raws)
        twice = sorted(raw for raw, count in claimed.items() if count > 1)
        if twice:
            raise MotipError(
                f"raw categories are mapped to more than one class: {', '.join(twice)}",
                where="classes",
                fix="let each raw category stand under one class",
            )

    @classmethod
    def among(cls, names: tuple[str, ...], mapping: Mapping[str, tuple[str, ...]]) -> ClassMap:
        """The map for ``names`` of a source that may have more classes, or fewer."""
        return cls(names, {name: mapping[name] for name in names if name in mapping})

    def class_ids(self, categories: SequenceOf[str]) -> np.ndarray:
        """(N,) int64 class ids, -1 for a category that no class claims."""
        lookup = {raw: self.names.index(name) for name, raws in self.mapping.items() for raw in raws}
        return np.array([lookup.get(category, -1) for category in categories], dtype=np.int64)

    def split(self, frame: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Objects to learn and regions to ignore.

        Returns:
            boxes_xyxy (K, 4), track_ids (K,), class_ids (K,), ignore_xyxy (N - K, 4).
        """
        class_ids = self.class_ids(frame.categories)
        keep = (class_ids >= 0) & ~frame.ignore & (frame.track_ids != UNTRACKED)
        return frame.boxes_xyxy[keep], frame.track_ids[keep], class_ids[keep], frame.boxes_xyxy[~keep]


@dataclass(frozen=True, slots=True)
class TrackRows:
    """A tracker's output (or a ground truth) for one sequence, one entry per box, sorted by frame.

    Attributes:
        frames: (R,) int64 frame numbers, 0-based.
        track_ids: (R,) int64, unique within a frame.
        boxes_xyxy: (R, 4) float32 pixels, not clipped.
        scores: (R,) float32 in 0..1 (1 for ground truth).
        class_ids: (R,) int64, 0-based.
    """

    frames: np.ndarray
    track_ids: np.ndarray
    boxes_xyxy: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray

    @staticmethod
    def empty() -> TrackRows:
        return TrackRows(
            np.zeros(0, np.int64),
            np.zeros(0, np.int64),
            np.zeros((0, 4), np.float32),
            np.zeros(0, np.float32),
            np.zeros(0, np.int64),
        )

    def __len__(self) -> int:
        return len(self.frames)
