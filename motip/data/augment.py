"""Clip augmentation: one draw for all frames, boxes and ignore regions of a clip.

The published order of transforms (static shift, flip, resize or resize-crop-resize, colour jitter) is folded into one
window of the source image per frame, one resize and one flip: pixels are touched once, boxes follow the same window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from motip.data.decode import reduction_for

_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float64)


@dataclass(frozen=True)
class AugmentSettings:
    """The AUG_* keys of a configuration."""

    flip_prob: float
    scales: tuple[int, ...]
    max_size: int
    random_resize: tuple[int, ...]
    crop_min: int
    crop_max: int
    overflow_boxes: bool
    max_shift_ratio: float
    brightness: float
    contrast: float
    saturation: float
    hue: float

    @staticmethod
    def from_config(config: Any) -> AugmentSettings:
        return AugmentSettings(
            flip_prob=config.AUG_FLIP_PROB,
            scales=tuple(config.AUG_RESIZE_SCALES),
            max_size=config.AUG_MAX_SIZE,
            random_resize=tuple(config.AUG_RANDOM_RESIZE or ()),
            crop_min=config.AUG_RANDOM_CROP_MIN,
            crop_max=config.AUG_RANDOM_CROP_MAX,
            overflow_boxes=config.AUG_OVERFLOW_BBOX,
            max_shift_ratio=config.AUG_MAX_SHIFT_RATIO,
            brightness=config.AUG_BRIGHTNESS,
            contrast=config.AUG_CONTRAST,
            saturation=config.AUG_SATURATION,
            hue=config.AUG_HUE,
        )


@dataclass(frozen=True)
class ColourJitter:
    """One draw of torchvision's colour jitter: factors, hue shift in turns, and the order of the four operations."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: tuple[int, int, int, int]


@dataclass(frozen=True)
class ClipAugmentation:
    """What happens to every frame of a clip.

    Attributes:
        windows_xyxy: (T, 4) int64, the part of the source image each frame shows; all of one size.
        size_hw: pixels of the result.
        flip: mirror left and right, after the window.
        cropped: boxes are clamped to the window and dropped where nothing is left.
        overflow: with ``cropped``, keep boxes unclamped (dropping still applies).
        jitter: colour jitter or None.
    """

    windows_xyxy: np.ndarray
    size_hw: tuple[int, int]
    flip: bool = False
    cropped: bool = False
    overflow: bool = False
    jitter: ColourJitter | None = None

    @property
    def reduction(self) -> int:
        """How much smaller the frames may be decoded (`motip.data.decode`)."""
        x0, y0, x1, y1 = self.windows_xyxy[0]
        return reduction_for((int(y1 - y0), int(x1 - x0)), self.size_hw)


def resize_size(height: int, width: int, short: int, longest: int | None) -> tuple[int, int]:
    """(height, width) after the training resize: the short side becomes ``short`` unless the long one passes
    ``longest``; Python's banker's rounding as published (spec 4.2)."""
    small, large = min(height, width), max(height, width)
    if longest is not None and large / small * short > longest:
        short = int(longest * small / large)
    short = max(short, 1)
    long = max(round(short * large / small), 1)
    return (short, long) if height <= width else (long, short)


def inference_size(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """(height, width) of a frame at run time: torchvision's truncating arithmetic, unlike training (spec 6)."""
    small, large = min(height, width), max(height, width)
    new_short, new_long = short, int(short * large / small)
    if new_long > longest:
        new_short, new_long = max(int(longest * new_short / new_long), 1), longest
    return (new_short, new_long) if height <= width else (new_long, new_short)


def resize_for_inference(image: np.ndarray, short: int, longest: int) -> np.ndarray:
    """An (H, W, 3) uint8 frame at the size the tracker sees."""
    return _resize(image, inference_size(*image.shape[:2], short, longest))


def draw_augmentation(
    settings: AugmentSettings,
    height: int,
    width: int,
    boxes_xyxy: Sequence[np.ndarray],
    rng: np.random.Generator,
    single_image: bool = False,
) -> ClipAugmentation:
    """Draw the augmentation of one clip.

    Args:
        height, width: pixels of the source frames.
        boxes_xyxy: per frame the (n, 4) objects in source pixels; a crop after which a frame that had objects has
            none left is not made (the draw counts as used).
        single_image: the clip repeats one image; the camera's movement is simulated.
    """
    frames = len(boxes_xyxy)
    views = np.tile(np.array([0, 0, width, height], dtype=np.int64), (frames, 1))
    moved = False
    if single_image and frames > 1:
        shifted = _draw_shift(settings, height, width, frames, rng)
        moved = _keeps_objects(boxes_xyxy, shifted)
        views = shifted if moved else views
    flip = bool(rng.random() < settings.flip_prob)
    view_hw = int(views[0, 3] - views[0, 1]), int(views[0, 2] - views[0, 0])

    short = int(rng.choice(settings.scales))
    windows, size_hw, cropped = views, resize_size(*view_hw, short, settings.max_size), moved
    if settings.random_resize and rng.random() < 0.5:
        first_hw = resize_size(*view_hw, int(rng.choice(settings.random_resize)), None)
        crop = _draw_crop(settings, first_hw, rng)
        if flip:
            crop = crop[[2, 1, 0, 3]] * [-1, 1, -1, 1] + [first_hw[1], 0, first_hw[1], 0]
        size_hw = resize_size(crop[3] - crop[1], crop[2] - crop[0], short, settings.max_size)
        candidate = views + _in_source(crop, first_hw, view_hw, reduction_step=size_hw)
        if _keeps_objects(boxes_xyxy, candidate):
            windows, cropped = candidate, True
            windows[:, 2:] = windows[:, :2] + (candidate[0, 2:] - candidate[0, :2])
        else:
            size_hw = resize_size(*first_hw, short, settings.max_size)
    return ClipAugmentation(windows, size_hw, flip, cropped, settings.overflow_boxes, _draw_jitter(settings, rng))
