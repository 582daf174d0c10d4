"""A video in, the same video with its tracks drawn on it and their MOT rows out."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from motip.data.formats.results import write_mot
from motip.errors import MotipError
from motip.model import MOTIP
from motip.report.draw import DrawnTracks, Painter
from motip.report.video import VideoSource, VideoWriter
from motip.track.run import TrackResult, track_sequence
from motip.track.settings import TrackerSettings
from motip.track.tracker import FrameTracks


@dataclass(frozen=True)
class TrackedVideo:
    """What was written.

    Attributes:
        result: the tracks.
        video, rows: the two files.
        frames: frames in the video.
        tracks: different ids among them.
        recalled: ids that the long-term memory gave back.
    """

    result: TrackResult
    video: Path
    rows: Path
    frames: int
    tracks: int
    recalled: int


def checked_output(path: str) -> Path:
    """The video's path, once it is sure that it can be written.

    Raises:
        MotipError: another suffix than .mp4, or a folder that cannot be written.
    """
    output = Path(path).expanduser()
    if output.suffix.lower() != ".mp4":
        raise MotipError(
            "the video is written as MP4", where="--output_path", found=path, expected="a path that ends in .mp4"
        )
    if output.is_dir():
        raise MotipError("the output is a folder", where="--output_path", found=path, expected="a path to a file")
    # Found out now: an hour of tracking must not end at a folder that cannot be written.
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise MotipError(
            f"the output folder cannot be written: {error.strerror}",
            where="--output_path",
            found=output.parent,
            expected="a folder this user can write to",
            fix="name another folder",
        ) from error
    return output


def track_video(
    model: MOTIP,
    source: VideoSource,
    settings: TrackerSettings,
    output: Path,
    class_names: Sequence[str],
    *,
    trail: int = 30,
    on_frame: Callable[[int], None] | None = None,
    stopped: Callable[[], bool] | None = None,
) -> TrackedVideo:
    """Track a video, draw, and write ``output`` (.mp4) and the MOT rows beside it (.txt).

    Args:
        on_frame: called after each frame with the number of frames done.
        stopped: asked before each frame; True ends the video there, with both files as they should be.

    Raises:
        MotipError: no frame, frames that do not fit, files that cannot be written; no file is left then.
    """
    painter = Painter(class_names, trail)
    waiting: dict[int, np.ndarray] = {}
    recalled: set[int] = set()
    seen: set[int] = set()
    begin = time.perf_counter()

    def frames() -> Iterator[tuple[int, np.ndarray]]:
        for number, image in source:
            if stopped is not None and stopped():
                return
            waiting[number] = image
            yield number, image

    with VideoWriter(output, source.fps) as writer:

        def draw(number: int, tracks: FrameTracks) -> None:
            ids = tracks.ids.tolist()
            # A newborn under a known id is one that the long-term memory recognised.
            recalled.update(i for i, new in zip(ids, tracks.newborn.tolist(), strict=True) if new and i in seen)
            seen.update(ids)
            rate = (writer.frames + 1) / max(time.perf_counter() - begin, 1e-9)
            bar = f"frame {number + 1}   {len(ids)} tracks   {rate:.1f} fps"
            if settings.longterm_patience:
                bar += f"   {len(recalled)} re-identified"
            drawn = DrawnTracks(tracks.ids, tracks.boxes_xyxy, tracks.class_ids, tracks.scores)
            writer.write(painter.draw(waiting.pop(number), drawn, bar))
            if on_frame is not None:
                on_frame(writer.frames)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the tracker's notes are in its result
            result = track_sequence(model, frames(), settings, on_frame=draw)
        if not writer.frames:
            raise MotipError("no frame was tracked", where=source.path, fix="let at least one frame be finished")
    rows = output.with_suffix(".txt")
    write_mot(rows, result.rows)
    return TrackedVideo(
        result, output, rows, writer.frames, len(set(result.rows.track_ids.tolist())), result.counters["recalled"]
    )
