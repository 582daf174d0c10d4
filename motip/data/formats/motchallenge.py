"""MOTChallenge and DanceTrack: ``<split>/<seq>/{img1,gt/gt.txt,seqinfo.ini}``.

Columns of ``gt.txt`` (motchallenge.net, data format): frame, id, left, top, width, height and then, depending on the
release, "consider" flag, class, visibility. MOT15 has 10 columns whose last four are the flag and a position in 3D,
so no class. Frames count from 1. A file ``gt/labels.txt`` (one class name per line, as written by CVAT) names the
classes; the default is the names of MOT17.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from motip.data.formats.common import (
    RawSequence,
    Rows,
    assemble,
    count,
    integer_column,
    read_seqinfo,
    read_table,
    require_folder,
    subfolders,
    table_boxes,
    zero_based_images,
)
from motip.data.sequence import ReadReport, Sequence
from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.storage.paths import Location

DATASET = "motchallenge"
FPS = 30.0

CATEGORIES = (
    "pedestrian",
    "person on vehicle",
    "car",
    "bicycle",
    "motorbike",
    "non motorized vehicle",
    "static person",
    "distractor",
    "occluder",
    "occluder on the ground",
    "occluder full",
    "reflection",
    "crowd",
)
NO_SEQINFO = "no seqinfo.ini: frame rate assumed"
WRONG_LENGTH = "seqLength differs from the number of images, images believed"


def list_sequences(root: Location, split: str) -> list[RawSequence]:
    """Sequences of ``<root>/<split>``, sorted by name."""
    base = root / split
    require_folder(base, f"the split {split!r}", "set the source's root to the folder that contains train and val")
    folders = [folder for folder in subfolders(base) if (folder / "img1").is_dir()]
    if not folders:
        raise MotipError(
            f"the split {split!r} has no sequences",
            where=base,
            expected="folders with img1, gt/gt.txt and seqinfo.ini",
            fix="unpack the archive of this split here, or correct the source's root",
        )
    unlabelled = [folder.name for folder in folders if not (folder / "gt" / "gt.txt").is_file()]
    if unlabelled:
        raise MotipError(
            f"{len(unlabelled)} of {len(folders)} sequences have no ground truth, such as {unlabelled[0]}",
            where=base / unlabelled[0],
            expected="gt/gt.txt",
            fix="use a split with published labels (a test split has none)",
        )
    return [
        RawSequence(folder.name, split, folder / "gt" / "gt.txt", folder / "img1", folder / "seqinfo.ini")
        for folder in folders
    ]


def read_sequence(raw: RawSequence) -> tuple[Sequence, ReadReport]:
    """Read one sequence; without an image folder the size is 0×0."""
    report = ReadReport()
    table = read_table(raw.labels, range(6, 11))
    report.raw = len(table)
    images = zero_based_images(raw, report)
    fps = _frame_rate(raw, len(images), report)
    rows = _rows(table, raw, _class_names(raw))
    return assemble(raw, rows, images, report, dataset=DATASET, fps=fps), report


def _rows(table: np.ndarray, raw: RawSequence, names: tuple[str, ...]) -> Rows:
    columns = table.shape[1]
    frames = integer_column(table[:, 0], "frame number", raw.labels, at_least=1) - 1
    if len(table) and (table[:, 1] == -1).all():
        raise MotipError(
            "every id is -1: this is a file of detections, not of tracks",
            where=raw.labels,
            fix="use gt/gt.txt, not det/det.txt",
        )
    track_ids = integer_column(table[:, 1], "track id", raw.labels, at_least=0)
    numbers = np.ones(len(table), dtype=np.int64)
    if columns in (8, 9):
        numbers = integer_column(np.where(table[:, 7] == -1, 1, table[:, 7]), "class", raw.labels, at_least=1)
    lookup = {
        number: names[number - 1] if number <= len(names) else f"class {number}" for number in set(numbers.tolist())
    }
    return Rows(
        frames=frames,
        boxes_xyxy=table_boxes(table),
        track_ids=track_ids,
        categories=np.array([lookup[number] for number in numbers.tolist()], dtype=object),
        ignore=table[:, 6] == 0 if columns > 6 else np.zeros(len(table), dtype=bool),
        occlusion=_occlusion(table[:, 8]) if columns == 9 else np.zeros(len(table)),
        truncation=np.zeros(len(table)),
    )


def _occlusion(visibility: np.ndarray) -> np.ndarray:
    # Visibility is a share from 0 to 1; other values mean unknown (DanceTrack writes 1 everywhere).
    partly = (visibility >= 0) & (visibility < 0.75)
    return partly.astype(np.int8) + ((visibility >= 0) & (visibility < 0.25)).astype(np.int8)


def _class_names(raw: RawSequence) -> tuple[str, ...]:
    if raw.info is None:
        return CATEGORIES
    path = raw.info.parent / "gt" / "labels.txt"
    if not path.is_file():
        return CATEGORIES
    return tuple(line.strip() for line in path.read_bytes().decode().splitlines() if line.strip())


def _frame_rate(raw: RawSequence, images: int, report: ReadReport) -> float:
    if raw.info is None or not raw.info.is_file():
        if raw.fps is None:
            report.notes.append(f"{raw.name}: {NO_SEQINFO} {FPS}")
        return FPS
    fps, length = read_seqinfo(raw.info, {"frameRate": float, "seqLength": int}, fix="repair or remove it")
    if not fps > 0:
        raise MotipError("frameRate is not positive", where=raw.info, found=fps, fix="correct the rate")
    if images and length != images:
        count(report, WRONG_LENGTH)
        report.notes.append(f"{raw.name}: seqLength is {length}, but there are {images} images")
    return fps
