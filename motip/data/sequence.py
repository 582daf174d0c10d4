"""In-memory representation of sequences, labels and tracks, shared by all readers and writers (numpy only)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, fields
from typing import NamedTuple, Protocol

import numpy as np

from motip.errors import MotipError

UNTRACKED = -1
"""Track id of a region that has no identity (ignore regions)."""


class ImageFile(Protocol):
    """An encoded image that is read on demand: :class:`pathlib.Path` or an S3 path."""

    @property
    def name(self) -> str: ...
    def read_bytes(self) -> bytes: ...


class Labels(NamedTuple):
    """Labels of one frame, split for training (K objects, M regions to ignore)."""

    boxes_xyxy: np.ndarray  # (K, 4) float32, pixels of the full image
    track_ids: np.ndarray  # (K,) int64
    class_ids: np.ndarray  # (K,) int64, indices into ClassMap.names
    ignore_xyxy: np.ndarray  # (M, 4) float32, pixels of the full image


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame with its labels, in the raw categories of its dataset.

    Attributes:
        number: 0-based frame number in the source sequence; may start above 0 and have gaps.
        image: encoded image, as a file to read or as its bytes; None if there are labels only.
        boxes_xyxy: (N, 4) float32, pixels of the full image, may extend beyond it.
        track_ids: (N,) int64, unique within a frame; UNTRACKED for regions without identity.
        categories: N raw category names as the dataset spells them.
        ignore: (N,) bool, True where the format itself marks "neither object nor background"
            (BDD100K ``crowd``, VisDrone category 0/11 or score 0).
        occlusion: (N,) int8, 0 none, 1 partial, 2 heavy (BDD100K: 0/1).
        truncation: (N,) int8, 0 none, 1 truncated.
    """

    number: int
    image: ImageFile | bytes | None
    boxes_xyxy: np.ndarray
    track_ids: np.ndarray
    categories: tuple[str, ...]
    ignore: np.ndarray
    occlusion: np.ndarray
    truncation: np.ndarray


@dataclass(frozen=True, slots=True)
class Sequence:
    """A video: frames sorted by frame number.

    ``track_names[i]`` is the original identifier of track id ``i`` if ids are not integers on disk.
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
    """Label rows of a sequence: raw == kept + dropped (by reason). Repairs are counted separately."""

    raw: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def check(self, where: object) -> None:
        """Raise MotipError unless every raw row was either kept or dropped for a named reason."""
        if self.raw != self.kept + sum(self.dropped.values()):
            raise MotipError(
                "label rows are unaccounted for",
                where=where,
                found=f"{self.kept} kept + {dict(self.dropped)} dropped",
                expected=f"{self.raw} raw rows",
                fix="this is a defect of the reader: report it with the file",
            )

    def add(self, other: ReadReport) -> None:
        """Add the counts of another report."""
        self.raw += other.raw
        self.kept += other.kept
        self.dropped += other.dropped
        self.repaired += other.repaired
        self.notes += other.notes

    def to_dict(self) -> dict[str, object]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class ClassMap:
    """Mapping from raw categories of a dataset to the classes a stage trains; unmapped categories are ignored.

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
                fix="list each raw category under one class",
            )

    @classmethod
    def among(cls, names: tuple[str, ...], mapping: Mapping[str, tuple[str, ...]]) -> ClassMap:
        """The map restricted to ``names``, which may contain more or fewer classes than ``mapping``."""
        return cls(names, {name: mapping[name] for name in names if name in mapping})

    def class_ids(self, categories: SequenceOf[str]) -> np.ndarray:
        """(N,) int64 class ids, -1 for an unmapped category."""
        lookup = {raw: self.names.index(name) for name, raws in self.mapping.items() for raw in raws}
        return np.array([lookup.get(category, -1) for category in categories], dtype=np.int64)

    def split(self, frame: Frame) -> Labels:
        """Separate a frame's N boxes into K objects to train on and M = N - K regions to ignore."""
        class_ids = self.class_ids(frame.categories)
        keep = (class_ids >= 0) & ~frame.ignore & (frame.track_ids != UNTRACKED)
        return Labels(frame.boxes_xyxy[keep], frame.track_ids[keep], class_ids[keep], frame.boxes_xyxy[~keep])


@dataclass(frozen=True, slots=True)
class TrackRows:
    """Tracker output or ground truth of one sequence: R boxes sorted by frame.

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
