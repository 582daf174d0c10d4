"""Augmentation: one sample per clip, exact boxes, windows inside the image, colour jitter equal to torchvision."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import functional as tv

from motip.data.augment import (
    AugmentSettings,
    ClipAugmentation,
    ColourJitter,
    draw_augmentation,
    flip_cxcywh,
    jitter_colours,
    render_frame,
    resize_size,
    transform_boxes,
)

PUBLISHED = AugmentSettings(
    flip_prob=0.5,
    scales=(480, 608, 800),
    max_size=1440,
    random_resize=(400, 500, 600),
    crop_min=384,
    crop_max=600,
    overflow_boxes=False,
    max_shift_ratio=0.06,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.2,
)
SIZES = st.tuples(st.integers(240, 2160), st.integers(320, 3840))


def _boxes(rng: np.random.Generator, height: int, width: int, count: int) -> np.ndarray:
    """Boxes that may extend beyond the image, as in the datasets."""
    centre = rng.uniform(0, 1, (count, 2)) * [width, height]
    half = rng.uniform(2, 80, (count, 2))
    return np.hstack([centre - half, centre + half]).astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(0, 2**31), st.integers(1, 5), st.booleans())
def test_windows_lie_inside_the_image_and_boxes_inside_the_crop(size, seed, frames, single) -> None:
    height, width = size
    rng = np.random.default_rng(seed)
    boxes = [_boxes(rng, height, width, int(rng.integers(0, 6))) for _ in range(frames)]
    sampled = draw_augmentation(PUBLISHED, height, width, boxes, rng, single_image=single)

    windows = sampled.windows_xyxy
    assert (windows[:, :2] >= 0).all() and (windows[:, 2:] <= [width, height]).all()
    assert (windows[:, 2:] > windows[:, :2]).all()
    assert len({tuple(window) for window in (windows[:, 2:] - windows[:, :2]).tolist()}) == 1
    assert max(sampled.size_hw) <= PUBLISHED.max_size and min(sampled.size_hw) >= 1
    for t in range(frames):
        placed, kept = transform_boxes(sampled, t, boxes[t])
        assert len(placed) == len(kept) and (len(kept) > 0) == (len(boxes[t]) > 0)
        if sampled.cropped:
            corners = np.hstack([placed[:, :2] - placed[:, 2:] / 2, placed[:, :2] + placed[:, 2:] / 2])
            assert (placed[:, 2:] > 0).all()
            assert (corners >= -1e-5).all() and (corners <= 1 + 1e-5).all()
        else:
            assert kept.tolist() == list(range(len(boxes[t])))


@settings(max_examples=80, deadline=None)
@given(SIZES, st.integers(0, 2**31))
def test_reduced_decoding_keeps_the_pixels_of_the_result(size, seed) -> None:
    height, width = size
    rng = np.random.default_rng(seed)
    sampled = draw_augmentation(PUBLISHED, height, width, [_boxes(rng, height, width, 3)], rng)
    x0, y0, x1, y1 = sampled.windows_xyxy[0]
    # The window is snapped to the grid of the reduced image, by at most half a reduced pixel per side.
    assert (y1 - y0) / sampled.reduction + 1 >= sampled.size_hw[0] or sampled.reduction == 1
    assert (x1 - x0) / sampled.reduction + 1 >= sampled.size_hw[1] or sampled.reduction == 1
    for low, high, side in ((x0, x1, width), (y0, y1, height)):
        assert low % sampled.reduction == 0 and (high % sampled.reduction == 0 or high == side)


@settings(max_examples=100, deadline=None)
@given(st.integers(32, 4000), st.integers(32, 4000), st.integers(32, 1000), st.integers(200, 2000))
def test_resize_respects_the_size_limit_and_orientation(height, width, short, longest) -> None:
    size = resize_size(height, width, short, longest)
    assert min(size) >= 1 and max(size) <= max(longest, short)
    assert (size[0] <= size[1]) == (height <= width) or size[0] == size[1]


@given(st.integers(0, 2**31))
def test_double_flip_is_the_identity(seed) -> None:
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(0, 1, (5, 4))
    np.testing.assert_allclose(flip_cxcywh(flip_cxcywh(boxes)), boxes, atol=1e-12)
    image = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    flipped = ClipAugmentation(np.array([[0, 0, 32, 24]]), (24, 32), flip=True)
    once = render_frame(flipped, 0, image)
    assert not (once == image.transpose(2, 0, 1)).all()
    assert (render_frame(flipped, 0, once.transpose(1, 2, 0)) == image.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("seed", range(12))
def test_boxes_follow_the_pixels(seed: int) -> None:
    """The box of a bright rectangle on black matches its pixels after flip, crop, resize and reduced decoding."""
    height, width = 1080, 1920
    box = np.array([[600.0, 400.0, 1100.0, 800.0]], dtype=np.float32)
    image = np.zeros((height, width, 3), np.uint8)
    image[400:800, 600:1100] = 255
    plain = replace(PUBLISHED, brightness=0, contrast=0, saturation=0, hue=0, scales=(200, 480))
    sampled = draw_augmentation(plain, height, width, [box], np.random.default_rng(seed))
    side = sampled.reduction
    decoded = cv2.resize(image, (-(-width // side), -(-height // side)), interpolation=cv2.INTER_AREA)
    bright = render_frame(sampled, 0, decoded)[0] > 127
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    cx, cy, w, h = transform_boxes(sampled, 0, box)[0][0] * np.tile(sampled.size_hw[::-1], 2)
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(found, [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], atol=1.0)


def test_crop_that_removes_all_objects_of_a_frame_is_rejected() -> None:
    corner = np.array([[0, 0, 3, 3]], dtype=np.float32)
    opposite = np.array([[1277, 717, 1280, 720]], dtype=np.float32)
    no_flip = replace(PUBLISHED, flip_prob=0.0)
    for seed in range(30):
        sampled = draw_augmentation(no_flip, 720, 1280, [corner, opposite], np.random.default_rng(seed))
        assert not sampled.cropped and sampled.windows_xyxy.tolist() == [[0, 0, 1280, 720]] * 2
    crops = [draw_augmentation(no_flip, 720, 1280, [np.zeros((0, 4))], np.random.default_rng(s)) for s in range(30)]
    assert any(sampled.cropped for sampled in crops), "a frame without objects does not prevent crops"


def test_overflow_boxes_keep_their_size_and_outside_boxes_are_dropped() -> None:
    boxes = np.array([[-10, 0, 30, 20], [60, 60, 90, 90]], dtype=np.float32)
    clamped = ClipAugmentation(np.array([[0, 0, 50, 50]]), (50, 50), cropped=True)
    placed, kept = transform_boxes(clamped, 0, boxes)
    np.testing.assert_allclose(placed, [[0.3, 0.2, 0.6, 0.4]], atol=1e-6)
    assert kept.tolist() == [0]
    placed, kept = transform_boxes(replace(clamped, overflow=True), 0, boxes)
    np.testing.assert_allclose(placed, [[0.2, 0.2, 0.8, 0.4]], atol=1e-6)
    assert kept.tolist() == [0]


def test_single_image_gets_linear_camera_motion_if_it_has_several_frames() -> None:
    boxes = [np.array([[500, 300, 700, 500]], dtype=np.float32)] * 4
    still = replace(PUBLISHED, random_resize=())
    sampled = [
        draw_augmentation(still, 720, 1280, boxes, np.random.default_rng(s), single_image=True) for s in range(9)
    ]
    steps = np.concatenate([np.diff(one.windows_xyxy[:, :2], axis=0) for one in sampled])
    assert np.abs(steps).sum() > 0 and np.abs(steps).max() <= 0.06 * 1280
    alone = draw_augmentation(still, 720, 1280, boxes[:1], np.random.default_rng(0), single_image=True)
    assert alone.windows_xyxy.tolist() == [[0, 0, 1280, 720]]


def test_equal_generator_states_give_equal_augmentations() -> None:
    boxes = [_boxes(np.random.default_rng(1), 720, 1280, 4)] * 3
    first, second = (draw_augmentation(PUBLISHED, 720, 1280, boxes, np.random.default_rng(5)) for _ in range(2))
    assert first.jitter == second.jitter and first.size_hw == second.size_hw
    assert (first.windows_xyxy == second.windows_xyxy).all()


@pytest.mark.parametrize(
    ("jitter", "reference"),
    [
        (ColourJitter(1.3, 1, 1, 0, (0, 1, 2, 3)), lambda image: tv.adjust_brightness(image, 1.3)),
        (ColourJitter(0.6, 1, 1, 0, (3, 2, 1, 0)), lambda image: tv.adjust_brightness(image, 0.6)),
        (ColourJitter(1, 1.4, 1, 0, (0, 1, 2, 3)), lambda image: tv.adjust_contrast(image, 1.4)),
        (ColourJitter(1, 1, 0.6, 0, (0, 1, 2, 3)), lambda image: tv.adjust_saturation(image, 0.6)),
        (ColourJitter(1, 1, 1, 0.15, (0, 1, 2, 3)), lambda image: tv.adjust_hue(image, 0.15)),
        (ColourJitter(1, 1, 1, -0.2, (0, 1, 2, 3)), lambda image: tv.adjust_hue(image, -0.2)),
        (
            ColourJitter(1.2, 0.8, 1.3, 0, (2, 0, 1, 3)),
            lambda image: tv.adjust_contrast(tv.adjust_brightness(tv.adjust_saturation(image, 1.3), 1.2), 0.8),
        ),
    ],
)
def test_colour_jitter_equals_torchvision(jitter: ColourJitter, reference) -> None:
    smooth = cv2.resize(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8), (64, 48))
    ours = jitter_colours(smooth, jitter).astype(int)
    theirs = reference(torch.from_numpy(smooth).permute(2, 0, 1)).permute(1, 2, 0).numpy().astype(int)
    difference = np.abs(ours - theirs)
    # Hue runs through 8-bit HSV here and through floats there; torchvision truncates where OpenCV rounds.
    limit, mean = (12, 2.0) if jitter.hue else (3, 1.5)
    assert difference.max() <= limit and difference.mean() <= mean, (difference.max(), difference.mean())
