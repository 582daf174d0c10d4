"""Annotated video: track a video, draw the tracks, write an MP4 and the MOT rows."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from motip.data.formats.result_files import write_mot
from motip.errors import MotipError
from motip.report.drawing import DrawnTracks, Painter
from motip.report.video_writer import VideoWriter, check_encoder
from motip.tracking.api import TrackIterator, TrackResult
from motip.tracking.detections import Detections


@dataclass(frozen=True)
class TrackedVideo:
    """A written video.

    Attributes:
        result: the tracks.
        video, rows: paths of the MP4 and of the MOT rows.
        frames: number of frames in the video.
        tracks: number of distinct track ids.
        recalled: number of re-identifications by the long-term memory.
    """

    result: TrackResult
    video: Path
    rows: Path
    frames: int
    tracks: int
    recalled: int


def checked_output(path: str) -> Path:
    """The path of the video, checked to be writable.

    Raises:
        MotipError: another suffix than .mp4, a folder that cannot be written, or no H.264 encoder.
    """
    check_encoder()
    output = Path(path).expanduser()
    if output.suffix.lower() != ".mp4":
        raise MotipError(
            "the video is written as MP4", where="--output_path", found=path, expected="a path that ends in .mp4"
        )
    if output.is_dir():
        raise MotipError("the output is a folder", where="--output_path", found=path, expected="a path to a file")
    check_folder(output.parent, "--output_path")
    return output


def check_folder(folder: Path, flag: str) -> None:
    """Create the folder and check that it is writable before the tracking starts.

    Args:
        flag: option that names the folder, for the error.

    Raises:
        MotipError: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MotipError(
            f"the output folder cannot be written: {error.strerror}",
            where=flag,
            found=folder,
            expected="a folder this user can write to",
            fix="name another folder",
        ) from error


def track_video(
    tracking: TrackIterator,
    output: Path,
    *,
    trail: int = 30,
    on_frame: Callable[[Detections], None] | None = None,
    stopped: Callable[[], bool] | None = None,
) -> TrackedVideo:
    """Track a video, draw, and write ``output`` (.mp4) and the MOT rows (same name, .txt).

    Args:
        trail: length of the trails in frames.
        on_frame: called with each frame after it was written.
        stopped: called after each frame; True ends the video there, with both files complete.

    Raises:
        MotipError: no frame, frames of different sizes, or files that cannot be written; no file is left behind.
    """
    painter = Painter(tracking.class_names, trail)
    recalled = 0
    begin = time.perf_counter()
    with VideoWriter(output, tracking.source.fps) as writer, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the result lists the tracker's notes
        for found in tracking:
            recalled += int(found.recalled.sum())
            rate = (writer.frames + 1) / max(time.perf_counter() - begin, 1e-9)
            bar = f"frame {found.frame + 1}   {len(found)} tracks   {rate:.1f} fps"
            if tracking.settings.longterm_patience:
                bar += f"   {recalled} re-identified"
            drawn = DrawnTracks(found.track_ids, found.boxes_xyxy, found.class_ids, found.scores)
            writer.write(painter.draw(found.image, drawn, bar))
            if on_frame is not None:
                on_frame(found)
            if stopped is not None and stopped():
                break
        if not writer.frames:
            raise MotipError("the video has no frames", where=tracking.source.path, fix="check it with a player")
    result = tracking.result
    rows = output.with_suffix(".txt")
    write_mot(rows, result.rows)
    return TrackedVideo(result, output, rows, writer.frames, len(set(result.rows.track_ids.tolist())), recalled)
