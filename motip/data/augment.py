"""Clip augmentation: one random transform for all frames, boxes and ignore regions of a clip.

The published order of transforms (static shift, flip, resize or resize-crop-resize, colour jitter) is folded into one
window of the source image per frame, one resize and one flip, applied to pixels once and to boxes exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from motip.data.decode import reduction_for

if TYPE_CHECKING:
    from motip.config import Config

_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float64)


@dataclass(frozen=True)
class AugmentSettings:
    """Image augmentation settings: the AUG_* keys of a configuration except those of ID labels (`IdSettings`)."""

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
    def from_config(config: Config) -> AugmentSettings:
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
    """Sampled parameters of torchvision's colour jitter.

    Attributes:
        brightness, contrast, saturation: factors, 1 = unchanged.
        hue: shift in turns of the hue circle, -0.5..0.5.
        order: the order of the four operations, as their indices in the order above.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: tuple[int, int, int, int]


@dataclass(frozen=True)
class ClipAugmentation:
    """Sampled transform of a clip.

    Attributes:
        windows_xyxy: (T, 4) int64 pixels, the crop window of each frame, inside the image; all of one size.
        size_hw: (H, W) of the result in pixels.
        reduction: factor by which frames are decoded smaller (1, 2, 4 or 8, `motip.data.decode`).
        flip: mirror horizontally, after the crop.
        cropped: clamp boxes to the window and drop those outside it.
        overflow: with ``cropped``, drop boxes outside but do not clamp the others.
        jitter: colour jitter, or None.
    """

    windows_xyxy: np.ndarray
    size_hw: tuple[int, int]
    reduction: int = 1
    flip: bool = False
    cropped: bool = False
    overflow: bool = False
    jitter: ColourJitter | None = None


def resize_size(height: int, width: int, short: int, longest: int | None) -> tuple[int, int]:
    """(height, width) after the training resize: the short side becomes ``short`` unless the long side would pass
    ``longest``; Python's banker's rounding, as published (spec 4.2)."""
    small, large = min(height, width), max(height, width)
    if longest is not None and large / small * short > longest:
        short = max(int(longest * small / large), 1)
    long = max(round(short * large / small), 1)
    return (short, long) if height <= width else (long, short)


def _resize_image(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 -> (*size_hw, 3). Bilinear; area averaging from a shrink factor of 2 on.

    Below a factor of 2 bilinear sampling skips no source pixel and takes a sixth of the time of averaging. The
    published resampler is closer to averaging.
    """
    if image.shape[:2] == size_hw:
        return image
    shrink = min(image.shape[0] / size_hw[0], image.shape[1] / size_hw[1])
    method = cv2.INTER_AREA if shrink >= 2 else cv2.INTER_LINEAR
    return cv2.resize(image, (size_hw[1], size_hw[0]), interpolation=method)


def draw_augmentation(
    settings: AugmentSettings,
    height: int,
    width: int,
    boxes_xyxy: Sequence[np.ndarray],
    rng: np.random.Generator,
    single_image: bool = False,
) -> ClipAugmentation:
    """Sample the augmentation of one clip.

    Args:
        height, width: size of the source frames in pixels.
        boxes_xyxy: per frame the (n, 4) objects in source pixels. A crop or shift that would remove all objects of
            a frame is rejected for the clip.
        single_image: the clip repeats one image, so camera motion is simulated.
    """
    # Simulated camera motion of a single image.
    views = np.tile(np.array([0, 0, width, height], dtype=np.int64), (len(boxes_xyxy), 1))
    cropped = False
    if single_image and len(views) > 1 and settings.max_shift_ratio > 0:
        shifted = _draw_shift(settings.max_shift_ratio, height, width, len(views), rng)
        if _objects_remain(boxes_xyxy, shifted):
            views, cropped = shifted, True
    view_hw = int(views[0, 3] - views[0, 1]), int(views[0, 2] - views[0, 0])

    # Flip and resize.
    flip = bool(rng.random() < settings.flip_prob)
    short = int(rng.choice(settings.scales))
    windows, size_hw = views, resize_size(*view_hw, short, settings.max_size)
    reduction = 1 if cropped else reduction_for(view_hw, size_hw)  # shifted windows are not on the coarse grid

    # Resize, crop, resize with probability 0.5.
    if settings.random_resize and rng.random() < 0.5:
        first_hw = resize_size(*view_hw, int(rng.choice(settings.random_resize)), None)
        crop = _draw_crop(settings, first_hw, rng)
        crop_hw = crop[3] - crop[1], crop[2] - crop[0]
        crop_size_hw = resize_size(*crop_hw, short, settings.max_size)
        window, coarse = _crop_in_source(crop, first_hw, view_hw, flip, crop_size_hw, coarse=not cropped)
        candidate = np.tile(views[:, :2], (1, 2)) + window
        if _objects_remain(boxes_xyxy, candidate):
            windows, size_hw, reduction, cropped = candidate, crop_size_hw, coarse, True
        else:  # the published order still resizes twice
            size_hw = resize_size(*first_hw, short, settings.max_size)
            reduction = 1 if cropped else reduction_for(view_hw, size_hw)
    jitter = _draw_jitter(settings, rng)
    return ClipAugmentation(windows, size_hw, reduction, flip, cropped, settings.overflow_boxes, jitter)


def transform_boxes(
    augmentation: ClipAugmentation, frame: int, boxes_xyxy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Apply the augmentation of frame number ``frame`` of the clip to boxes.

    Args:
        boxes_xyxy: (n, 4) pixels of the source image; may extend beyond it (and, uncropped, still do afterwards).

    Returns:
        boxes_cxcywh (k, 4) float32, normalised by the augmented frame; kept (k,) int64 indices into the input.
    """
    window = augmentation.windows_xyxy[frame].astype(np.float64)
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    kept = np.arange(len(boxes))
    if augmentation.cropped:
        clamped = np.clip(boxes, np.tile(window[:2], 2), np.tile(window[2:], 2))
        kept = np.flatnonzero((clamped[:, 2] > clamped[:, 0]) & (clamped[:, 3] > clamped[:, 1]))
        boxes = (boxes if augmentation.overflow else clamped)[kept]
    size = np.tile(window[2:] - window[:2], 2)
    x0, y0, x1, y1 = ((boxes - np.tile(window[:2], 2)) / size).T
    cxcywh = np.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], axis=1)
    return (flip_cxcywh(cxcywh) if augmentation.flip else cxcywh).astype(np.float32), kept


def flip_cxcywh(boxes_cxcywh: np.ndarray) -> np.ndarray:
    """Mirror normalised boxes horizontally."""
    return boxes_cxcywh * [-1, 1, 1, 1] + [1, 0, 0, 0]


def render_frame(
    augmentation: ClipAugmentation, frame: int, decoded: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
    """Crop, resize, flip and jitter one frame.

    Args:
        decoded: (H, W, 3) uint8 RGB, decoded at ``augmentation.reduction``.
        out: (3, *size_hw) uint8 to write the result to.

    Returns:
        (3, *size_hw) uint8.
    """
    if out is None:
        out = np.empty((3, *augmentation.size_hw), dtype=np.uint8)
    x0, y0, x1, y1 = (-(-int(value) // augmentation.reduction) for value in augmentation.windows_xyxy[frame])
    image = _resize_image(decoded[y0:y1, x0:x1], augmentation.size_hw)
    if augmentation.flip:
        image = cv2.flip(image, 1)
    if augmentation.jitter is not None:
        image = jitter_colours(image, augmentation.jitter)
    cv2.split(image, list(out))
    return out


def jitter_colours(image: np.ndarray, jitter: ColourJitter) -> np.ndarray:
    """Brightness, contrast, saturation and hue of an (H, W, 3) uint8 RGB image by torchvision's definitions.

    The first three are affine in the colour, so each is one saturating matrix product.
    """
    for operation in jitter.order:
        if operation == 0 and jitter.brightness != 1:
            image = cv2.transform(image, np.eye(3) * jitter.brightness)
        elif operation == 1 and jitter.contrast != 1:
            mean_grey = float(_GREY @ cv2.mean(image)[:3])
            offset = np.full((3, 1), (1 - jitter.contrast) * mean_grey)
            image = cv2.transform(image, np.hstack([np.eye(3) * jitter.contrast, offset]))
        elif operation == 2 and jitter.saturation != 1:
            image = cv2.transform(image, np.eye(3) * jitter.saturation + (1 - jitter.saturation) * _GREY)
        elif operation == 3 and jitter.hue != 0:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
            hsv[..., 0] += np.uint8(round(jitter.hue * 256) % 256)  # hue wraps at 256: overflow is intended
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return image


def _draw_jitter(settings: AugmentSettings, rng: np.random.Generator) -> ColourJitter | None:
    strengths = (settings.brightness, settings.contrast, settings.saturation, settings.hue)
    if not any(strengths):
        return None
    brightness, contrast, saturation = (rng.uniform(max(0.0, 1 - s), 1 + s) for s in strengths[:3])
    hue = rng.uniform(-settings.hue, settings.hue)
    first, second, third, fourth = (int(operation) for operation in rng.permutation(4))
    return ColourJitter(brightness, contrast, saturation, hue, (first, second, third, fourth))


def _draw_shift(ratio: float, height: int, width: int, frames: int, rng: np.random.Generator) -> np.ndarray:
    """(T, 4) windows of one size that move linearly over the image, by at most ``ratio`` of its sides in total."""
    limit = np.array([int(ratio * width), int(ratio * height)])
    shift = rng.integers(-limit, limit + 1)
    progress = np.linspace(0, 1, frames)[:, None]
    origins = np.rint(np.where(shift >= 0, progress, progress - 1) * shift).astype(np.int64)
    size = np.array([width, height]) - np.abs(shift)
    return np.hstack([origins, origins + size])


def _draw_crop(settings: AugmentSettings, size_hw: tuple[int, int], rng: np.random.Generator) -> tuple[int, ...]:
    """(x0, y0, x1, y1) inside an image of ``size_hw``; a side shorter than the minimum crop is not cropped."""
    sides = (size_hw[1], size_hw[0])
    lengths = [int(rng.integers(min(settings.crop_min, s), min(settings.crop_max, s) + 1)) for s in sides]
    x0, y0 = (int(rng.integers(0, side - length + 1)) for side, length in zip(sides, lengths, strict=True))
    return x0, y0, x0 + lengths[0], y0 + lengths[1]


def _crop_in_source(
    crop_xyxy: tuple[int, ...],
    first_hw: tuple[int, int],
    view_hw: tuple[int, int],
    flip: bool,
    target_hw: tuple[int, int],
    coarse: bool,
) -> tuple[np.ndarray, int]:
    """The crop of the (flipped) resized image as a window of the source view in integer pixels, and its reduction.

    The window is snapped to the grid of the reduced decoding; boxes use the snapped window, so they stay exact.
    """
    x0, y0, x1, y1 = crop_xyxy
    if flip:
        x0, x1 = first_hw[1] - x1, first_hw[1] - x0
    scale_y, scale_x = view_hw[0] / first_hw[0], view_hw[1] / first_hw[1]
    window_hw = int((y1 - y0) * scale_y), int((x1 - x0) * scale_x)
    reduction = reduction_for(window_hw, target_hw) if coarse else 1

    def snapped(begin: float, end: float, side: int) -> tuple[int, int]:
        low = min(round(begin / reduction) * reduction, (side - 1) // reduction * reduction)
        high = round(end / reduction) * reduction
        high = side if side - end < abs(high - end) or high > side else max(high, low + 1)
        return low, high

    left, right = snapped(x0 * scale_x, x1 * scale_x, view_hw[1])
    top, bottom = snapped(y0 * scale_y, y1 * scale_y, view_hw[0])
    return np.array([left, top, right, bottom], dtype=np.int64), reduction


def _objects_remain(boxes_xyxy: Sequence[np.ndarray], windows_xyxy: np.ndarray) -> bool:
    """Whether every frame with objects keeps at least one in its window."""
    for boxes, window in zip(boxes_xyxy, windows_xyxy, strict=True):
        low = np.maximum(boxes[:, :2], window[:2])
        high = np.minimum(boxes[:, 2:], window[2:])
        if len(boxes) and not (high > low).all(axis=1).any():
            return False
    return True
