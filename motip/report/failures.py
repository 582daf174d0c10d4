"""Failure report: videos of a tracker's worst segments, a contact sheet of its worst sequences, and a JSON index."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from motip.errors import MotipError
from motip.report.failure_drawing import (
    GROUND,
    caption_bar,
    centred,
    draw_annotations,
    full_view,
    legend,
    zoomed_view,
)
from motip.report.failure_segments import (
    FALSE,
    KINDS,
    MISSED,
    SWITCH,
    SWITCH_WEIGHT,
    FailureSegment,
    MatchedVideo,
    worst_frames,
    worst_segments,
    worst_sequences,
)
from motip.report.video_writer import VideoWriter
from motip.storage.paths import Location, RemotePath, read_json, upload, write_bytes, write_json

_SHEET = "contact_sheet.png"
_INDEX = "errors.json"
ROWS, COLUMNS = 5, 3
TILE = (500, 282)
"""Width and height of a frame on the contact sheet, in pixels."""
_CAPTION = 22
CRF = 18
"""Finer than that of other videos, so that thin dashes survive the compression."""


@dataclass(frozen=True)
class Failures:
    """A written failure report.

    Attributes:
        sequences: videos with errors, the worst first.
        segments: those that have a video file, the worst first.
        files: names in the folder.
        flawless: number of videos without an error.
    """

    sequences: list[MatchedVideo]
    segments: list[FailureSegment]
    files: list[str]
    flawless: int

    def table(self, limit: int = 20) -> tuple[list[str], list[list[str]]]:
        """Header and rows of text of the ``limit`` worst sequences, the worst first."""
        header = ["sequence", "boxes", "missed", "ID switches", "false pos.", "ignored", "wrong %"]
        rows = []
        for video in self.sequences[:limit]:
            counts = video.counts()
            cells = [video.boxes, counts[MISSED], counts[SWITCH], counts[FALSE], counts["ignored"]]
            rows.append([video.title, *map(str, cells), f"{100 * video.wrong_share:.1f}"])
        if len(self.sequences) > limit:
            rows.append([f"and {len(self.sequences) - limit} more", *[""] * (len(header) - 1)])
        return header, rows


def write_failures(videos: Iterable[MatchedVideo], folder: Location, title: str, clips: int = 6) -> Failures:
    """Write the contact sheet, the index and up to ``clips`` segment videos; files of an earlier call are removed.

    Args:
        folder: a local folder must exist and be writable.
        title: heading of the sheet: checkpoint and split.

    Raises:
        MotipError: an image is missing or damaged, or a file cannot be written.
    """
    if isinstance(folder, RemotePath):
        with tempfile.TemporaryDirectory(prefix="motip-") as temporary:
            found = write_failures(videos, Path(temporary), title, clips)
            _remove_earlier(folder)
            for name in found.files:
                upload(Path(temporary) / name, folder / name)
        return found
    matched = list(videos)
    sequences = worst_sequences(matched)
    segments = worst_segments(sequences, clips) if clips else []
    names = [_name(rank, segment) for rank, segment in enumerate(segments, start=1)]
    _remove_earlier(folder)
    if sequences:
        _write_picture(folder / _SHEET, contact_sheet(sequences, title, len(matched)))
    for rank, (segment, name) in enumerate(zip(segments, names, strict=True), start=1):
        _write_clip(segment, folder / name, f"{rank}/{len(segments)}")
    files = [*([_SHEET] if sequences else []), _INDEX, *names]
    found = Failures(sequences, segments, files, len(matched) - len(sequences))
    write_json(folder / _INDEX, _index(found, title, names))
    return found


def contact_sheet(sequences: Sequence[MatchedVideo], title: str, of: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB: a row for each of the worst sequences, its worst frames from left to right.

    Args:
        sequences: with errors, the worst first.
        of: number of matched videos, with and without errors.
    """
    width = COLUMNS * TILE[0] + (COLUMNS + 1) * 6
    shown = sequences[:ROWS]
    what = f"{title}: the worst {len(shown)} of {of} sequences, their worst frames from left to right"
    parts = [caption_bar(what, width, 48, 0.8), legend(width, 40)]
    for rank, video in enumerate(shown, start=1):
        parts.append(caption_bar(f"{rank}. {_sequence_caption(video)}", width, 34, 0.55))
        parts.append(_row(video, width))
    return np.concatenate([*parts, np.full((8, width, 3), GROUND, np.uint8)])


def _write_clip(segment: FailureSegment, path: Path, rank: str = "") -> None:
    """Write a segment as H.264 at the video's own frame rate, with a legend below the picture.

    Raises:
        MotipError: an image is missing, or the file cannot be written.
    """
    video = segment.video
    positions = range(segment.first, segment.last + 1)
    with VideoWriter(path, Fraction(video.fps).limit_denominator(1001), CRF) as writer:
        for position, image in zip(positions, video.images(positions), strict=True):
            view = full_view(image.shape[1], image.shape[0])
            picture = draw_annotations(image, video.annotations(position, repeat_switches=True), view)
            caption = f"{rank}  {video.title}  {_frame_caption(video, position)}".strip()
            strip = caption_bar(caption, view.shown_width, 30, 0.55)
            writer.write(np.concatenate([strip, picture, legend(view.shown_width)]))


def _row(video: MatchedVideo, width: int) -> np.ndarray:
    """The worst frames of a video side by side, each below its caption."""
    row = np.full((_CAPTION + TILE[1] + 6, width, 3), GROUND, np.uint8)
    positions = worst_frames(video, COLUMNS)
    for column, (position, image) in enumerate(zip(positions, video.images(positions), strict=True)):
        annotations = video.annotations(position)
        view = zoomed_view(image.shape[1], image.shape[0], TILE, annotations)
        enlarged = view.width < image.shape[1] or view.height < image.shape[0]
        caption = _frame_caption(video, position) + (" (part of the picture)" if enlarged else "")
        x = 6 + column * (TILE[0] + 6)
        row[:_CAPTION, x : x + TILE[0]] = caption_bar(caption, TILE[0], _CAPTION, 0.48, (190, 190, 190))
        tile = centred(draw_annotations(image, annotations, view), *TILE)
        row[_CAPTION : _CAPTION + TILE[1], x : x + TILE[0]] = tile
    return row


def _sequence_caption(video: MatchedVideo) -> str:
    counts = video.counts()
    return (
        f"{video.title}: {100 * video.wrong_share:.0f} % wrong: {counts[MISSED]} missed, {counts[FALSE]} false "
        f"positives, {counts[SWITCH]} ID switches, {video.boxes} labelled boxes in {len(video.frames)} frames"
    )


def _frame_caption(video: MatchedVideo, position: int) -> str:
    counts = video.counts(position, position)
    parts = [(counts[MISSED], "missed"), (counts[FALSE], "false"), (counts[SWITCH], "switched")]
    counted = ", ".join(f"{number} {what}" for number, what in parts if number) or "no error"
    return f"frame {int(video.frames[position]) + 1}: {counted}"


def _name(rank: int, segment: FailureSegment) -> str:
    """File name such as ``01_aerial_uav0001_frames_12-71.mp4``; frames count from 1."""
    first, last = (int(segment.video.frames[position]) + 1 for position in (segment.first, segment.last))
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in segment.video.title)
    return f"{rank:02d}_{plain}_frames_{first}-{last}.mp4"


def _write_picture(path: Path, picture: np.ndarray) -> None:
    done, data = cv2.imencode(".png", picture[..., ::-1])
    if not done:
        raise MotipError("the contact sheet could not be encoded as PNG", where=path, found=str(picture.shape))
    write_bytes(path, data.tobytes())


def _remove_earlier(folder: Location) -> None:
    """Remove the files listed in the index of an earlier call, whose videos have other names than the new ones."""
    if not (folder / _INDEX).is_file():
        return
    for name in read_json(folder / _INDEX).get("files", []):
        path = folder / Path(name).name
        if path.name == _SHEET or path.suffix == ".mp4":
            path.unlink(missing_ok=True)


def _index(found: Failures, title: str, names: Sequence[str]) -> dict[str, Any]:
    """Content of errors.json; frames and ids count from 1, as in the pictures and MOT files."""
    return {
        "title": title,
        "counting": f"frames and ids from 1; weight = missed + false positive + {SWITCH_WEIGHT} * identity switch",
        "files": found.files,
        "sequences_without_error": found.flawless,
        "sequences": [
            {
                "sequence": video.title,
                "frames": len(video.frames),
                "boxes": video.boxes,
                **{kind: video.counts()[kind] for kind in KINDS},
                "wrong_share": video.wrong_share,
                "worst_frames": [int(video.frames[each]) + 1 for each in worst_frames(video, COLUMNS)],
            }
            for video in found.sequences
        ],
        "moments": [
            {
                "file": name,
                "sequence": segment.video.title,
                "first_frame": int(segment.video.frames[segment.first]) + 1,
                "last_frame": int(segment.video.frames[segment.last]) + 1,
                "worst_frame": int(segment.video.frames[segment.worst]) + 1,
                "weight": segment.weight,
                **segment.counts,
                "switches": segment.video.switches(segment.first, segment.last),
            }
            for segment, name in zip(found.segments, names, strict=True)
        ],
    }
