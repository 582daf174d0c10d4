"""Shared parts of the dataset readers: interface, numbered images, comma-separated tables, checks of label rows.

Readers use only the methods that local and S3 paths share, so raw data may be in a local folder or in S3.
"""

from __future__ import annotations

import configparser
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from motip.data.decode import image_height_width
from motip.data.sequence import UNTRACKED, Frame, ReadReport, Sequence
from motip.errors import MotipError
from motip.storage.atomic import atomic_write

if TYPE_CHECKING:
    from motip.storage.paths import Location

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")

OUTSIDE = "box wholly outside the image"
ZERO_AREA = "zero-area box"
NOT_FINITE = "box coordinates are not finite numbers"
DUPLICATE = "track id twice in a frame (the first is kept)"
NO_IMAGE = "no image for the frame"
CROSSES = "box crosses the border, kept as it is"
CLASS_CHANGE = "track changes its category midway, kept"
UNLABELLED = "image outside the labelled frames, left out"
FROM_ZERO = "image names count from 0, labels from 1: images renumbered"


@dataclass(frozen=True)
class RawSequence:
    """Files of one raw sequence.

    Attributes:
        split: name of the split in the raw dataset.
        labels: the label file; sequences may share one that lists several videos.
        images: the folder of frames, or None if there are labels only.
        info: ``seqinfo.ini`` if the format has one.
        fps: overrides the frame rate of the format.
    """

    name: str
    split: str
    labels: Location
    images: Location | None = None
    info: Location | None = None
    fps: float | None = None


class Reader(Protocol):
    """Interface of a dataset reader, implemented by a module per format (listed in `registry.READERS`)."""

    DATASET: str
    """Name of the format; also the dataset name stored in shards."""

    def list_sequences(self, root: Location, split: str) -> list[RawSequence]:
        """Sequences of a split, sorted by name; raises MotipError for missing or empty folders, or missing labels."""

    def read_sequence(self, raw: RawSequence) -> tuple[Sequence, ReadReport]:
        """Labels and image paths of one sequence; every label row is kept, or dropped for a counted reason.

        Without an image folder the frames have no images.

        Raises:
            MotipError: another layout (with the name of a known one), numbers from 0, labels of another video.
        """


def subfolders(folder: Location) -> list[Location]:
    """Folders directly inside ``folder``, sorted by name."""
    return sorted((item for item in folder.iterdir() if item.is_dir()), key=lambda item: item.name)


def files_with(folder: Location, suffix: str) -> list[Location]:
    """Files directly inside ``folder`` that end with ``suffix``, sorted by name, without hidden files."""
    # Archives of macOS contain resource forks such as "._a.json", which are not labels.
    return sorted(
        (item for item in folder.iterdir() if item.suffix == suffix and not item.name.startswith(".")),
        key=lambda item: item.name,
    )


def require_folder(folder: Location, what: str, fix: str) -> None:
    """Raise MotipError unless ``folder`` is a folder."""
    if not folder.is_dir():
        raise MotipError(f"{what} is missing", where=folder, expected="a folder", fix=fix)


def trailing_number(stem: str) -> int | None:
    """The number a file name ends with: ``b1c66a42-6f7d68ca-0000012`` is 12."""
    match = re.search(r"(\d+)$", stem)
    return int(match.group(1)) if match else None


def numbered_images(folder: Location, report: ReadReport) -> dict[int, Location]:
    """Images by the number in their names, sorted; raises MotipError for two images with one number."""
    images: dict[int, Location] = {}
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


def first_size(images: Mapping[int, Location], where: object) -> tuple[int, int]:
    """(width, height) of the first image with a readable header, the others may be broken; MotipError without one."""
    for image in images.values():
        try:
            height, width = image_height_width(image.read_bytes(), image, complete=False)
            return width, height
        except MotipError:
            continue
    raise MotipError(
        "none of the images has a readable header",
        where=where,
        found=f"{len(images)} files",
        fix="download the sequence again, or remove it",
    )


def read_table(path: Location, columns: range, refusals: Mapping[int, MotipError] | None = None) -> np.ndarray:
    """Rows of comma-separated numbers, (R, C) float64; a trailing comma and blank lines are allowed.

    Args:
        columns: allowed numbers of columns; all rows must have the same number.
        refusals: specific errors for numbers of columns that identify another format.

    Raises:
        MotipError: with the line, for another number of columns or a value that is not a number.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MotipError("not a text file", where=path, found=str(error), fix="download the labels again") from error
    rows: list[list[float]] = []
    width: int | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        values = line.strip().rstrip(",").split(",")
        if values == [""]:
            continue
        # The number of columns identifies the format.
        if refusals and len(values) in refusals:
            raise refusals[len(values)]
        if len(values) not in columns or len(values) != (width or len(values)):
            raise MotipError(
                "a row has the wrong number of columns",
                where=f"{path}, line {number}",
                found=f"{len(values)} columns: {line.strip()[:80]}",
                expected=f"{width or f'{columns.start} to {columns.stop - 1}'} columns separated by commas",
                fix="check that this is a complete label file of this format",
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


def read_seqinfo(path: Location, keys: Mapping[str, Callable[[str], float]], fix: str) -> list[float]:
    """Values of a MOTChallenge ``seqinfo.ini``; raises MotipError for a missing or unreadable one."""
    parser = configparser.ConfigParser()
    try:
        parser.read_string(path.read_bytes().decode())
        return [parse(parser["Sequence"][key]) for key, parse in keys.items()]
    except (configparser.Error, KeyError, ValueError) as error:
        expected = f"[Sequence] with {' and '.join(keys)}"
        raise MotipError(f"seqinfo.ini cannot be read: {error}", where=path, expected=expected, fix=fix) from error


def table_boxes(table: np.ndarray) -> np.ndarray:
    """(R, 4) float64 ``xyxy`` of a table's columns 2 to 5: left, top, width, height."""
    return np.hstack([table[:, 2:4], table[:, 2:4] + table[:, 4:6]])


def integer_column(values: np.ndarray, what: str, path: object, *, at_least: int) -> np.ndarray:
    """A column as int64; raises MotipError for fractions, NaN and values below ``at_least``."""
    bad = ~(np.isfinite(values) & (values == np.round(values)) & (values >= at_least) & (values < 2**53))
    if bad.any():
        row = int(np.argmax(bad))
        raise MotipError(
            f"{what} is not an integer >= {at_least}",
            where=f"{path}, row {row + 1}",
            found=values[row],
            expected=f"{what}s count from {at_least} on disk",
            fix="if the file counts from 0, add 1",
        )
    return values.astype(np.int64)


@dataclass
class Rows:
    """Label rows of a sequence as columns, one entry per row; see :class:`motip.data.sequence.Frame` for the types."""

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
        """Rows where ``mask`` is True; the others are counted as dropped for ``reason``."""
        dropped = int((~mask).sum())
        if not dropped:
            return self
        report.dropped[reason] += dropped
        return Rows(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))


def count(report: ReadReport, what: str, times: int = 1) -> None:
    """Count a repair ``times`` times; no entry is made for 0."""
    if times:
        report.repaired[what] += times


def _check_rows(rows: Rows, size: tuple[int, int], report: ReadReport) -> Rows:
    """Drop invalid boxes and duplicates, count unusual rows; ``size`` is (width, height) or (0, 0) if unknown."""
    with np.errstate(over="ignore"):
        # Checked at the stored precision, so that no box loses its area by the conversion.
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


def zero_based_images(raw: RawSequence, report: ReadReport) -> dict[int, Location]:
    """Images by 0-based frame number; file names count from 1 unless one has number 0."""
    if raw.images is None:
        return {}
    by_name = numbered_images(raw.images, report)
    if not by_name:
        raise MotipError(
            f"sequence {raw.name} has no images",
            where=raw.images,
            expected="numbered .jpg or .png files",
            fix="download the images of this sequence, or remove its labels",
        )
    first = 0 if 0 in by_name else 1
    if first == 0:
        count(report, FROM_ZERO, len(by_name))
    return {number - first: image for number, image in by_name.items()}


def assemble(
    raw: RawSequence, rows: Rows, images: dict[int, Location], report: ReadReport, *, dataset: str, fps: float
) -> Sequence:
    """Build a sequence from the rows of a text table and a folder of numbered images.

    A frame within the labelled range that has an image but no row is a frame without objects. Images before the
    first and after the last labelled frame are left out and counted, since they are unlabelled rather than empty
    (the VisDrone toolkit cuts results there too).

    Raises:
        MotipError: no label rows, labels and images of different videos, or no readable image.
    """
    if not len(rows):
        raise MotipError(
            f"sequence {raw.name} has no label rows",
            where=raw.labels,
            fix="download its labels, or remove the sequence",
        )
    check_images_match_labels(rows, images, raw)
    size = first_size(images, raw.images) if images else (0, 0)
    numbers = list(range(int(rows.frames.min()), int(rows.frames.max()) + 1))
    if images:
        labelled, rows = numbers, rows.keep(np.isin(rows.frames, list(images)), NO_IMAGE, report)
        numbers = [number for number in labelled if number in images]
        count(report, "frame number without an image, left out", len(labelled) - len(numbers))
        count(report, UNLABELLED, len(images) - len(numbers))
    return build_sequence(raw, rows, numbers, images, size, report, dataset=dataset, fps=fps)


def build_sequence(
    raw: RawSequence,
    rows: Rows,
    numbers: list[int],
    images: Mapping[int, Location],
    size: tuple[int, int],
    report: ReadReport,
    *,
    dataset: str,
    fps: float,
    track_names: tuple[str, ...] = (),
) -> Sequence:
    """Check the rows and divide them into the frames ``numbers``; a number without rows is a frame without objects.

    Args:
        size: (width, height) in pixels, (0, 0) if unknown.
    """
    rows = _check_rows(rows, size, report)
    report.kept = len(rows)
    report.check(raw.labels)
    order = np.argsort(rows.frames, kind="stable")
    starts, stops = (np.searchsorted(rows.frames[order], numbers, side=side) for side in ("left", "right"))
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
    return Sequence(raw.name, dataset, raw.split, raw.fps or fps, *size, tuple(frames), track_names)


def check_images_match_labels(rows: Rows, images: Mapping[int, Location], where: RawSequence) -> None:
    """Raise MotipError if labels and images have no frame in common, that is, belong to different videos."""
    if len(rows) and images and not set(rows.frames.tolist()) & set(images):
        raise MotipError(
            f"images and labels of {where.name} do not match: no labelled frame has an image",
            where=where.labels,
            found=f"labelled frames {rows.frames.min() + 1}..{rows.frames.max() + 1}, images "
            f"{min(images) + 1}..{max(images) + 1} in {where.images} (both counted from 1)",
            fix="check that both are of the same video and release, and of videos (MOT), not of single images",
        )


def write_lines(path: Path | str, lines: Iterable[str]) -> None:
    """Write a text file atomically, each line with its newline."""
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))
