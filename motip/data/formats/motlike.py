"""Shared part of the VisDrone and MOTChallenge readers: a text table and a folder of numbered frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from motip.data.formats.common import (
    NO_IMAGE,
    UNLABELLED,
    RawSequence,
    Rows,
    build_frames,
    check_images_match_labels,
    check_rows,
    count,
    first_size,
    numbered_images,
)
from motip.data.sequence import ReadReport, Sequence
from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.storage.paths import Location

FROM_ZERO = "image names count from 0, labels from 1: images renumbered"


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
    """Build a sequence from label rows and images.

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
    first, last = int(rows.frames.min()), int(rows.frames.max())
    if images:
        rows = rows.keep(np.isin(rows.frames, list(images)), NO_IMAGE, report)
    rows = check_rows(rows, size, report)
    numbers = [number for number in range(first, last + 1) if not images or number in images]
    _count_gaps(report, images, numbers, first, last)
    report.kept = len(rows)
    report.check(raw.labels)
    return Sequence(
        name=raw.name,
        dataset=dataset,
        split=raw.split,
        fps=raw.fps or fps,
        width=size[0],
        height=size[1],
        frames=build_frames(rows, numbers, images),
    )


def _count_gaps(report: ReadReport, images: dict[int, Location], numbers: list[int], first: int, last: int) -> None:
    outside = sum(not first <= number <= last for number in images)
    count(report, UNLABELLED, outside)
    if images:
        count(report, "frame number without an image, left out", last - first + 1 - len(numbers))
