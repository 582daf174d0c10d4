"""Failure report of synthetic sequences: planted misses, switches and false positives are found, ranked and drawn."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from motip.data.sequence import TrackRows
from motip.evaluation.outcomes import box_outcomes
from motip.evaluation.protocols import ScoredSequence
from motip.report.drawing import dashed_box
from motip.report.failure_drawing import COLOURS, LEGEND_HEIGHT, draw_annotations, full_view, legend, zoomed_view
from motip.report.failure_segments import (
    FALSE,
    IGNORED,
    MISSED,
    SWITCH,
    TRACKED,
    BoxAnnotation,
    MatchedVideo,
    worst_frames,
    worst_segments,
    worst_sequences,
)
from motip.report.failures import COLUMNS, TILE, contact_sheet, write_failures
from tests.helpers.track_rows import rows
from tests.helpers.videos import facts

HEIGHT, WIDTH, FRAMES = 240, 320, 24
GROUND = (90, 90, 90)
BOX = (40.0, 60.0, 100.0, 120.0)
OTHER = (200.0, 60.0, 260.0, 120.0)


def video(
    name: str,
    missed: Sequence[int] = (),
    switched: int | None = None,
    false: Sequence[int] = (),
    fps: float = 10.0,
    first: int = 0,
    frames: int = FRAMES,
) -> MatchedVideo:
    """Two static objects, ids 5 and 6, tracked as 1 and 2 except for the planted errors; frames from ``first``."""
    numbers = range(first, first + frames)
    truth, pred = [], []
    for frame in numbers:
        truth += [(frame, 5, *BOX, 0), (frame, 6, *OTHER, 0)]
        pred.append((frame, 2, *OTHER, 0))
        if frame not in missed:
            pred.append((frame, 1 if switched is None or frame < switched else 7, *BOX, 0))
        if frame in false:
            pred.append((frame, 9, 40.0, 160.0, 80.0, 200.0, 0))
    scored = ScoredSequence(name, _sorted(rows(*truth)), _sorted(rows(*pred)), np.array(numbers))
    regions = np.array([[270.0, 10.0, 310.0, 50.0]])

    def images(positions: Sequence[int]) -> Iterator[np.ndarray]:
        for _ in positions:
            yield np.full((HEIGHT, WIDTH, 3), GROUND, np.uint8)

    return MatchedVideo(
        "world", name, fps, np.array(numbers), box_outcomes(scored, ("car",)), np.array([first + 3]), regions, images
    )


def _sorted(table: TrackRows) -> TrackRows:
    order = np.argsort(table.frames, kind="stable")
    names = ("frames", "track_ids", "boxes_xyxy", "scores", "class_ids")
    return TrackRows(*(getattr(table, name)[order] for name in names))


def kinds(annotations: Sequence[BoxAnnotation]) -> list[tuple[str, str]]:
    return sorted((each.kind, each.text) for each in annotations)


def test_every_box_of_a_frame_is_annotated() -> None:
    matched = video("v", missed=[4], switched=8, false=[3])
    assert kinds(matched.annotations(0)) == [(TRACKED, "2"), (TRACKED, "3")]
    assert kinds(matched.annotations(3)) == [(FALSE, "10"), (IGNORED, ""), (TRACKED, "2"), (TRACKED, "3")]
    assert kinds(matched.annotations(4)) == [(MISSED, "car"), (TRACKED, "3")]
    assert kinds(matched.annotations(8)) == [(SWITCH, "2 -> 8"), (TRACKED, "3")]
    assert kinds(matched.annotations(9)) == [(TRACKED, "3"), (TRACKED, "8")]


def test_switch_is_repeated_for_some_frames_in_a_video() -> None:
    matched = video("v", switched=8)  # 10 fps: 0.6 s are 6 frames
    shown = [
        any(each.kind == SWITCH for each in matched.annotations(position, repeat_switches=True))
        for position in range(FRAMES)
    ]
    assert [position for position, visible in enumerate(shown) if visible] == list(range(8, 15))
    repeated = next(each for each in matched.annotations(10, repeat_switches=True) if each.kind == SWITCH)
    assert repeated.text == "2 -> 8"


def test_counts_match_the_planted_errors() -> None:
    matched = video("v", missed=[104, 105], switched=108, false=[103], first=100)
    assert matched.counts() == {TRACKED: 45, MISSED: 2, SWITCH: 1, FALSE: 1, IGNORED: 0}
    assert matched.wrong_share == pytest.approx(4 / 48)
    assert matched.weights.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 5] + [0] * 15
    assert matched.switches(0, FRAMES - 1) == [
        {"class": "car", "frame": 109, "object": 6, "from": 2, "to": 8, "gap": 1}
    ]
    assert matched.switches(0, 7) == []


def test_worst_sequences_come_first_and_sequences_without_errors_are_omitted() -> None:
    few, many, none = video("few", missed=[1]), video("many", missed=range(10)), video("none")
    short = video("short", missed=range(4), frames=5)  # fewer errors, but most of its boxes
    assert [each.name for each in worst_sequences([few, none, many, short])] == ["short", "many", "few"]


def test_worst_segments_come_first_and_do_not_overlap() -> None:
    long = video("long", missed=[*range(10, 14), *range(150, 160)], switched=300, fps=10.0, frames=400)
    found = worst_segments([long], 3)
    assert [segment.weight for segment in found] == [10, 5, 4]
    assert all(segment.last - segment.first + 1 == 40 for segment in found)  # 4 s
    spans = sorted((segment.first, segment.last) for segment in found)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))
    assert found[0].first <= 150 and found[0].last >= 159
    assert found[0].counts[MISSED] == 10 and found[1].worst == 300
    # An error is in the middle of its segment.
    assert abs((found[1].first + found[1].last) / 2 - 300) <= 1


def test_one_video_does_not_take_all_segments() -> None:
    awful = video("awful", missed=range(400), frames=400)
    mild = [video(f"mild{number}", missed=[5], frames=400) for number in range(3)]
    found = worst_segments([awful, *mild], 6)
    assert [segment.video.name for segment in found] == ["awful", "awful", "awful", "mild0", "mild1", "mild2"]
    assert [segment.video.name for segment in worst_segments([awful], 4)] == ["awful"] * 4


def test_worst_frames_have_a_minimum_distance() -> None:
    matched = video("v", missed=[*range(2, 9), 20], switched=5)
    found = worst_frames(matched, 2)
    assert abs(found[0] - found[1]) >= 6
    assert matched.weights[found[0]] == matched.weights.max()


def test_boxes_have_the_colour_of_their_kind_and_dashes_have_gaps() -> None:
    image = np.full((HEIGHT, WIDTH, 3), GROUND, np.uint8)
    annotations = [
        BoxAnnotation(TRACKED, np.array([20, 20, 80, 80])),
        BoxAnnotation(SWITCH, np.array([120, 20, 180, 80]), text="3 -> 7"),
        BoxAnnotation(FALSE, np.array([220, 20, 280, 80])),
        BoxAnnotation(IGNORED, np.array([20, 140, 80, 200])),
        BoxAnnotation(MISSED, np.array([120, 140, 180, 200])),
    ]
    view = full_view(WIDTH, HEIGHT)
    assert (view.shown_width, view.shown_height) == (960, 720)
    picture = draw_annotations(image, annotations, view)
    for each in annotations:
        x0, _, x1, y1 = (3 * each.box).tolist()
        bottom = [tuple(pixel) for pixel in picture[y1, x0 : x1 + 1].tolist()]
        share = bottom.count(COLOURS[each.kind]) / len(bottom)
        if each.kind == MISSED:
            assert 0.3 < share < 0.75 and bottom.count(GROUND) / len(bottom) > 0.15
            dashes = sum(a != COLOURS[MISSED] and b == COLOURS[MISSED] for a, b in itertools.pairwise(bottom))
            assert dashes >= 4
        else:
            assert share > 0.97, each.kind
    above = picture[30:60, 360:500].reshape(-1, 3)  # the ids are on a label in the switch's colour
    assert (above == COLOURS[SWITCH]).all(axis=1).sum() > 300


def test_colours_of_the_kinds_have_the_specified_hues() -> None:
    strongest = {kind: int(np.argmax(colour)) for kind, colour in COLOURS.items()}
    assert (strongest[TRACKED], strongest[MISSED], strongest[FALSE]) == (1, 2, 0)
    red, green, blue = COLOURS[SWITCH]
    assert red > 220 and 100 < green < 190 and blue < 60
    assert len(set(COLOURS[IGNORED])) == 1


@pytest.mark.parametrize("size", [4, 9, 60, 500])
def test_dashes_fit_every_box(size: int) -> None:
    picture = np.full((600, 600, 3), GROUND, np.uint8)
    dashed_box(picture, [30, 30, 30 + size, 30 + size], (0, 0, 255), 2)
    side = (picture[30 + size, 30 : 31 + size] == (0, 0, 255)).all(axis=1)
    assert side[0] and side[-1]
    if size > 20:
        assert not side.all()


def test_boxes_outside_the_image_are_clipped() -> None:
    image = np.full((HEIGHT, WIDTH, 3), GROUND, np.uint8)
    far = BoxAnnotation(FALSE, np.array([1e7, 1e7, 2e7, 2e7]), text="1")
    crossing = BoxAnnotation(TRACKED, np.array([-1e9, 50, 100, 100]), text="2")
    picture = draw_annotations(image, [far, crossing], full_view(WIDTH, HEIGHT))
    assert tuple(picture[300, 200]) == COLOURS[TRACKED]
    assert not (picture == COLOURS[FALSE]).all(axis=2).any()


def test_small_objects_are_enlarged_and_the_view_contains_the_errors() -> None:
    big = zoomed_view(1920, 1080, TILE, [BoxAnnotation(MISSED, np.array([100, 100, 400, 400]))])
    assert (big.width, big.height) == (1920, 1080)
    box = np.array([1700, 900, 1712, 912])
    small = zoomed_view(
        1920, 1080, TILE, [BoxAnnotation(MISSED, box), BoxAnnotation(TRACKED, np.array([5, 5, 20, 20]))]
    )
    assert small.width <= 1920 / 3 and small.shown_width <= TILE[0] + 1 and small.shown_height <= TILE[1] + 1
    shown = small.boxes(box[None])[0]
    assert 0 <= shown[0] < shown[2] <= small.shown_width and shown[2] - shown[0] > 10


@pytest.mark.parametrize("width", [320, 960, 1920])
def test_legend_fits_every_width(width: int) -> None:
    assert legend(width).shape == (LEGEND_HEIGHT, width, 3)


def test_legend_has_the_colour_of_every_kind() -> None:
    wide = legend(1400).reshape(-1, 3)
    assert COLOURS
    for colour in COLOURS.values():
        assert (wide == colour).all(axis=1).sum() > 40


def test_clips_sheet_and_index_are_written_and_earlier_ones_removed(tmp_path: Path) -> None:
    videos = [video("good"), video("bad", missed=range(12), fps=12.5), video("worse", missed=range(20), switched=21)]
    found = write_failures(videos, tmp_path, "stage, val", clips=2)
    assert [segment.video.name for segment in found.segments] == ["worse", "bad"] and found.flawless == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(found.files)
    clips = [name for name in found.files if name.endswith(".mp4")]
    assert clips == ["01_world_worse_frames_1-24.mp4", "02_world_bad_frames_1-24.mp4"]
    for name, fps in zip(clips, (Fraction(10), Fraction(25, 2)), strict=True):
        seen = facts(tmp_path / name)
        assert (seen.codec, seen.pixels, seen.frames, seen.fps, seen.index_first) == ("h264", "yuv420p", 24, fps, True)
        assert seen.size == (30 + 720 + LEGEND_HEIGHT, 960)
    # In the first frame the object at BOX is missed: blue dashes at its lower side, seen through the codec.
    bottom = facts(tmp_path / clips[0]).images[0][30 + 3 * 120, 3 * 40 : 3 * 100].astype(int)
    blue = bottom[:, 2] - bottom[:, 0] > 90
    assert 0.2 < blue.mean() < 0.8

    index = json.loads((tmp_path / "errors.json").read_text())
    assert [each["sequence"] for each in index["sequences"]] == ["world/worse", "world/bad"]
    (switch,) = index["moments"][0]["switches"]
    assert switch == {"class": "car", "frame": 22, "object": 6, "from": 2, "to": 8, "gap": 1}
    assert index["moments"][1][MISSED] == 12 and index["sequences_without_error"] == 1

    sheet = cv2.imread(str(tmp_path / "contact_sheet.png"))
    assert sheet is not None and sheet.shape[1] == COLUMNS * TILE[0] + (COLUMNS + 1) * 6
    (tmp_path / "mine.mp4").write_bytes(b"not ours")
    again = write_failures(videos[:2], tmp_path, "stage, val", clips=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*again.files, "mine.mp4"])


def test_without_errors_only_the_index_is_written(tmp_path: Path) -> None:
    found = write_failures([video("good")], tmp_path, "stage, val")
    assert found.files == ["errors.json"] and not found.segments
    assert found.table()[1] == []


def test_contact_sheet_has_the_worst_sequence_on_top() -> None:
    mild, awful = video("mild", false=[5]), video("awful", missed=range(24))
    sheet = contact_sheet(worst_sequences([mild, awful]), "stage", 2)
    rows_of = {kind: np.flatnonzero((sheet[100:] == COLOURS[kind]).all(axis=2).any(axis=1)) for kind in (MISSED, FALSE)}
    assert rows_of[MISSED].max() < rows_of[FALSE].min()
