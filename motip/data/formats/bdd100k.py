"""BDD100K MOT: ``images/track/<split>/<video>/*.jpg``, ``labels/box_track_20/<split>/<video>.json``.

Labels are Scalabel JSON (doc.bdd100k.com, format): a list of frames with ``name``, ``videoName``, ``frameIndex`` and
``labels`` of ``id``, ``category``, ``attributes`` and ``box2d``, at 5 frames per second. The older release uses the
keys ``index``, ``Occluded``, ``Truncated``, ``Crowd``; both are read. A file may contain one video or all of them.
Ids are strings, unique within a video only; they are numbered by first appearance.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np

from motip.data.formats.common import (
    NO_IMAGE,
    UNLABELLED,
    RawSequence,
    Rows,
    build_sequence,
    check_images_match_labels,
    count,
    files_with,
    first_size,
    numbered_images,
    require_folder,
    subfolders,
    trailing_number,
)
from motip.data.sequence import ReadReport, Sequence
from motip.errors import MotipError
from motip.storage.paths import Location, size_and_time

DATASET = "bdd100k"
FPS = 5.0
SIZE = (1280, 720)
"""(width, height) of all BDD100K videos; used without images."""

OLD_KEY = "old key names (index, Occluded, Truncated, Crowd) read"
FROM_NAME = "no frameIndex: frame number taken from the image name"
OUT_OF_ORDER = "label frames out of order, sorted by number"
NULL_LABELS = "frame with missing or null labels, taken as a frame without objects"
TWICE = "frame listed twice (the first is kept)"


def list_sequences(root: Location, split: str) -> list[RawSequence]:
    """Videos of a split that have labels, sorted by name."""
    images = root / "images" / "track" / split
    labels = root / "labels" / "box_track_20" / split
    fix = "set the source's root to the folder that contains images/track and labels/box_track_20"
    require_folder(images, f"the BDD100K images of split {split!r}", fix)
    require_folder(labels, f"the BDD100K box-track labels of split {split!r}", fix)
    folders = {item.name: item for item in subfolders(images)}
    files = files_with(labels, ".json")
    if not folders or not files:
        raise MotipError(
            f"the BDD100K split {split!r} is empty",
            where=images if not folders else labels,
            expected="one folder of frames per video" if not folders else "Scalabel JSON files",
            fix="unpack images and labels of the tracking release (MOT 2020) here",
        )
    by_video = {item.stem: item for item in files if item.stem in folders}
    for item in files:
        if item.stem not in folders:
            by_video |= {video: item for video in _videos(item) if video in folders}
    unlabelled = sorted(set(folders) - set(by_video))
    if unlabelled:
        raise MotipError(
            f"{len(unlabelled)} of {len(folders)} videos have no labels, such as {unlabelled[0]}",
            where=labels,
            expected=f"{unlabelled[0]}.json",
            fix="use images and labels of the same release; remove folders of frames without labels",
        )
    return [RawSequence(name, split, by_video[name], folders[name]) for name in folders]


def read_sequence(raw: RawSequence) -> tuple[Sequence, ReadReport]:
    """Read one video; without an image folder the size is BDD100K's 1280×720."""
    report = ReadReport()
    listed = _videos(raw.labels).get(raw.name)
    if listed is None:
        raise MotipError(f"no frames of video {raw.name}", where=raw.labels, fix="download the labels of this video")
    numbers, frames = _number_frames(raw, listed, report)
    rows, names = _rows(raw, numbers, frames, report)
    images = _images(raw, numbers, frames, report)
    size = SIZE if raw.images is None else first_size(images, raw.images)
    if raw.images is not None:
        rows = rows.keep(np.isin(rows.frames, list(images)), NO_IMAGE, report)
        count(report, "label frame without an image, left out", len(set(numbers) - set(images)))
        numbers = [number for number in numbers if number in images]
    sequence = build_sequence(raw, rows, numbers, images, size, report, dataset=DATASET, fps=FPS, track_names=names)
    return sequence, report


def _videos(path: Location) -> dict[str, list[dict[str, Any]]]:
    """Label frames by video name; frames without one belong to the video that the file is named after."""
    return _parse(path, size_and_time(path))


# Cached, since one file may contain every video of a split. ``stamp`` invalidates the entry of a modified file.
@functools.lru_cache(maxsize=2)
def _parse(path: Location, stamp: object) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as error:
        raise MotipError(f"not a JSON file: {error}", where=path, fix="download the labels again") from error
    frames = content.get("frames") if isinstance(content, dict) else content
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise MotipError(
            "not a Scalabel label file",
            where=path,
            expected="a list of frames, or an object with `frames`",
            fix="use the labels of box_track_20",
        )
    keys = {key for frame in frames[:50] for key in frame}
    if frames and not keys & {"videoName", "video_name", "frameIndex", "index"}:
        raise MotipError(
            "these are labels of single images: no frame has a video name or a frame number",
            where=path,
            found=", ".join(sorted(keys)),
            expected="videoName and frameIndex",
            fix="use the tracking labels (box_track_20), not det_20 or the 100K image labels",
        )
    videos: dict[str, list[dict[str, Any]]] = {}
    for frame in frames:
        videos.setdefault(str(frame.get("videoName") or frame.get("video_name") or path.stem), []).append(frame)
    return videos


def _number_frames(
    raw: RawSequence, listed: list[dict[str, Any]], report: ReadReport
) -> tuple[list[int], list[dict[str, Any]]]:
    """Frame numbers, ascending, and the label frames in that order."""
    by_number: dict[int, dict[str, Any]] = {}
    order: list[int] = []
    for frame in listed:
        number = _frame_number(raw, frame, report)
        report.raw += len(frame.get("labels") or ())
        if number in by_number:
            report.dropped[TWICE] += len(frame.get("labels") or ())
            count(report, TWICE)
            continue
        by_number[number] = frame
        order.append(number)
    numbers = sorted(order)
    count(report, OUT_OF_ORDER, sum(a != b for a, b in zip(numbers, order, strict=True)))
    count(report, "frame number missing from the labels, left out", numbers[-1] - numbers[0] + 1 - len(numbers))
    return numbers, [by_number[number] for number in numbers]


def _frame_number(raw: RawSequence, frame: dict[str, Any], report: ReadReport) -> int:
    number = frame.get("frameIndex")
    if number is None and frame.get("index") is not None:
        number = frame["index"]
        count(report, OLD_KEY)
    if number is None:
        counted = trailing_number(str(frame.get("name", "")).rpartition(".")[0])
        if counted is None:
            raise MotipError(
                "a label frame has neither frameIndex nor a numbered name",
                where=raw.labels,
                found=f"name {frame.get('name')!r}, video {raw.name}",
                fix="repair the label file",
            )
        count(report, FROM_NAME)
        number = counted - 1
    if not isinstance(number, int) or number < 0:
        raise MotipError(
            "frameIndex is not an integer >= 0", where=raw.labels, found=number, fix="repair the label file"
        )
    return number


def _rows(
    raw: RawSequence, numbers: list[int], frames: list[dict[str, Any]], report: ReadReport
) -> tuple[Rows, tuple[str, ...]]:
    """Label rows, and the original id string of each track id."""
    # Columns of valid labels.
    ids: dict[str, int] = {}
    columns: dict[str, list[Any]] = {name: [] for name in Rows.__dataclass_fields__}
    for number, frame in zip(numbers, frames, strict=True):
        if frame.get("labels") is None:
            count(report, NULL_LABELS)
        for label in frame.get("labels") or ():
            box = label.get("box2d")
            missing = next((key for key in ("box2d", "category", "id") if label.get(key) is None), None)
            if missing or not isinstance(box, dict) or any(box.get(key) is None for key in ("x1", "y1", "x2", "y2")):
                report.dropped[f"label without {missing or 'whole box2d'}"] += 1
                continue
            attributes = label.get("attributes") or {}
            if attributes.keys() & {"Occluded", "Truncated", "Crowd"}:
                count(report, OLD_KEY)
            columns["frames"].append(number)
            columns["boxes_xyxy"].append([box["x1"], box["y1"], box["x2"], box["y2"]])
            columns["track_ids"].append(ids.setdefault(str(label["id"]), len(ids)))
            columns["categories"].append(str(label["category"]))
            columns["ignore"].append(_flag(attributes, "crowd"))
            columns["occlusion"].append(_flag(attributes, "occluded"))
            columns["truncation"].append(_flag(attributes, "truncated"))
    # Arrays.
    try:
        boxes = np.array(columns.pop("boxes_xyxy"), dtype=np.float64).reshape(-1, 4)
    except (TypeError, ValueError) as error:
        raise MotipError(f"a box2d value is not a number: {error}", where=raw.labels, fix="repair the file") from error
    categories = np.array(columns.pop("categories"), dtype=object)
    numbers_and_flags = {name: np.array(values, dtype=np.int64) for name, values in columns.items()}
    return Rows(boxes_xyxy=boxes, categories=categories, **numbers_and_flags), tuple(ids)


def _flag(attributes: dict[str, Any], name: str) -> bool:
    """A boolean attribute, in the spelling of either release."""
    value = attributes.get(name, attributes.get(name.capitalize(), False))
    return str(value).lower() in ("true", "1", "1.0")


def _images(
    raw: RawSequence, numbers: list[int], frames: list[dict[str, Any]], report: ReadReport
) -> dict[int, Location]:
    """Image of each label frame: by the label's ``name``, else by number (image names count from 1)."""
    if raw.images is None:
        return {}
    on_disk = numbered_images(raw.images, report)
    if not on_disk:
        raise MotipError(
            f"video {raw.name} has no images", where=raw.images, fix="download its frames, or remove the folder"
        )
    by_name = {image.name: image for image in on_disk.values()}
    first = 0 if 0 in on_disk else 1
    found: dict[int, Location] = {}
    for number, frame in zip(numbers, frames, strict=True):
        name = str(frame.get("name") or "").rpartition("/")[2]
        if name in by_name:
            found[number] = by_name[name]
        elif number + first in on_disk:
            found[number] = on_disk[number + first]
            count(report, "image found by number, not by the label's name")
    if not found:
        labelled = Rows(np.array(numbers), *(np.zeros(0) for _ in range(6)))
        check_images_match_labels(labelled, {number - first: image for number, image in on_disk.items()}, raw)
    count(report, UNLABELLED, len(on_disk) - len({str(image) for image in found.values()}))
    return found
