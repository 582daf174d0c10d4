"""Drawing of tracks on frames: box, id, class, score and trail in one colour per track id."""

from __future__ import annotations

import colorsys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

Colour = tuple[int, int, int]

FONT = cv2.FONT_HERSHEY_SIMPLEX
DARK: Colour = (0, 0, 0)
LIGHT: Colour = (255, 255, 255)
_GOLDEN_RATIO = 0.618033988749895
_SHADES = ((0.85, 1.0), (0.55, 1.0), (0.9, 0.78))
"""(saturation, value), cycled by track id, so that ids with similar hues still differ."""


@lru_cache(maxsize=4096)
def track_colour(track_id: int) -> Colour:
    """RGB of a track id: deterministic, and far from the colours of neighbouring ids."""
    hue = (track_id * _GOLDEN_RATIO + 0.55) % 1.0
    saturation, value = _SHADES[track_id % len(_SHADES)]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever has the higher contrast on ``background`` (WCAG 2.2 relative luminance)."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (c / 255 for c in background)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return DARK if (luminance + 0.05) ** 2 > 0.05 * 1.05 else LIGHT


@dataclass(frozen=True)
class DrawnTracks:
    """The boxes of one frame: ids (n,), boxes_xyxy (n, 4) in pixels, class_ids (n,), scores (n,)."""

    ids: np.ndarray
    boxes_xyxy: np.ndarray
    class_ids: np.ndarray
    scores: np.ndarray


class Painter:
    """Draws the frames of one video in order; keeps the last positions of each track for the trails.

    Args:
        class_names: names by class id.
        trail: length of a trail in frames; 0 disables trails.
    """

    def __init__(self, class_names: Sequence[str], trail: int = 30) -> None:
        self.class_names = class_names
        self._recent: deque[dict[int, tuple[int, int]]] = deque(maxlen=trail)

    def draw(self, image: np.ndarray, tracks: DrawnTracks, bar: str = "") -> np.ndarray:
        """A copy of ``image`` ((H, W, 3) uint8 RGB) with the tracks drawn on it and ``bar`` written along its top."""
        picture = image.copy()
        height, width = picture.shape[:2]
        weight = max(1, round(min(height, width) / 400))
        # H.264 (yuv420p) halves the chroma resolution, so lines of one pixel lose their colour: smallest images only.
        line = weight if min(height, width) < 200 else max(2, weight)
        boxes = in_pixels(tracks.boxes_xyxy, picture)
        ids = tracks.ids.tolist()
        # Trails: the lower middle of the box in the last frames.
        feet = {track_id: ((x0 + x1) // 2, y1) for track_id, (x0, _, x1, y1) in zip(ids, boxes, strict=True)}
        self._recent.append(feet)
        for track_id in ids:
            points = np.array([each[track_id] for each in self._recent if track_id in each], np.int32)
            if len(points) > 1:
                cv2.polylines(picture, [points], False, DARK, line + 2, cv2.LINE_AA)
                cv2.polylines(picture, [points], False, track_colour(track_id), line, cv2.LINE_AA)
        # Boxes: highest score last, so that it is on top.
        by_score = np.argsort(tracks.scores, kind="stable").tolist()
        for index in by_score:
            outlined_box(picture, boxes[index], track_colour(ids[index]), line)
        # Labels above the boxes, below the bar.
        ceiling = _draw_bar(picture, bar) if bar else 0
        for index in by_score:
            number, name = ids[index] + 1, self.class_names[int(tracks.class_ids[index])]
            texts = [f"{number} {name} {float(tracks.scores[index]):.2f}", f"{number} {name[:3]}", str(number)]
            draw_label(picture, boxes[index], texts, track_colour(ids[index]), weight, ceiling)
        return picture


def in_pixels(boxes_xyxy: np.ndarray, picture: np.ndarray) -> list[list[int]]:
    """Integer pixels, clipped to three times the picture's size, since OpenCV overflows on larger values."""
    height, width = picture.shape[:2]
    clipped = np.clip(boxes_xyxy, [-width, -height] * 2, [2 * width, 2 * height] * 2)
    pixels: list[list[int]] = np.round(clipped).astype(int).tolist()
    return pixels


def outlined_box(picture: np.ndarray, box: Sequence[int], colour: Colour, line: int) -> None:
    """Draw a rectangle (x0, y0, x1, y1); its dark outline keeps a bright box visible on a bright background."""
    for shade, width in ((DARK, line + 2), (colour, line)):
        cv2.rectangle(picture, box[:2], box[2:], shade, width)


def dashed_box(picture: np.ndarray, box: Sequence[int], colour: Colour, line: int) -> None:
    """Draw a dashed rectangle (x0, y0, x1, y1): at least two dashes per side, a dash at every corner.

    Args:
        line: thickness in pixels.
    """
    x0, y0, x1, y1 = box
    for sides in (((x0, y0), (x1, y0)), ((x0, y1), (x1, y1)), ((x0, y0), (x0, y1)), ((x1, y0), (x1, y1))):
        start, end = np.array(sides)
        # An odd number of equal parts, dash and gap alternating, so that a side begins and ends with a dash.
        parts = max(3, round(int(abs(end - start).max()) / max(6, 4 * line)) // 2 * 2 + 1)
        ends = np.round(start + (end - start) * np.arange(parts + 1)[:, None] / parts).astype(int).tolist()
        for shade, width in ((DARK, line + 2), (colour, line)):
            for part in range(0, parts, 2):
                cv2.line(picture, ends[part], ends[part + 1], shade, width)


def draw_label(
    picture: np.ndarray, box: Sequence[int], texts: Sequence[str], colour: Colour, weight: int, ceiling: int
) -> None:
    """Draw a label above the box: the first of ``texts`` that fits the box's width, else the last one.

    Args:
        texts: from long to short.
        weight: thickness of the letters in pixels.
        ceiling: y in pixels above which no label is drawn.
    """
    height, width = picture.shape[:2]
    x0, y0, x1, _ = box
    scale = max(0.35, min(height, width) / 1800)
    for text in texts:
        (text_width, text_height), below = cv2.getTextSize(text, FONT, scale, weight)
        if text_width <= 1.6 * (x1 - x0):
            break
    pad = weight + 1
    chip_height = text_height + below + 2 * pad
    left = min(max(x0, 0), max(width - text_width - 2 * pad, 0))
    top = y0 - chip_height if y0 - chip_height >= ceiling else max(y0, ceiling)
    cv2.rectangle(picture, (left, top), (left + text_width + 2 * pad, top + chip_height), colour, -1)
    corner = (left + pad, top + pad + text_height)
    cv2.putText(picture, text, corner, FONT, scale, text_colour(colour), weight, cv2.LINE_AA)


def fitted_text(text: str, width: int, scale: float, thickness: int) -> tuple[float, int, int]:
    """Font scale at which the text fits a strip of this width; the text's height and descent at the given scale."""
    (needed, tall), below = cv2.getTextSize(text, FONT, scale, thickness)
    if needed > width - 16:
        scale *= max(0.1, (width - 16) / needed)
    return scale, tall, below


def _draw_bar(picture: np.ndarray, text: str) -> int:
    """Draw one line of text on a darkened strip along the top; returns the strip's height in pixels."""
    height, width = picture.shape[:2]
    scale = max(0.35, min(height, width) / 1400)
    thickness = max(1, round(scale * 1.5))
    scale, tall, below = fitted_text(text, width, scale, thickness)
    strip = picture[: tall + below + 8]
    strip //= 3
    cv2.putText(picture, text, (8, tall + 4), FONT, scale, LIGHT, thickness, cv2.LINE_AA)
    return int(strip.shape[0])
