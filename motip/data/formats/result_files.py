"""Result files: MOTChallenge rows, BDD100K (Scalabel) JSON and VisDrone's 10 columns.

Frames, ids and classes count from 1 on disk (MOTChallenge, VisDrone) and from 0 in memory. A file that counts from 0
is an error: read with an offset, it would lower the tracker's scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from motip.data.formats.common import integer_column, read_table, table_boxes, write_lines
from motip.data.sequence import TrackRows
from motip.errors import MotipError
from motip.storage.atomic import atomic_write


def write_mot(path: Path | str, rows: TrackRows) -> None:
    """Write ``frame,id,x,y,w,h,score,class,-1``, 1-based frame, id and class, sorted by frame and id."""
    write_lines(path, [f"{line},-1" for line in _lines(rows, rows.class_ids + 1)])


def read_mot(path: Path | str, *, default_class: int | None = None) -> TrackRows:
    """Read MOTChallenge rows of 6 to 10 columns.

    Args:
        default_class: 0-based class of rows without one: fewer than 8 columns, 10 columns (MOT15: the last three are
            a position), or class -1. None: such rows are an error.

    Raises:
        MotipError: frames, ids or classes below 1, or another table.
    """
    path = Path(path)
    if not path.is_file():
        raise MotipError("no such file of tracks", where=path)
    table = read_table(path, range(6, 11))
    scores = table[:, 6] if table.shape[1] > 6 else np.ones(len(table))
    named = table[:, 7] if table.shape[1] in (8, 9) else np.full(len(table), -1.0)
    if (named == -1).any():
        if default_class is None:
            raise MotipError(
                "rows without a class",
                where=path,
                expected="9 columns: frame,id,x,y,w,h,score,class,-1",
                fix="write the class (1-based), or give the class of such rows",
            )
        named = np.where(named == -1, default_class + 1, named)
    classes = integer_column(named, "class", path, at_least=1) - 1
    rows = TrackRows(
        integer_column(table[:, 0], "frame number", path, at_least=1) - 1,
        integer_column(table[:, 1], "track id", path, at_least=1) - 1,
        table_boxes(table).astype(np.float32),
        np.where(scores == -1, 1.0, scores).astype(np.float32),
        classes,
    )
    _check_rows(rows, path)
    order = np.argsort(rows.frames, kind="stable")
    return TrackRows(*(getattr(rows, each.name)[order] for each in fields(rows)))


def write_visdrone(path: Path | str, rows: TrackRows, categories: SequenceOf[int]) -> None:
    """Write VisDrone's 10 columns, with truncation and occlusion -1 as in its result format.

    Args:
        categories: VisDrone's category number (1..10) of each class.
    """
    if not all(1 <= number <= 10 for number in categories) or len(set(categories)) != len(categories):
        raise MotipError(
            "VisDrone results have categories 1 to 10, each for one class",
            where=path,
            found=list(categories),
            fix="0 (ignored regions) and 11 (others) are never predicted",
        )
    numbers = np.asarray(categories, np.int64)[rows.class_ids] if len(rows) else rows.class_ids
    write_lines(path, [f"{line},-1,-1" for line in _lines(rows, numbers)])


def write_bdd100k(
    path: Path | str,
    videos: Mapping[str, TrackRows],
    class_names: SequenceOf[str],
    frame_numbers: Mapping[str, Iterable[int]] | None = None,
) -> None:
    """Write Scalabel tracking JSON: frames with ``name``, ``videoName``, ``frameIndex`` (0-based) and ``labels``.

    Args:
        videos: video name to tracks.
        frame_numbers: all frames of each video; the benchmark requires frames without tracks as well.
    """
    frames = []
    for video in sorted(videos):
        rows = videos[video]
        _check_rows(rows, path)
        numbers = set(rows.frames.tolist()) | set((frame_numbers or {}).get(video, ()))
        by_frame: dict[int, list[dict[str, Any]]] = {int(number): [] for number in sorted(numbers)}
        for index in np.lexsort((rows.track_ids, rows.frames)):
            x1, y1, x2, y2 = (float(value) for value in rows.boxes_xyxy[index])
            by_frame[int(rows.frames[index])].append(
                {
                    "id": str(int(rows.track_ids[index]) + 1),
                    "category": class_names[int(rows.class_ids[index])],
                    "score": float(rows.scores[index]),
                    "box2d": {"x1": x1, "y1": y1, "x2": x2, "y2": y2},
                }
            )
        for number, labels in by_frame.items():
            name = f"{video}-{number + 1:07d}.jpg"
            frames.append({"name": name, "videoName": video, "frameIndex": number, "labels": labels})
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(frames, indent=1) + "\n")


def _check_rows(rows: TrackRows, path: object) -> None:
    """Raise MotipError for rows that could not be read back: negative numbers, non-finite boxes or scores."""
    for what, values in (("frame", rows.frames), ("id", rows.track_ids), ("class", rows.class_ids)):
        if len(values) and values.min() < 0:
            raise MotipError(f"a {what} number is negative", where=path, found=values.min(), expected="0-based numbers")
    if not (np.isfinite(rows.boxes_xyxy).all() and np.isfinite(rows.scores).all()):
        raise MotipError("a box or score is not a finite number", where=path, fix="this is a defect of the tracker")


def _lines(rows: TrackRows, classes: np.ndarray) -> list[str]:
    _check_rows(rows, "track rows")
    boxes = rows.boxes_xyxy.astype(np.float64)
    sizes = boxes[:, 2:] - boxes[:, :2]
    return [
        f"{rows.frames[i] + 1},{rows.track_ids[i] + 1},{boxes[i, 0]:.4f},{boxes[i, 1]:.4f},"
        f"{sizes[i, 0]:.4f},{sizes[i, 1]:.4f},{rows.scores[i]:.6f},{classes[i]}"
        for i in np.lexsort((rows.track_ids, rows.frames))
    ]
