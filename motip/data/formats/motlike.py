"""The part that VisDrone and MOTChallenge have in common: a text table beside a folder of numbered frames."""

from __future__ import annotations

from typing import Any

import numpy as np

from motip.data.formats.common import (
    NO_IMAGE,
    UNLABELLED,
    RawSequence,
    Rows,
    build_frames,
    check_rows,
    count,
    first_size,
    numbered_images,
    refuse_mismatch,
)
from motip.data.sequence import ReadReport, Sequence
from motip.errors import MotipError

FROM_ZERO = "image names count from 0, labels from 1: images renumbered"


def zero_based_images(raw: RawSequence, report: ReadReport) -> dict[int, Any]:
    """Images by 0-based frame number; file names count from 1 unless there is a file with number 0."""
    if raw.images is None:
        return {}
    by_name = numbered_images(raw.images, report)
    if not by_name:
        raise MotipError(
            f"sequence {raw.name} has no images",
            where=raw.images,
            expected="numbered .jpg or .png files",
            fix="fetch the images of this sequence, or remove its labels",
        )
    first = 0 if 0 in by_name else 1
    if first == 0:
        count(report, FROM_ZERO, len(by_name))
    return {number - first: image for number, image in by_name.items()}


def assemble(
    raw: RawSequence, rows: Rows, images: dict[int, Any], report: ReadReport, *, dataset: str, fps: float
) -> Sequence:
    """Rows and images to a sequence.

    A frame inside the labelled span that has an image but no row is a frame without objects. Images before the
    first and after the last labelled frame are left out and counted: nobody said that they are empty (the VisDrone
    toolkit clips results there too).
    """
    if not len(rows):
        raise MotipError(
            f"sequence {raw.name} has no label rows", where=raw.labels, fix="fetch its labels, or remove the sequence"
        )
    refuse_mismatch(rows, images, raw)
    size = first_size(images, raw.images) if images else (0, 0)
    first, last = int(rows.frames.min()), int(rows.frames.max())
    if images:
        rows = rows.keep(np.isin(rows.frames, list(images)), NO_IMAGE, report)
    rows = check_rows(rows, size, report)
    span = range(first, last + 1)
    numbers = [number for number in span if not images or number in images]
    _note_gaps(report, images, numbers, first, last)
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


def _note_gaps(report: ReadReport, images: dict[int, Any], numbers: list[int], first: int, last: int) -> None:
    outside = sum(not first <= number <= last for number in images)
    count(report, UNLABELLED, outside)
    if images:
        count(report, "frame number without an image, left out", last - first + 1 - len(numbers))
