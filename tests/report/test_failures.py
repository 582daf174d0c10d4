"""Failure pictures of scripted sequences: planted misses, switches and false positives, found, ordered and drawn."""

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
from motip.evaluate.outcomes import explain
from motip.evaluate.protocols import ScoredSequence
from motip.report.drawing import dashed_box
from motip.report.failure_drawing import COLOURS, LEGEND_HEIGHT, legend, paint, whole_view, zoomed_view
from motip.report.failure_segments import (
    FALSE,
    IGNORED,
    MISSED,
    SWITCH,
    TRACKED,
    JudgedVideo,
    Mark,
    worst_frames,
    worst_moments,
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
) -> JudgedVideo:
    """Two still objects, ids 5 and 6, tracked as 1 and 2 but for what is planted; frames count from ``first``."""
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

    return JudgedVideo(
        "world", name, fps, np.array(numbers), explain(scored, ("car",)), np.array([first + 3]), regions, images
    )


def _sorted(table: TrackRows) -> TrackRows:
    order = np.argsort(table.frames, kind="stable")
    names = ("frames", "track_ids", "boxes_xyxy", "scores", "class_ids")
    return TrackRows(*(getattr(table, name)[order] for name in names))


def kinds(marks: Sequence[Mark]) -> list[tuple[str, str]]:
    return sorted((mark.kind, mark.text) for mark in marks)


def test_every_box_of_a_frame_has_its_mark() -> None:
    judged = video("v", missed=[4], switched=8, false=[3])
    assert kinds(judged.marks(0)) == [(TRACKED, "2"), (TRACKED, "3")]
    assert kinds(judged.marks(3)) == [(FALSE, "10"), (IGNORED, ""), (TRACKED, "2"), (TRACKED, "3")]
    assert kinds(judged.marks(4)) == [(MISSED, "car"), (TRACKED, "3")]
    assert kinds(judged.marks(8)) == [(SWITCH, "2 -> 8"), (TRACKED, "3")]
    assert kinds(judged.marks(9)) == [(TRACKED, "3"), (TRACKED, "8")]


def test_in_a_video_a_switch_stays_for_a_while() -> None:
    judged = video("v", switched=8)  # 10 fps: 0.6 s are 6 frames
    shown = [any(mark.kind == SWITCH for mark in judged.marks(position, hold=True)) for position in range(FRAMES)]
    assert [position for position, seen in enumerate(shown) if seen] == list(range(8, 15))
    held = next(mark for mark in judged.marks(10, hold=True) if mark.kind == SWITCH)
    assert held.text == "2 -> 8" and held.held


def test_counts_are_those_of_the_errors() -> None:
    judged = video("v", missed=[104, 105], switched=108, false=[103], first=100)
    assert judged.counts() == {TRACKED: 45, MISSED: 2, SWITCH: 1, FALSE: 1, IGNORED: 0}
    assert judged.wrong_share == pytest.approx(4 / 48)
    assert judged.weights.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 5] + [0] * 15
    assert judged.switches(0, FRAMES - 1) == [{"class": "car", "frame": 109, "object": 6, "from": 2, "to": 8, "gap": 1}]
    assert judged.switches(0, 7) == []


def test_the_worst_sequences_come_first_and_flawless_ones_not_at_all() -> None:
    few, many, none = video("few", missed=[1]), video("many", missed=range(10)), video("none")
    short = video("short", missed=range(4), frames=5)  # fewer errors, but most of its boxes
    assert [each.name for each in worst_sequences([few, none, many, short])] == ["short", "many", "few"]


def test_the_worst_moments_come_first_and_do_not_overlap() -> None:
    long = video("long", missed=[*range(10, 14), *range(150, 160)], switched=300, fps=10.0, frames=400)
    found = worst_moments([long], 3)
    assert [moment.weight for moment in found] == [10, 5, 4]
    assert all(moment.last - moment.first + 1 == 40 for moment in found)  # 4 s
    spans = sorted((moment.first, moment.last) for moment in found)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))
    assert found[0].first <= 150 and found[0].last >= 159
    assert found[0].counts[MISSED] == 10 and found[1].worst == 300
    # An error stands in the middle of its moment, so that one sees it come and go.
    assert abs((found[1].first + found[1].last) / 2 - 300) <= 1


def test_one_video_does_not_take_all_the_moments() -> None:
    awful = video("awful", missed=range(400), frames=400)
    mild = [video(f"mild{number}", missed=[5], frames=400) for number in range(3)]
    found = worst_moments([awful, *mild], 6)
    assert [moment.video.name for moment in found] == ["awful", "awful", "awful", "mild0", "mild1", "mild2"]
    assert [moment.video.name for moment in worst_moments([awful], 4)] == ["awful"] * 4


def test_the_worst_frames_are_apart() -> None:
    judged = video("v", missed=[*range(2, 9), 20], switched=5)
    found = worst_frames(judged, 2)
    assert abs(found[0] - found[1]) >= 6
    assert judged.weights[found[0]] == judged.weights.max()


def test_boxes_have_their_colours_and_dashes_have_gaps() -> None:
    image = np.full((HEIGHT, WIDTH, 3), GROUND, np.uint8)
    marks = [
        Mark(TRACKED, np.array([20, 20, 80, 80])),
        Mark(SWITCH, np.array([120, 20, 180, 80]), text="3 -> 7"),
        Mark(FALSE, np.array([220, 20, 280, 80])),
        Mark(IGNORED, np.array([20, 140, 80, 200])),
        Mark(MISSED, np.array([120, 140, 180, 200])),
    ]
    view = whole_view(WIDTH, HEIGHT)
    assert (view.shown_width, view.shown_height) == (960, 720)
    picture = paint(image, marks, view)
    for mark in marks:
        x0, _, x1, y1 = (3 * mark.box).tolist()
        bottom = [tuple(pixel) for pixel in picture[y1, x0 : x1 + 1].tolist()]
        share = bottom.count(COLOURS[mark.kind]) / len(bottom)
        if mark.kind == MISSED:
            assert 0.3 < share < 0.75 and bottom.count(GROUND) / len(bottom) > 0.15
            dashes = sum(a != COLOURS[MISSED] and b == COLOURS[MISSED] for a, b in itertools.pairwise(bottom))
            assert dashes >= 4
        else:
            assert share > 0.97, mark.kind
    above = picture[30:60, 360:500].reshape(-1, 3)  # the ids stand on a chip of the switch's colour
    assert (above == COLOURS[SWITCH]).all(axis=1).sum() > 300


def test_the_colours_are_those_that_were_asked_for() -> None:
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


def test_a_mark_far_outside_and_a_box_beyond_the_border_do_no_harm() -> None:
    image = np.full((HEIGHT, WIDTH, 3), GROUND, np.uint8)
    far = Mark(FALSE, np.array([1e7, 1e7, 2e7, 2e7]), text="1")
    crossing = Mark(TRACKED, np.array([-1e9, 50, 100, 100]), text="2")
    picture = paint(image, [far, crossing], whole_view(WIDTH, HEIGHT))
    assert tuple(picture[300, 200]) == COLOURS[TRACKED]
    assert not (picture == COLOURS[FALSE]).all(axis=2).any()


def test_small_objects_are_enlarged_and_the_view_holds_what_is_wrong() -> None:
    big = zoomed_view(1920, 1080, TILE, [Mark(MISSED, np.array([100, 100, 400, 400]))])
    assert (big.width, big.height) == (1920, 1080)
    box = np.array([1700, 900, 1712, 912])
    small = zoomed_view(1920, 1080, TILE, [Mark(MISSED, box), Mark(TRACKED, np.array([5, 5, 20, 20]))])
    assert small.width <= 1920 / 3 and small.shown_width <= TILE[0] + 1 and small.shown_height <= TILE[1] + 1
    shown = small.boxes(box[None])[0]
    assert 0 <= shown[0] < shown[2] <= small.shown_width and shown[2] - shown[0] > 10


def test_the_legend_fits_every_width() -> None:
    for width in (320, 960, 1920):
        assert legend(width).shape == (LEGEND_HEIGHT, width, 3)
    wide = legend(1400).reshape(-1, 3)
    for colour in COLOURS.values():
        assert (wide == colour).all(axis=1).sum() > 40


def test_clips_sheet_and_index_are_written_and_earlier_ones_removed(tmp_path: Path) -> None:
    videos = [video("good"), video("bad", missed=range(12), fps=12.5), video("worse", missed=range(20), switched=21)]
    found = write_failures(videos, tmp_path, "stage, val", clips=2)
    assert [moment.video.name for moment in found.moments] == ["worse", "bad"] and found.flawless == 1
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


def test_without_errors_there_is_an_index_and_no_picture(tmp_path: Path) -> None:
    found = write_failures([video("good")], tmp_path, "stage, val")
    assert found.files == ["errors.json"] and not found.moments
    assert found.table()[1] == []


def test_the_sheet_has_the_worst_sequence_on_top() -> None:
    mild, awful = video("mild", false=[5]), video("awful", missed=range(24))
    sheet = contact_sheet(worst_sequences([mild, awful]), "stage", 2)
    rows_of = {kind: np.flatnonzero((sheet[100:] == COLOURS[kind]).all(axis=2).any(axis=1)) for kind in (MISSED, FALSE)}
    assert rows_of[MISSED].max() < rows_of[FALSE].min()
