"""One picture per source: 20 frames with boxes, classes, ids and ignore regions, so that wrong labels are seen."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import cv2
import numpy as np

from motip.data.manifest import Manifest, VideoEntry, entry_path
from motip.data.sequence import ClassMap, Frame
from motip.data.shards import read_frames
from motip.errors import MotipError
from motip.storage.paths import Location, write_bytes

TILES = 20
COLUMNS = 4
TILE_WIDTH = 640
CAPTION_HEIGHT = 22
IGNORED = (110, 110, 110)
"""Grey: regions that are neither object nor background."""
CLASS_COLOURS = ((60, 200, 255), (255, 170, 60), (120, 230, 120), (230, 120, 230), (90, 90, 255), (230, 230, 90))
"""BGR, by class id."""


def write_overlays(manifest: Manifest, curriculum: Any, storage: Location) -> dict[str, str]:
    """Write ``shards/<source>_overlay.png`` for every source with videos; returns the paths by source."""
    written = {}
    for name, source in curriculum.sources.items():
        entries = [entry for entry in manifest.videos if entry.source == name]
        if not entries:
            continue
        class_map = ClassMap(tuple(source.classes), source.classes)
        path = storage / "shards" / f"{name}_overlay.png"
        write_bytes(path, sheet([_tile(storage, *place, class_map) for place in spread(entries, TILES)]))
        written[name] = str(path)
    return written


def spread(entries: SequenceOf[VideoEntry], count: int) -> list[tuple[VideoEntry, int]]:
    """``count`` (video, position) places spread evenly over all frames of all videos, always the same ones."""
    ends = np.cumsum([entry.frames for entry in entries])
    total = int(ends[-1])
    count = min(count, total)
    places = [(2 * index + 1) * total // (2 * count) for index in range(count)]
    videos = np.searchsorted(ends, places, side="right")
    return [(entries[v], int(p - (ends[v] - entries[v].frames))) for v, p in zip(videos, places, strict=True)]


def draw_labels(picture: np.ndarray, frame: Frame, class_map: ClassMap, scale: float) -> None:
    """Draw a frame's labels on ``picture`` ((H, W, 3) uint8 BGR, ``scale`` times the labels' pixels) in place."""
    class_ids = class_map.class_ids(frame.categories)
    boxes = np.round(frame.boxes_xyxy * scale).astype(int)
    learned = (class_ids >= 0) & ~frame.ignore & (frame.track_ids >= 0)
    shade = picture.copy()
    for x0, y0, x1, y1 in boxes[~learned].tolist():
        cv2.rectangle(shade, (x0, y0), (x1, y1), IGNORED, -1)
    cv2.addWeighted(shade, 0.5, picture, 0.5, 0, dst=picture)
    for index, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        if learned[index]:
            colour = CLASS_COLOURS[int(class_ids[index]) % len(CLASS_COLOURS)]
            text = f"{class_map.names[int(class_ids[index])][:4]} {int(frame.track_ids[index])}"
        else:
            colour, text = IGNORED, f"ignore: {frame.categories[index]}"
        cv2.rectangle(picture, (x0, y0), (x1, y1), colour, 1)
        cv2.putText(picture, text, (max(x0, 0), max(y0 - 3, 9)), cv2.FONT_HERSHEY_PLAIN, 0.8, colour, 1, cv2.LINE_AA)


def _tile(storage: Location, entry: VideoEntry, position: int, class_map: ClassMap) -> np.ndarray:
    frame = read_frames(entry_path(storage, entry), [position])[0]
    assert isinstance(frame.image, bytes)
    decoded = cv2.imdecode(np.frombuffer(frame.image, np.uint8), cv2.IMREAD_COLOR)
    if decoded is None:
        raise MotipError(
            f"frame {position} of {entry.video} does not decode", where=entry_path(storage, entry),
            fix="delete the shard and run the conversion again",
        )  # fmt: skip
    scale = TILE_WIDTH / decoded.shape[1]
    picture = cv2.resize(decoded, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    draw_labels(picture, frame, class_map, scale)
    caption = np.zeros((CAPTION_HEIGHT, picture.shape[1], 3), np.uint8)
    text = f"{entry.split}/{entry.sequence} frame {frame.number}: {len(frame.categories)} boxes"
    cv2.putText(caption, text, (6, 16), cv2.FONT_HERSHEY_PLAIN, 1.0, (255, 255, 255), 1, cv2.LINE_AA)
    return np.concatenate([caption, picture])


def sheet(tiles: SequenceOf[np.ndarray]) -> bytes:
    """PNG of tiles in rows of four, each row as high as its highest tile."""
    rows = []
    for start in range(0, len(tiles), COLUMNS):
        row = tiles[start : start + COLUMNS]
        height = max(tile.shape[0] for tile in row)
        padded = [
            cv2.copyMakeBorder(tile, 0, height - tile.shape[0], 0, TILE_WIDTH - tile.shape[1], cv2.BORDER_CONSTANT)
            for tile in row
        ]
        missing = min(COLUMNS, len(tiles)) - len(row)
        padded += [np.zeros((height, TILE_WIDTH, 3), np.uint8)] * missing
        rows.append(np.concatenate(padded, axis=1))
    _, encoded = cv2.imencode(".png", np.concatenate(rows))
    return encoded.tobytes()
