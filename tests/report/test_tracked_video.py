"""Annotated videos: frames, MOT rows, early stops, and errors that leave no file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from motip.config import load_config
from motip.data.formats.result_files import read_mot
from motip.data.video_reader import open_source
from motip.errors import MotipError
from motip.model import MOTIP
from motip.report.tracked_video import checked_output, track_video
from motip.tracking.api import TrackIterator, track_sequence
from motip.tracking.detections import Detections
from motip.tracking.settings import TrackerSettings
from motip.train.setup import fresh_model
from tests.helpers.videos import facts, write_video

SETTINGS = TrackerSettings(
    det_thresh=0.01, newborn_thresh=0.01, short_side=96, max_longer=160, miss_tolerance=4, longterm_patience=5
)


@pytest.fixture(scope="module")
def model(repo_root: Path) -> MOTIP:
    return fresh_model(load_config(repo_root / "configs/demo/motip_tiny.yaml"))


def tracking(model: MOTIP, path: Path) -> TrackIterator:
    return TrackIterator(model, open_source(str(path)), SETTINGS, ("pedestrian",))


def test_video_and_rows_have_the_same_tracks(tmp_path: Path, model: MOTIP) -> None:
    running = tracking(model, write_video(tmp_path / "in.mp4"))
    source = running.source
    shown: list[Detections] = []
    done = track_video(running, tmp_path / "out.mp4", on_frame=shown.append)
    found = facts(done.video)
    assert (found.codec, found.pixels, found.frames, found.fps) == ("h264", "yuv420p", 7, 12)
    assert [each.frame for each in shown] == list(range(7)) and done.frames == 7
    assert done.recalled == sum(int(each.recalled.sum()) for each in shown) == done.result.counters["recalled"]
    rows = read_mot(done.rows)
    assert len(rows) == len(done.result.rows) > 0
    assert done.tracks == len(set(rows.track_ids.tolist()))
    # The tracks equal those of the tracker without drawing.
    plain = track_sequence(model, open_source(source.path), SETTINGS).rows
    order = np.lexsort((plain.track_ids, plain.frames))
    assert (plain.track_ids[order] == rows.track_ids).all()
    assert np.abs(plain.boxes_xyxy[order] - rows.boxes_xyxy).max() < 1e-3
    # Something was drawn, and the bar darkens the top.
    image = next(iter(source))[1]
    assert np.abs(found.images[0][40:].astype(int) - image[40:]).max() > 60
    assert found.images[0][:4, -30:].mean() < image[:4, -30:].mean() / 2


def test_early_stop_leaves_two_complete_files(tmp_path: Path, model: MOTIP) -> None:
    shown: list[Detections] = []
    done = track_video(
        tracking(model, write_video(tmp_path / "in.mp4")),
        tmp_path / "out.mp4",
        on_frame=shown.append,
        stopped=lambda: len(shown) >= 3,
    )
    assert done.frames == facts(done.video).frames == 3
    assert read_mot(done.rows).frames.max() == 2


def test_frames_of_different_sizes_leave_no_file(tmp_path: Path, model: MOTIP) -> None:
    import cv2

    folder = tmp_path / "frames"
    folder.mkdir()
    for number, width in ((1, 160), (2, 160), (3, 120)):
        cv2.imwrite(str(folder / f"{number:06d}.png"), np.zeros((96, width, 3), np.uint8))
    with pytest.raises(MotipError, match="differ in size"):
        track_video(tracking(model, folder), tmp_path / "out" / "x.mp4")
    assert list((tmp_path / "out").iterdir()) == []


def test_invalid_outputs_are_errors_before_tracking(tmp_path: Path) -> None:
    assert checked_output(str(tmp_path / "new" / "a.mp4")) == tmp_path / "new" / "a.mp4"
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(MotipError, match="cannot be written"):
        checked_output(str(tmp_path / "file" / "a.mp4"))
    with pytest.raises(MotipError, match="written as MP4"):
        checked_output(str(tmp_path / "a.avi"))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(MotipError, match="is a folder"):
        checked_output(str(tmp_path / "folder.mp4"))


def test_missing_encoder_is_an_error_before_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    def fail(name: str, mode: str) -> None:
        raise av.codec.codec.UnknownCodecError(name)

    monkeypatch.setattr(av, "Codec", fail)
    with pytest.raises(MotipError, match=r"no H\.264 encoder"):
        checked_output(str(tmp_path / "a.mp4"))
