"""Side-by-side video: the tracks of one sequence by each stage, tiled, with a caption above every tile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from motip.data.sequence import TrackRows
from motip.errors import MotipError
from motip.report.drawing import DrawnTracks, Painter
from motip.report.failure_drawing import caption_bar
from motip.report.video_writer import VideoWriter

TILE_WIDTH = 640
"""Pixels; a video of two such tiles side by side plays smoothly in a browser."""
_TRAIL = 30
STRIP = 30
"""Height in pixels of the caption above each tile."""
CRF = 26
"""Half the bytes at slightly lower quality: the videos are also logged to MLflow."""


@dataclass(frozen=True)
class Tile:
    """One stage's tracks of the sequence.

    Attributes:
        caption: text above the tile, followed by the number of boxes and the frame.
        class_names: names of the class ids in ``rows``.
    """

    caption: str
    rows: TrackRows
    class_names: Sequence[str]


@dataclass(frozen=True)
class SideBySide:
    """A written video: its number of frames, and the frame with most boxes, (H, W, 3) uint8 RGB."""

    frames: int
    poster: np.ndarray


def columns_of(tiles: int) -> int:
    """Tiles per row: one for one tile, two for up to four, then the nearest to a square."""
    return min(tiles, 2) if tiles <= 4 else math.ceil(math.sqrt(tiles))


def write_side_by_side(
    frames: Iterable[tuple[int, np.ndarray]],
    tiles: Sequence[Tile],
    output: Path,
    fps: float,
    tile_width: int = TILE_WIDTH,
) -> SideBySide:
    """Draw the tracks of every tile on each frame and write ``output`` (.mp4).

    Args:
        frames: (0-based frame number, (H, W, 3) uint8 RGB) in order, all of one size.
        fps: frames per second of the sequence.
        tile_width: pixels; frames are resized to it before drawing, so that lines and labels have one size.

    Raises:
        MotipError: no tile, no frame, no H.264 encoder, or a folder that cannot be written. No file is left behind.
    """
    if not tiles:
        raise MotipError("there are no tracks to show side by side")
    painters = [Painter(tile.class_names, _TRAIL) for tile in tiles]
    columns = columns_of(len(tiles))
    most_boxes, poster = -1, np.zeros((1, 1, 3), np.uint8)
    with VideoWriter(output, Fraction(fps).limit_denominator(1001), CRF) as writer:
        for number, image in frames:
            scale = tile_width / image.shape[1]
            # Both even, as the encoder requires for the tiled picture.
            size = (tile_width - tile_width % 2, 2 * max(1, round(image.shape[0] * scale / 2)))
            resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
            zoom = np.tile(np.array(size) / (image.shape[1], image.shape[0]), 2)
            # One picture per tile.
            pictures, boxes = [], 0
            for tile, painter in zip(tiles, painters, strict=True):
                rows, own = tile.rows, tile.rows.frames == number
                drawn = DrawnTracks(
                    rows.track_ids[own], rows.boxes_xyxy[own] * zoom, rows.class_ids[own], rows.scores[own]
                )
                caption = f"{tile.caption}   {len(drawn.ids)} boxes   frame {number + 1}"
                boxes += len(drawn.ids)
                pictures.append(np.vstack([caption_bar(caption, size[0], STRIP, 0.62), painter.draw(resized, drawn)]))
            picture = tiled(pictures, columns)
            writer.write(picture)
            if boxes > most_boxes:
                most_boxes, poster = boxes, picture
        if not writer.frames:
            raise MotipError("the sequence has no frames", where=output.name)
    return SideBySide(writer.frames, poster)


def tiled(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures of one size in rows of ``columns``; unused tiles are black."""
    empty = np.zeros_like(pictures[0])
    padded = [*pictures, *[empty] * (-len(pictures) % columns)]
    return np.vstack([np.hstack(padded[start : start + columns]) for start in range(0, len(padded), columns)])
