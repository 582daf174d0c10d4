"""Label overlays: one PNG per source with 20 frames, their boxes, classes, track ids and ignore regions."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import cv2
import numpy as np

from motip.data.manifest import Manifest, VideoEntry, entry_path
from motip.data.sequence import ClassMap, Frame
from motip.data.shards import read_frames
from motip.errors import MotipError
from motip.storage.paths import Location, write_bytes

if TYPE_CHECKING:
    from motip.config import Curriculum

TILES = 20
COLUMNS = 4
TILE_WIDTH = 640
_CAPTION_HEIGHT = 22
IGNORED = (110, 110, 110)
"""Grey: regions that are neither object nor background."""
_CLASS_COLOURS = ((60, 200, 255), (255, 170, 60), (120, 230, 120), (230, 120, 230), (90, 90, 255), (230, 230, 90))
"""BGR, by class id."""


def write_overlays(manifest: Manifest, curriculum: Curriculum, storage: Location) -> dict[str, str]:
    """Write ``shards/<source>_overlay.png`` for every source with videos; returns the paths by source."""
    written = {}
    for name, source in curriculum.sources.items():
        entries = [entry for entry in manifest.videos if entry.source == name]
        if not entries:
            continue
        class_map = ClassMap(tuple(source.classes), source.classes)
        path = storage / "shards" / f"{name}_overlay.png"
        tiles = [_tile(storage, *chosen, class_map) for chosen in _evenly_spaced_frames(entries, TILES)]
        write_bytes(path, _tile_png(tiles))
        written[name] = str(path)
    return written


def _evenly_spaced_frames(entries: SequenceOf[VideoEntry], count: int) -> list[tuple[VideoEntry, int]]:
    """``count`` (video, position) pairs spaced evenly over all frames of all videos; deterministic."""
    ends = np.cumsum([entry.frames for entry in entries])
    total = int(ends[-1])
    count = min(count, total)
    positions = [(2 * index + 1) * total // (2 * count) for index in range(count)]
    videos = np.searchsorted(ends, positions, side="right")
    return [(entries[v], int(p - (ends[v] - entries[v].frames))) for v, p in zip(videos, positions, strict=True)]


def _draw_labels(image: np.ndarray, frame: Frame, class_map: ClassMap, scale: float) -> None:
    """Draw a frame's labels in place on ``image`` ((H, W, 3) uint8 BGR, ``scale`` times the labelled image's size)."""
    class_ids = class_map.class_ids(frame.categories)
    boxes = np.round(frame.boxes_xyxy * scale).astype(int)
    trained = (class_ids >= 0) & ~frame.ignore & (frame.track_ids >= 0)
    shade = image.copy()
    for x0, y0, x1, y1 in boxes[~trained].tolist():
        cv2.rectangle(shade, (x0, y0), (x1, y1), IGNORED, -1)
    cv2.addWeighted(shade, 0.5, image, 0.5, 0, dst=image)
    for index, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        if trained[index]:
            colour = _CLASS_COLOURS[int(class_ids[index]) % len(_CLASS_COLOURS)]
            text = f"{class_map.names[int(class_ids[index])][:4]} {int(frame.track_ids[index])}"
        else:
            colour, text = IGNORED, f"ignore: {frame.categories[index]}"
        cv2.rectangle(image, (x0, y0), (x1, y1), colour, 1)
        cv2.putText(image, text, (max(x0, 0), max(y0 - 3, 9)), cv2.FONT_HERSHEY_PLAIN, 0.8, colour, 1, cv2.LINE_AA)


def _tile(storage: Location, entry: VideoEntry, position: int, class_map: ClassMap) -> np.ndarray:
    frame = read_frames(entry_path(storage, entry), [position])[0]
    assert isinstance(frame.image, bytes)
    decoded = cv2.imdecode(np.frombuffer(frame.image, np.uint8), cv2.IMREAD_COLOR)
    if decoded is None:
        raise MotipError(
            f"frame {position} of {entry.video} does not decode",
            where=entry_path(storage, entry),
            fix="delete the shard and run the conversion again",
        )
    scale = TILE_WIDTH / decoded.shape[1]
    image = cv2.resize(decoded, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    _draw_labels(image, frame, class_map, scale)
    caption = np.zeros((_CAPTION_HEIGHT, image.shape[1], 3), np.uint8)
    text = f"{entry.split}/{entry.sequence} frame {frame.number}: {len(frame.categories)} boxes"
    cv2.putText(caption, text, (6, 16), cv2.FONT_HERSHEY_PLAIN, 1.0, (255, 255, 255), 1, cv2.LINE_AA)
    return np.concatenate([caption, image])


def _tile_png(tiles: SequenceOf[np.ndarray]) -> bytes:
    """PNG of tiles in rows of ``COLUMNS``, each row as high as its highest tile."""
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
