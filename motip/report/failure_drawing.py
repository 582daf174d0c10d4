"""Drawing of matched boxes on frames, for the failure videos and the contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from motip.report.drawing import FONT, LIGHT, Colour, dashed_box, draw_label, fitted_text, in_pixels, outlined_box
from motip.report.failure_segments import FALSE, IGNORED, KINDS, MISSED, SWITCH, TRACKED, BoxAnnotation

COLOURS: dict[str, Colour] = {
    TRACKED: (0, 190, 90),
    MISSED: (50, 130, 255),
    SWITCH: (255, 150, 0),
    FALSE: (230, 20, 60),
    IGNORED: (160, 160, 160),
}
_LEGEND = {MISSED: "missed (dashed)", SWITCH: "identity switch: id before -> after"}
GROUND: Colour = (24, 24, 24)
LEGEND_HEIGHT = 34

_WORTH_A_ZOOM = 1.2
_LABEL_FROM = {SWITCH: 0, FALSE: 14, TRACKED: 14, MISSED: 45, IGNORED: 45}
"""Smallest width of a box that gets a label, in multiples of the line width."""

_READABLE_PX = 22.0
"""Target side of the wrong boxes in a zoomed tile, in pixels."""


@dataclass(frozen=True)
class View:
    """Crop of an image, (x, y, width, height) in its pixels, and the size in pixels it is resized to."""

    x: int
    y: int
    width: int
    height: int
    shown_width: int
    shown_height: int

    def boxes(self, boxes_xyxy: np.ndarray) -> np.ndarray:
        """(N, 4) xyxy boxes from image pixels to view pixels."""
        scale = np.array([self.shown_width / self.width, self.shown_height / self.height] * 2)
        scaled: np.ndarray = (np.asarray(boxes_xyxy, np.float64) - [self.x, self.y] * 2) * scale
        return scaled


def full_view(width: int, height: int) -> View:
    """View of the full image: small images are enlarged to about 960 pixels, large ones reduced to 1920."""
    scale = max(1, round(960 / width)) if width < 960 else min(1, 1920 / width)
    return View(0, 0, width, height, 2 * round(width * scale / 2), 2 * round(height * scale / 2))


def zoomed_view(width: int, height: int, shown: tuple[int, int], annotations: Sequence[BoxAnnotation]) -> View:
    """Crop of an image with the most wrong boxes in it, resized to fit ``shown`` (width, height).

    Small boxes are enlarged up to four times; the aspect ratio is kept.
    """
    size = np.array([width, height])
    scale = float((shown / size).min())
    # Zoom by the median side of the wrong boxes.
    boxes = [each.box for each in annotations if each.kind in (MISSED, FALSE, SWITCH)]
    wrong = np.array(boxes, np.float64).reshape(-1, 4)
    if len(wrong):
        sides = np.sqrt(np.maximum((wrong[:, 2:] - wrong[:, :2]).prod(axis=1), 1.0))
        zoom = float(np.clip(_READABLE_PX / (np.median(sides) * scale), 1.0, 4.0))
        scale *= 1.0 if zoom < _WORTH_A_ZOOM else zoom
    # At zoom 1 the full image fits; the tile may be larger than it on one side and is then padded.
    crop, corner = np.minimum(np.array(shown) / scale, size), np.zeros(2)
    if len(wrong):
        # Of the crops centred on a wrong box, the one with the most wrong boxes.
        centres = (wrong[:, :2] + wrong[:, 2:]) / 2
        corners = np.clip(centres - crop / 2, 0, size - crop)
        inside = (centres >= corners[:, None]) & (centres <= corners[:, None] + crop)
        corner = corners[inside.all(axis=2).sum(axis=1).argmax()]
    part = np.maximum(np.round(crop), 1).astype(int)
    x, y = np.minimum(corner.astype(int), size - part).tolist()
    return View(x, y, *part.tolist(), *np.maximum(np.round(part * scale), 1).astype(int).tolist())


def draw_annotations(image: np.ndarray, annotations: Sequence[BoxAnnotation], view: View) -> np.ndarray:
    """(h, w, 3) uint8 RGB: the view of ``image`` ((H, W, 3) uint8 RGB) with the annotated boxes."""
    part = image[view.y : view.y + view.height, view.x : view.x + view.width]
    method = cv2.INTER_AREA if view.shown_width < view.width else cv2.INTER_CUBIC
    picture = cv2.resize(part, (view.shown_width, view.shown_height), interpolation=method)
    line = max(2, round(min(picture.shape[:2]) / 360))
    height, width = picture.shape[:2]
    boxes = in_pixels(view.boxes(np.array([each.box for each in annotations]).reshape(-1, 4)), picture)
    visible = [
        (each, (x0, y0, x1, y1))
        for each, (x0, y0, x1, y1) in zip(annotations, boxes, strict=True)
        if x0 < width and y0 < height and x1 > 0 and y1 > 0
    ]
    for each, box in visible:
        colour = COLOURS[each.kind]
        if each.kind == MISSED:
            dashed_box(picture, box, colour, line)
            continue
        if each.truth is not None and min(box[2] - box[0], box[3] - box[1]) >= 10 * line:
            (truth,) = in_pixels(view.boxes(each.truth[None]), picture)
            paler = [(value + 255) // 2 for value in colour]
            cv2.rectangle(picture, truth[:2], truth[2:], paler, 1)
        outlined_box(picture, box, colour, line)
    for each, box in visible:
        # Labels would hide the image in a crowd: small boxes get one only at an identity switch.
        if each.text and box[2] - box[0] >= _LABEL_FROM[each.kind] * line:
            draw_label(picture, box, [each.text], COLOURS[each.kind], max(1, line // 2), 0)
    return picture


def legend(width: int, height: int = LEGEND_HEIGHT) -> np.ndarray:
    """(height, width, 3) uint8 RGB: a sample box and the name of each kind."""
    strip = np.full((height, width, 3), GROUND, np.uint8)
    texts = {kind: _LEGEND.get(kind, kind) for kind in KINDS}
    box, gap, scale = round(height * 0.9), 26, height / 62
    sizes = {kind: cv2.getTextSize(text, FONT, scale, 1)[0][0] for kind, text in texts.items()}
    needed = sum(sizes.values()) + len(KINDS) * (box + 8 + gap)
    if needed > width:
        wide = legend(needed, height)
        return np.asarray(cv2.resize(wide, (width, height), interpolation=cv2.INTER_AREA))
    x = gap // 2
    for kind, text in texts.items():
        corners = [x, height // 4, x + box, height - height // 4]
        if kind == MISSED:
            dashed_box(strip, corners, COLOURS[kind], 2)
        else:
            cv2.rectangle(strip, (corners[0], corners[1]), (corners[2], corners[3]), COLOURS[kind], 2)
        cv2.putText(strip, text, (x + box + 8, round(height * 0.64)), FONT, scale, LIGHT, 1, cv2.LINE_AA)
        x += box + 8 + sizes[kind] + gap
    return strip


def caption_bar(text: str, width: int, height: int, scale: float, colour: Colour = LIGHT) -> np.ndarray:
    """(height, width, 3) uint8 RGB: a line of text on the background colour, in smaller type if it is too long."""
    strip = np.full((height, width, 3), GROUND, np.uint8)
    thick = 2 if scale > 0.7 else 1
    scale, tall, _ = fitted_text(text, width, scale, thick)
    cv2.putText(strip, text, (8, (height + tall) // 2), FONT, scale, colour, thick, cv2.LINE_AA)
    return strip


def centred(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8 RGB: the picture centred on the background colour."""
    picture = picture[:height, :width]
    below, right = height - picture.shape[0], width - picture.shape[1]
    y, x = below // 2, right // 2
    return cv2.copyMakeBorder(picture, y, below - y, x, right - x, cv2.BORDER_CONSTANT, value=GROUND)
