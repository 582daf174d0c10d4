"""What the readers share: the protocol, images found by number, image sizes, tables of comma-separated rows.

Folders are anything with the verbs of :class:`pathlib.Path` used here (listing, joining, reading), so that raw data
can also lie in S3 without a reader knowing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from motip.data.decode import image_height_width
from motip.data.sequence import UNTRACKED, Frame, ReadReport, Sequence
from motip.errors import MotipError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")

OUTSIDE = "box wholly outside the image"
ZERO_AREA = "zero-area box"
NOT_FINITE = "box coordinates are not finite numbers"
DUPLICATE = "track id twice in a frame (the first is kept)"
NO_IMAGE = "no image for the frame"
CROSSES = "box crosses the border, kept as it is"
CLASS_CHANGE = "track changes its category midway, kept"
UNLABELLED = "image outside the labelled frames, left out"


class Place(Protocol):
    """A file or folder: :class:`pathlib.Path`, or something with the same verbs."""

    @property
    def name(self) -> str: ...
    @property
    def stem(self) -> str: ...
    @property
    def suffix(self) -> str: ...
    def __truediv__(self, name: str, /) -> Place: ...
    def is_dir(self) -> bool: ...
    def is_file(self) -> bool: ...
    def iterdir(self) -> Iterator[Any]: ...
    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class RawSequence:
    """Where one sequence's files are.

    Attributes:
        labels: the label file; a file that lists several videos is shared by their sequences.
        images: the folder of frames, or None where only labels exist.
        info: ``seqinfo.ini`` where the format has one.
        fps: overrides what the format says.
    """

    name: str
    split: str
    labels: Any
    images: Any = None
    info: Any = None
    fps: float | None = None


class Reader(Protocol):
    """One raw format."""

    DATASET: str

    def list_sequences(self, root: Any, split: str) -> list[RawSequence]:
        """Sequences of a split, by name. Raises MotipError for missing or empty folders."""

    def read_sequence(self, raw: RawSequence) -> tuple[Sequence, ReadReport]:
        """Labels and image places of one sequence; every label row is kept, or counted as dropped."""


def subfolders(folder: Any) -> list[Any]:
    """Folders directly inside, by name."""
    return sorted((item for item in folder.iterdir() if item.is_dir()), key=lambda item: item.name)


def files_with(folder: Any, suffix: str) -> list[Any]:
    """Files directly inside that end with ``suffix``, by name."""
    # Editors and archives leave hidden companions such as "._a.json", which are no labels.
    return sorted(
        (item for item in folder.iterdir() if item.suffix == suffix and not item.name.startswith(".")),
        key=lambda item: item.name,
    )


def require_folder(folder: Any, what: str, fix: str) -> None:
    """Raise unless ``folder`` is a folder."""
    if not folder.is_dir():
        raise MotipError(f"{what} is missing", where=folder, expected="a folder", fix=fix)


def trailing_number(stem: str) -> int | None:
    """The number a file name ends with: ``b1c66a42-6f7d68ca-0000012`` is 12."""
    match = re.search(r"(\d+)$", stem)
    return int(match.group(1)) if match else None


def numbered_images(folder: Any, report: ReadReport) -> dict[int, Any]:
    """Images by the number in their names, in the order of the numbers (never of the listing).

    Raises:
        MotipError: two images with one number.
    """
    images: dict[int, Any] = {}
    unnumbered = 0
    for item in folder.iterdir():
        if item.suffix not in IMAGE_SUFFIXES or item.name.startswith("."):
            continue
        number = trailing_number(item.stem)
        if number is None:
            unnumbered += 1
        elif number in images:
            raise MotipError(
                f"two images have the frame number {number}",
                where=folder,
                found=f"{images[number].name} and {item.name}",
                fix="keep one of them",
            )
        else:
            images[number] = item
    count(report, "image without a number in its name, left out", unnumbered)
    return dict(sorted(images.items()))


def first_size(images: Mapping[int, Any], where: object) -> tuple[int, int]:
    """(width, height) of the first image whose header can be read; conversion finds and names the broken ones."""
    for image in images.values():
        try:
            height, width = image_height_width(image.read_bytes(), image, whole=False)
            return width, height
        except MotipError:
            continue
    raise MotipError(
        "none of the images has a readable header",
        where=where,
        found=f"{len(images)} files",
        fix="fetch the sequence again, or remove it",
    )


def read_table(path: Any, columns: range, refusals: Mapping[int, MotipError] | None = None) -> np.ndarray:
    """Rows of comma-separated numbers, float64 (R, C); a trailing comma and blank lines are allowed.

    Args:
        columns: how many columns are legal; all rows must have the same number.
        refusals: the error to raise for a number of columns that means something else.

    Raises:
        MotipError: naming the line, for another number of columns or a value that is no number.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MotipError("not a text file", where=path, found=str(error), fix="fetch the labels again") from error
    rows: list[list[float]] = []
    width: int | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        values = line.strip().rstrip(",").split(",")
        if values == [""]:
            continue
        if refusals and len(values) in refusals:
            raise refusals[len(values)]
        if len(values) not in columns or len(values) != (width or len(values)):
            raise MotipError(
                "a row has the wrong number of columns",
                where=f"{path}, line {number}",
                found=f"{len(values)} columns: {line.strip()[:80]}",
                expected=f"{width or f'{columns.start} to {columns.stop - 1}'} columns separated by commas",
                fix="check that this is the label file of this format, and that it is whole",
            )
        width = len(values)
        try:
            rows.append([float(value) for value in values])
        except ValueError as error:
            raise MotipError(
                "a value is not a number",
                where=f"{path}, line {number}",
                found=line.strip()[:80],
                fix="repair the line",
            ) from error
    return np.array(rows, dtype=np.float64).reshape(len(rows), width or columns.start)


def whole_numbers(values: np.ndarray, what: str, path: object, *, at_least: int) -> np.ndarray:
    """A column as int64; raises for fractions, NaN and values below ``at_least``."""
    bad = ~(np.isfinite(values) & (values == np.round(values)) & (values >= at_least) & (values < 2**53))
    if bad.any():
        row = int(np.argmax(bad))
        raise MotipError(
            f"{what} is not a whole number from {at_least} on",
            where=f"{path}, row {row + 1}",
            found=values[row],
            expected=f"{what}s count from {at_least} on disk",
            fix="if the file counts from 0, add 1; do not guess silently",
        )
    return values.astype(np.int64)


@dataclass
class Rows:
    """Label rows of a sequence before they become frames; all arrays have one entry per row."""

    frames: np.ndarray
    boxes_xyxy: np.ndarray
    track_ids: np.ndarray
    categories: np.ndarray
    ignore: np.ndarray
    occlusion: np.ndarray
    truncation: np.ndarray

    def __len__(self) -> int:
        return len(self.frames)

    def keep(self, mask: np.ndarray, reason: str, report: ReadReport) -> Rows:
        """Rows under ``mask``; the others are counted as dropped for ``reason``."""
        dropped = int((~mask).sum())
        if not dropped:
            return self
        report.dropped[reason] += dropped
        return Rows(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))


def count(report: ReadReport, what: str, times: int = 1) -> None:
    """Note a repair; nothing is noted for zero times."""
    if times:
        report.repaired[what] += times


def check_rows(rows: Rows, size: tuple[int, int], report: ReadReport) -> Rows:
    """Drop rows that are no boxes, count those that are unusual; ``size`` is (width, height) or (0, 0) if unknown."""
    with np.errstate(over="ignore"):
        # At the precision that is stored, so that no box loses its area afterwards.
        rows = replace(rows, boxes_xyxy=rows.boxes_xyxy.astype(np.float32))
    rows = rows.keep(np.isfinite(rows.boxes_xyxy).all(axis=1), NOT_FINITE, report)
    x0, y0, x1, y1 = rows.boxes_xyxy.T
    rows = rows.keep((x1 > x0) & (y1 > y0), ZERO_AREA, report)
    width, height = size
    if width and height:
        x0, y0, x1, y1 = rows.boxes_xyxy.T
        rows = rows.keep((x1 > 0) & (y1 > 0) & (x0 < width) & (y0 < height), OUTSIDE, report)
        x0, y0, x1, y1 = rows.boxes_xyxy.T
        count(report, CROSSES, int(((x0 < 0) | (y0 < 0) | (x1 > width) | (y1 > height)).sum()))
    tracked = rows.track_ids != UNTRACKED
    keys = np.stack([rows.frames, rows.track_ids], axis=1)
    first = np.zeros(len(rows), dtype=bool)
    first[np.unique(keys, axis=0, return_index=True)[1]] = True
    rows = rows.keep(first | ~tracked, DUPLICATE, report)
    count(report, CLASS_CHANGE, _tracks_with_several(rows))
    return rows


def _tracks_with_several(rows: Rows) -> int:
    tracked = rows.track_ids != UNTRACKED
    pairs = set(zip(rows.track_ids[tracked].tolist(), rows.categories[tracked].tolist(), strict=True))
    return sum(names > 1 for names in Counter(track_id for track_id, _ in pairs).values())


def build_frames(rows: Rows, numbers: list[int], images: Mapping[int, Any]) -> tuple[Frame, ...]:
    """Frames in the order of ``numbers``; a number without rows is a frame without objects."""
    order = np.argsort(rows.frames, kind="stable")
    sorted_frames = rows.frames[order]
    starts = np.searchsorted(sorted_frames, numbers, side="left")
    stops = np.searchsorted(sorted_frames, numbers, side="right")
    frames = []
    for number, start, stop in zip(numbers, starts, stops, strict=True):
        chosen = order[start:stop]
        frames.append(
            Frame(
                number=number,
                image=images.get(number),
                boxes_xyxy=rows.boxes_xyxy[chosen],
                track_ids=rows.track_ids[chosen].astype(np.int64),
                categories=tuple(rows.categories[chosen].tolist()),
                ignore=rows.ignore[chosen].astype(bool),
                occlusion=rows.occlusion[chosen].astype(np.int8),
                truncation=rows.truncation[chosen].astype(np.int8),
            )
        )
    return tuple(frames)


def refuse_mismatch(rows: Rows, images: Mapping[int, Any], where: RawSequence) -> None:
    """Raise when labels and images have no frame in common: they are of different videos."""
    if len(rows) and images and not set(rows.frames.tolist()) & set(images):
        raise MotipError(
            f"images and labels of {where.name} do not match: no labelled frame has an image",
            where=where.labels,
            found=f"labelled frames {rows.frames.min() + 1}..{rows.frames.max() + 1}, images "
            f"{min(images) + 1}..{max(images) + 1} in {where.images} (both counted from 1)",
            fix="check that both are of the same video and the same release, and of video (MOT), not of single images",
        )
