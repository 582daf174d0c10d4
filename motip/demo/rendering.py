"""Rendering: sprites painted back to front, with the visible share of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import cv2
import numpy as np

_MIN_VISIBLE = 0.4
"""An object with less than this share of its pixels visible has no box in that frame (a gap in its track)."""
_MIN_INSIDE = 0.35
"""An object with less than this share of its pixels inside the frame counts as outside."""
_MIN_SIDE = 3
"""Boxes narrower or lower than this many pixels are not labelled."""


@dataclass(frozen=True, slots=True)
class Label:
    """One labelled object of one frame.

    Attributes:
        track_id: identity within the sequence, from 1; 0 for a region without identity.
        category: the category as the raw format spells it.
        box_xyxy: (x1, y1, x2, y2) pixels clipped to the frame, including occluded parts.
        visible: share of its in-frame pixels that are not occluded, 0..1.
        inside: share of its pixels inside the frame, 0..1.
        region: True for a group or an ignored area rather than one object.
    """

    track_id: int
    category: str
    box_xyxy: tuple[int, int, int, int]
    visible: float
    inside: float
    region: bool = False


@dataclass(frozen=True, slots=True)
class Sprite:
    """An image with transparency, positioned by its anchor.

    Attributes:
        levels: premultiplied BGRA float32 arrays (h, w, 4), colour 0..255 and alpha 0..1; level k is drawn at
            1 / 2**k of the size, so that strong downscaling does not alias.
        anchor: (x, y) in pixels of level 0; painted at the given position.
    """

    levels: tuple[np.ndarray, ...]
    anchor: tuple[float, float]


def make_sprite(bgr: np.ndarray, mask: np.ndarray, anchor: tuple[float, float], supersample: int) -> Sprite:
    """A sprite from a drawing enlarged ``supersample`` times; ``mask`` is (h, w) uint8 0..255."""
    alpha = mask.astype(np.float32)[..., None] / 255
    drawing = np.concatenate([bgr.astype(np.float32) * alpha, alpha], axis=2)
    levels = []
    for factor in (supersample, supersample * 2, supersample * 4):
        size = (max(1, round(drawing.shape[1] / factor)), max(1, round(drawing.shape[0] / factor)))
        levels.append(cv2.resize(drawing, size, interpolation=cv2.INTER_AREA))
    return Sprite(tuple(levels), (anchor[0] / supersample, anchor[1] / supersample))


@dataclass(slots=True)
class _Placed:
    track_id: int
    category: str
    box: tuple[int, int, int, int]
    total: int
    inside: int
    region: bool


@dataclass(slots=True)
class Canvas:
    """One frame under construction: (H, W, 3) float32 BGR in 0..255 and, per pixel, the object on top."""

    image: np.ndarray
    _owner: np.ndarray = field(init=False)
    _placed: list[_Placed] = field(init=False, default_factory=list)
    _regions: list[Label] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._owner = np.zeros(self.image.shape[:2], np.int32)

    def paint(
        self,
        sprite: Sprite,
        x: float,
        y: float,
        *,
        scale: float = 1.0,
        angle: float = 0.0,
        track_id: int = 0,
        category: str = "",
        region: bool = False,
    ) -> None:
        """Draw ``sprite`` over everything painted so far.

        Args:
            x, y: position of the anchor, pixels.
            scale: size relative to the sprite's own.
            angle: clockwise rotation about the anchor, radians.
            track_id: identity; 0 together with an empty category paints unlabelled scenery.
            region: the sprite is a group or an area, labelled without an identity.
        """
        # Level of detail and target rectangle.
        full_height, full_width = sprite.levels[0].shape[:2]
        level = min(len(sprite.levels) - 1, max(0, int(-math.log2(max(scale, 1e-3)))))
        source = sprite.levels[level]
        height, width = source.shape[:2]
        shrink_x, shrink_y = full_width / width, full_height / height
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        anchor_x, anchor_y = sprite.anchor
        sides_x, sides_y = (-anchor_x, full_width - anchor_x), (-anchor_y, full_height - anchor_y)
        corners_x = [x + cos * side_x - sin * side_y for side_x in sides_x for side_y in sides_y]
        corners_y = [y + sin * side_x + cos * side_y for side_x in sides_x for side_y in sides_y]
        left, top = math.floor(min(corners_x)), math.floor(min(corners_y))
        right, bottom = math.ceil(max(corners_x)) + 1, math.ceil(max(corners_y)) + 1
        frame_height, frame_width = self._owner.shape
        if right <= 0 or bottom <= 0 or left >= frame_width or top >= frame_height:
            return
        # Affine map of pixel centres: i + 0.5 of a level is (i + 0.5) * shrink of the full sprite.
        a, b = cos * shrink_x, -sin * shrink_y
        c, d = sin * shrink_x, cos * shrink_y
        shift_x = x - left - 0.5 - cos * anchor_x + sin * anchor_y + 0.5 * (a + b)
        shift_y = y - top - 0.5 - sin * anchor_x - cos * anchor_y + 0.5 * (c + d)
        matrix = np.array([[a, b, shift_x], [c, d, shift_y]])
        drawn = cv2.warpAffine(source, matrix, (right - left, bottom - top), flags=cv2.INTER_LINEAR)

        # Blend, and record the owner of each solid pixel.
        solid = (drawn[..., 3] > 0.5).astype(np.uint8)
        y1, y2 = max(top, 0), min(bottom, frame_height)
        x1, x2 = max(left, 0), min(right, frame_width)
        cut = (slice(y1 - top, y2 - top), slice(x1 - left, x2 - left))
        patch = self.image[y1:y2, x1:x2]
        patch *= 1 - drawn[cut][..., 3:]
        patch += drawn[cut][..., :3]
        owner = 0
        if category:
            box_x, box_y, box_w, box_h = cv2.boundingRect(solid)
            box = (left + box_x, top + box_y, left + box_x + box_w, top + box_y + box_h)
            total, inside = cv2.countNonZero(solid), cv2.countNonZero(np.ascontiguousarray(solid[cut]))
            self._placed.append(_Placed(track_id, category, box, total, inside, region))
            owner = len(self._placed)
        self._owner[y1:y2, x1:x2][solid[cut] > 0] = owner

    def add_region(self, category: str, box_xyxy: tuple[float, float, float, float]) -> None:
        """Label an area that is part of the background (an ignored region), if part of it is in the frame."""
        box = self._clip(tuple(round(value) for value in box_xyxy))  # type: ignore[arg-type]
        if box is not None:
            self._regions.append(Label(0, category, box, 1.0, 1.0, True))

    def labels(self) -> tuple[list[Label], int]:
        """Labels of the painted objects, and the number of objects without one because they are occluded."""
        shown = np.bincount(self._owner.ravel(), minlength=len(self._placed) + 1)
        labels, hidden = list(self._regions), 0
        for owner, placed in enumerate(self._placed, start=1):
            box = self._clip(placed.box)
            if box is None or placed.inside < _MIN_INSIDE * placed.total:
                continue
            visible = float(shown[owner]) / placed.inside
            if visible < _MIN_VISIBLE:
                hidden += 1
                continue
            labels.append(
                Label(placed.track_id, placed.category, box, visible, placed.inside / placed.total, placed.region)
            )
        return labels, hidden

    def _clip(self, box: tuple[int, int, int, int]) -> tuple[int, int, int, int] | None:
        height, width = self._owner.shape
        x1, y1, x2, y2 = max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)
        return (x1, y1, x2, y2) if x2 - x1 >= _MIN_SIDE and y2 - y1 >= _MIN_SIDE else None


def blotches(rng: np.random.Generator, height: int, width: int, cell: float, colours: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 texture: smooth patches of ``colours`` (K, 3), about ``cell`` pixels large, with fine grain."""
    rows, columns = max(2, round(height / cell)), max(2, round(width / cell))
    coarse = colours[rng.integers(len(colours), size=(rows, columns))].astype(np.float32)
    coarse += rng.normal(0, 10, coarse.shape).astype(np.float32)
    fine = rng.normal(0, 7, (max(2, height // 2), max(2, width // 2), 1)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    grain = cv2.resize(fine, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.clip(smooth + grain[..., None], 0, 255).astype(np.uint8)


class Lighting:
    """Exposure, colour cast, sensor noise and a drifting pattern of light, the same for a whole sequence."""

    def __init__(
        self,
        rng: np.random.Generator,
        size: tuple[int, int],
        *,
        gain: tuple[float, float],
        contrast: float,
        flicker: float,
        noise: float,
    ) -> None:
        """``size`` is (H, W); ``contrast`` is the depth of the light pattern and ``flicker`` its pulse, 0..1."""
        height, width = size
        self._size = size
        self._cast = (rng.uniform(*gain) * rng.uniform(0.9, 1.1, 3)).astype(np.float32)
        coarse = rng.uniform(1 - contrast, 1 + contrast, (6, 9)).astype(np.float32)
        self._pattern = cv2.resize(coarse, (2 * width, 2 * height), interpolation=cv2.INTER_CUBIC)
        self._drift = rng.uniform(0, 2 * np.pi, 2)
        self._pulse = (flicker, rng.uniform(0.1, 0.5), rng.uniform(0, 2 * np.pi))
        # One tile at another offset in every frame looks like new noise and costs only a copy.
        self._noise = rng.normal(0, noise, (height + 64, width + 64, 3)).astype(np.float32)
        self._offsets = rng.integers(0, 64, (997, 2))

    def apply(self, image: np.ndarray, frame: int) -> np.ndarray:
        """(H, W, 3) uint8 from the painted float image of frame number ``frame``."""
        height, width = self._size
        top = round((0.5 + 0.5 * np.sin(0.05 * frame + self._drift[0])) * height)
        left = round((0.5 + 0.5 * np.sin(0.04 * frame + self._drift[1])) * width)
        depth, rate, phase = self._pulse
        level = self._cast * (1 + depth * np.sin(rate * frame + phase))
        light = self._pattern[top : top + height, left : left + width, None] * level.astype(np.float32)
        dy, dx = self._offsets[frame % len(self._offsets)]
        lit = image * light + self._noise[dy : dy + height, dx : dx + width]
        return np.clip(lit, 0, 255).astype(np.uint8)
