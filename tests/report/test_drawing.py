"""Drawing of tracks: colours, labels, boxes, trails."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from motip.report.drawing import DrawnTracks, Painter, text_colour, track_colour


def tracks(boxes: list[list[float]], ids: list[int]) -> DrawnTracks:
    count = len(ids)
    boxes_xyxy = np.array(boxes, np.float32).reshape(-1, 4)
    return DrawnTracks(np.array(ids), boxes_xyxy, np.zeros(count, np.int64), np.full(count, 0.87, np.float32))


def test_colours_are_deterministic_and_differ_between_neighbouring_ids() -> None:
    assert track_colour(7) == track_colour(7)
    for track_id in range(200):
        own = np.array(track_colour(track_id), float)
        for other in range(track_id + 1, track_id + 6):
            assert np.abs(own - track_colour(other)).max() > 60, (track_id, other)
        # Bright enough for a dark background; the outline is for a light one.
        assert colorsys.rgb_to_hsv(*(own / 255))[2] >= 0.75


def test_label_text_has_aa_contrast() -> None:
    def luminance(colour: tuple[int, int, int]) -> float:
        parts = [c / 255 for c in colour]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for track_id in range(300):
        chip = track_colour(track_id)
        light, dark = sorted((luminance(chip), luminance(text_colour(chip))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, chip  # WCAG AA


@pytest.mark.parametrize("ground", [0, 255])
def test_box_is_drawn_at_its_pixels_on_dark_and_light_backgrounds(ground: int) -> None:
    image = np.full((200, 300, 3), ground, np.uint8)
    drawn = Painter(["car"]).draw(image, tracks([[60, 80, 160, 150]], [3]))
    assert (image == ground).all(), "the input frame is not modified"
    assert (drawn[115, 60] == track_colour(3)).all() and (drawn[150, 110] == track_colour(3)).all()
    assert (drawn[115, 110] == ground).all()
    assert (drawn[190, 290] == ground).all()


def test_label_of_a_wide_box_is_longer() -> None:
    def chip_width(width: int) -> int:
        drawn = Painter(["pedestrian"], trail=0).draw(
            np.zeros((300, 600, 3), np.uint8), tracks([[50, 100, 50 + width, 200]], [11])
        )
        # Of the rows above the box, the one the chip's background fills most.
        return int((drawn[70:98] == track_colour(11)).all(axis=2).sum(axis=1).max())

    widths = [chip_width(width) for width in (10, 30, 300)]
    assert widths[0] < widths[1] < widths[2]


def test_trail_covers_the_last_frames_only() -> None:
    painter = Painter(["car"], trail=3)
    empty = np.zeros((100, 400, 3), np.uint8)
    for step in range(6):
        x = 20 + 50 * step
        drawn = painter.draw(empty, tracks([[x, 40, x + 20, 60]], [5]))
    # The line is smoothed, so its colour is near the track's own, not equal to it.
    row = (np.abs(drawn[60].astype(int) - track_colour(5)) < 60).all(axis=1)
    assert row[190:266].all()  # between the points of the last three frames
    assert not row[:170].any()  # and no further back
    for _ in range(3):
        drawn = painter.draw(empty, tracks([], []))
    assert not drawn.any()


def test_boxes_outside_the_image_are_drawn_without_error() -> None:
    image = np.full((64, 64, 3), 90, np.uint8)
    boxes = [[-500.0, -500, 5000, 5000], [60, 60, 70, 70], [1e9, 1e9, 2e9, 2e9], [10, 0, 30, 20]]
    drawn = Painter(["a class with a long name"]).draw(image, tracks(boxes, [0, 1, 2, 3]), bar="frame 1   4 tracks")
    assert drawn.shape == image.shape
    assert (drawn[2, 40:] < 90).any()
