"""VisDrone-MOT: ``sequences/<seq>/0000001.jpg``, ``annotations/<seq>.txt`` with 10 columns.

Columns: frame, track id, left, top, width, height, score, category, truncation, occlusion
(github.com/VisDrone/VisDrone2018-MOT-toolkit, README). Frames count from 1. Score 0 marks a box that evaluation
ignores; category 0 is an ignored region, 11 is "others".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from motip.data.formats.common import (
    RawSequence,
    Rows,
    assemble,
    files_with,
    integer_column,
    read_table,
    require_folder,
    subfolders,
    table_boxes,
    zero_based_images,
)
from motip.data.sequence import UNTRACKED, ReadReport, Sequence
from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.storage.paths import Location

DATASET = "visdrone"
FPS = 30.0
"""VisDrone does not state a rate; its videos play at about 30 frames per second. `fps` of the source overrides it."""

CATEGORIES = (
    "ignored-regions",
    "pedestrian",
    "people",
    "bicycle",
    "car",
    "van",
    "truck",
    "tricycle",
    "awning-tricycle",
    "bus",
    "motor",
    "others",
)
IGNORED_REGION, OTHERS = 0, 11


def list_sequences(root: Location, split: str) -> list[RawSequence]:
    """Sequences of ``VisDrone2019-MOT-<split>`` under ``root``, or of ``root`` itself if it contains ``sequences``."""
    base = _split_folder(root, split)
    require_folder(base / "annotations", "the folder of annotations", "unpack the complete VisDrone-MOT archive")
    labels = {item.stem: item for item in files_with(base / "annotations", ".txt")}
    folders = {item.name: item for item in subfolders(base / "sequences")}
    if not folders:
        raise MotipError(
            f"VisDrone split {split!r} has no sequences",
            where=base / "sequences",
            expected="one folder of frames per sequence",
            fix="unpack the archive of this split here, or correct the source's root",
        )
    unlabelled = sorted(set(folders) - set(labels))
    if unlabelled:
        raise MotipError(
            f"{len(unlabelled)} of {len(folders)} sequences have no annotations, such as {unlabelled[0]}",
            where=base / "annotations",
            expected=f"{unlabelled[0]}.txt",
            fix="download the annotations of this split, or remove the folders of frames without them",
        )
    return [RawSequence(name, split, labels[name], folders[name]) for name in folders]


def _split_folder(root: Location, split: str) -> Location:
    tried = [root / f"VisDrone2019-MOT-{split}", root / split, root]
    for folder in tried:
        if (folder / "sequences").is_dir():
            return folder
    raise MotipError(
        f"no VisDrone-MOT data for the split {split!r}",
        where=root,
        expected=f"VisDrone2019-MOT-{split}/sequences and …/annotations",
        fix="set the source's root to the folder that contains VisDrone2019-MOT-train and -val, "
        "or unpack the archives there",
    )


def read_sequence(raw: RawSequence) -> tuple[Sequence, ReadReport]:
    """Read one sequence; without an image folder the size is 0×0."""
    report = ReadReport()
    det = MotipError(
        "this is a VisDrone-DET file (8 columns: single images, no frame and no track id), not a MOT file",
        where=raw.labels,
        expected="10 columns: frame, id, left, top, width, height, score, category, truncation, occlusion",
        fix="download the VisDrone-MOT archives (VisDrone2019-MOT-train.zip, -val, -test-dev)",
    )
    table = read_table(raw.labels, range(10, 11), {8: det})
    report.raw = len(table)
    images = zero_based_images(raw, report)
    return assemble(raw, _rows(table, raw.labels), images, report, dataset=DATASET, fps=FPS), report


def _rows(table: np.ndarray, path: object) -> Rows:
    frames = integer_column(table[:, 0], "frame number", path, at_least=1) - 1
    track_ids = integer_column(table[:, 1], "track id", path, at_least=-1)
    numbers = integer_column(table[:, 7], "category", path, at_least=0)
    if numbers.size and numbers.max() >= len(CATEGORIES):
        raise MotipError(
            f"unknown VisDrone category {numbers.max()}",
            where=path,
            expected=f"0..{len(CATEGORIES) - 1}",
            fix="check the columns: the category is the eighth",
        )
    is_region = numbers == IGNORED_REGION
    return Rows(
        frames=frames,
        boxes_xyxy=table_boxes(table),
        # All regions have id 0 (or -1) and no identity.
        track_ids=np.where(is_region | (track_ids < 0), UNTRACKED, track_ids),
        categories=np.array(CATEGORIES, dtype=object)[numbers],
        ignore=is_region | (numbers == OTHERS) | (table[:, 6] == 0),
        occlusion=np.clip(np.nan_to_num(table[:, 9]), 0, 2),
        truncation=np.clip(np.nan_to_num(table[:, 8]), 0, 1),
    )
