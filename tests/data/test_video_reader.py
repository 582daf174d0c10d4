"""Video reader: video files, numbered images, ranges, rotation, damaged input."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from motip.data.video_reader import open_source
from motip.errors import MotipError
from tests.helpers.videos import picture, write_images, write_video

NTSC = Fraction(30000, 1001)


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_video_file_is_read_completely_in_order(tmp_path: Path, suffix: str) -> None:
    source = open_source(str(write_video(tmp_path / f"in.{suffix}", fps=NTSC)))
    frames = list(source)
    assert float(source.fps) == pytest.approx(float(NTSC), rel=1e-3)
    assert [number for number, _ in frames] == list(range(7))
    assert source.frames == 7
    # The square moves by four pixels per frame.
    left = [int(np.flatnonzero(image[40, :, 0].astype(int) - image[40, :, 1] > 100)[0]) for _, image in frames]
    assert np.abs(np.array(left) - (8 + 4 * np.arange(7))).max() <= 1


def test_range_counts_from_one_and_includes_its_end(tmp_path: Path) -> None:
    path = str(write_video(tmp_path / "in.mp4"))
    source = open_source(path, start=3, end=5)
    assert source.frames == 3
    assert [number for number, _ in source] == [2, 3, 4]
    with pytest.raises(MotipError, match="shorter than the requested range"):
        list(open_source(path, start=20))
    with pytest.raises(MotipError, match="frame range is empty"):
        open_source(path, start=5, end=4)


def test_rotation_tag_is_applied(tmp_path: Path) -> None:
    path = write_video(tmp_path / "phone.mp4")
    data = bytearray(path.read_bytes())
    # The matrix in the track header (ISO 14496-12, 8.3.2), set to a quarter turn clockwise for display.
    matrix = data.index(b"tkhd") + 4 + 40
    turned = [0, 65536, 0, -65536, 0, 0, 0, 0, 0x40000000]
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turned)
    path.write_bytes(data)
    _, image = next(iter(open_source(str(path))))
    assert image.shape == (160, 96, 3)
    upright = np.rot90(picture(0), -1)
    assert np.abs(image.astype(int) - upright).mean() < 6


def test_pattern_uses_file_numbers_and_seqinfo_frame_rate(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "seq" / "img1", range(166, 170))
    (tmp_path / "seq" / "seqinfo.ini").write_text("[Sequence]\nframeRate=5\n")
    (folder / "notes.txt").write_text("no image")
    source = open_source(str(folder / "%08d.png"))
    frames = list(source)
    assert [number for number, _ in frames] == [165, 166, 167, 168]
    assert source.fps == 5 and source.notes == ()
    assert (frames[2][1] == picture(2)).all()
    assert [number for number, _ in open_source(str(folder), start=167, end=168)] == [166, 167]


def test_images_numbered_from_zero_start_at_frame_zero_and_an_assumed_rate_is_noted(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "zero", range(3), "frame{}.png")
    source = open_source(str(folder))
    assert [number for number, _ in source] == [0, 1, 2]
    assert source.fps == 30 and "30" in source.notes[0]
    assert open_source(str(folder), fps=7.5).fps == Fraction(15, 2)
    assert [number for number, _ in open_source(str(folder / "frame%d.png"))] == [0, 1, 2]


def test_invalid_input_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("this is no video")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MotipError, match="no such video"):
        open_source(str(tmp_path / "gone.mp4"))
    with pytest.raises(MotipError, match="cannot be opened"):
        open_source(str(tmp_path / "text.mp4"))
    with pytest.raises(MotipError, match="no images"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(MotipError, match="no images"):
        open_source(str(tmp_path / "gone" / "%08d.jpg"))
    with pytest.raises(MotipError, match="invalid frame rate"):
        open_source(str(write_images(tmp_path / "img", range(1, 3))), fps=0)
    complete = write_video(tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(complete[: len(complete) // 2])
    with pytest.raises(MotipError, match="cannot be opened"):
        open_source(str(tmp_path / "cut.mp4"))


def test_audio_file_is_an_error(tmp_path: Path) -> None:
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(MotipError, match="no video stream"):
        open_source(str(path))


def test_damaged_packets_are_counted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "in.avi", frames=30)
    data = bytearray(path.read_bytes())
    for start in (len(data) // 3, len(data) // 2, 2 * len(data) // 3):
        data[start : start + 400] = bytes(400)
    path.write_bytes(data)
    source = open_source(str(path))
    decoded = sum(1 for _ in source)
    assert decoded > 0 and decoded + source.damaged <= 30


def test_unsupported_codec_is_an_error(tmp_path: Path) -> None:
    path = write_video(tmp_path / "in.avi")
    data = path.read_bytes()
    assert data.count(b"FMP4") >= 2
    path.write_bytes(data.replace(b"FMP4", b"QQQQ"))
    with pytest.raises(MotipError, match="no decoder for this video"):
        open_source(str(path))


def test_container_without_frames_is_an_error(tmp_path: Path) -> None:
    path = write_video(tmp_path / "in.avi", frames=0)
    with pytest.raises(MotipError, match="no frames"):
        list(open_source(str(path)))
