"""The H.264 writer: codec, frame rate, frame count, padding, and errors that leave no file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from motip.errors import MotipError
from motip.report.video_writer import VideoWriter
from tests.helpers.videos import facts, picture

NTSC = Fraction(30000, 1001)


@pytest.mark.parametrize("fps", [12, NTSC])
def test_video_is_browser_h264_with_the_given_rate_and_frames(tmp_path: Path, fps: Fraction) -> None:
    path = tmp_path / "out.mp4"
    with VideoWriter(path, Fraction(fps)) as writer:
        for number in range(7):
            writer.write(picture(number))
    found = facts(path)
    assert (found.codec, found.pixels, found.fps, found.frames) == ("h264", "yuv420p", fps, 7)
    assert found.size == (96, 160) and found.index_first
    for number in range(7):
        assert np.abs(found.images[number].astype(int) - picture(number)).mean() < 6
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_odd_sizes_are_padded_by_a_pixel(tmp_path: Path) -> None:
    path = tmp_path / "odd.mp4"
    with VideoWriter(path, Fraction(10)) as writer:
        writer.write(picture(0, 97, 161))
    assert facts(path).size == (98, 162)


def test_error_or_no_frames_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", Fraction(10)) as writer:
        writer.write(picture(0))
        raise RuntimeError
    with VideoWriter(tmp_path / "b.mp4", Fraction(10)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_unwritable_path_is_an_error() -> None:
    with pytest.raises(MotipError, match="cannot write"), VideoWriter(Path("/proc/none/x.mp4"), Fraction(5)) as writer:
        writer.write(picture(0))
