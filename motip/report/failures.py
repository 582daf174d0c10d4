"""Failure pictures: videos of a tracker's worst moments and a contact sheet of its worst sequences."""

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
from motip.report.failure_drawing import GROUND, framed, headline, legend, paint, whole_view, zoomed_view
from motip.report.failure_segments import (
    FALSE,
    KINDS,
    MISSED,
    SWITCH,
    SWITCH_WEIGHT,
    JudgedVideo,
    Moment,
    worst_frames,
    worst_moments,
    worst_sequences,
)
from motip.report.video_writer import VideoWriter
from motip.storage.atomic import atomic_write, write_json_atomic
from motip.storage.paths import Location, RemotePath, put, read_json

SHEET = "contact_sheet.png"
INDEX = "errors.json"
ROWS, COLUMNS = 5, 3
TILE = (500, 282)
"""Width and height of a frame on the contact sheet, in pixels."""
CAPTION = 22
CRF = 18
"""Finer than other videos: thin dashes survive."""


@dataclass(frozen=True)
class Failures:
    """What was found and written.

    Attributes:
        sequences: videos with errors, the worst first.
        moments: those that have a video, the worst first.
        files: names in the folder.
        flawless: videos without an error.
    """

    sequences: list[JudgedVideo]
    moments: list[Moment]
    files: list[str]
    flawless: int

    def table(self, most: int = 20) -> tuple[list[str], list[list[str]]]:
        """Header and rows of text, the worst sequences first."""
        header = ["sequence", "boxes", "missed", "ID switches", "false pos.", "ignored", "wrong %"]
        rows = []
        for video in self.sequences[:most]:
            counts = video.counts()
            cells = [video.boxes, counts[MISSED], counts[SWITCH], counts[FALSE], counts["ignored"]]
            rows.append([video.title, *map(str, cells), f"{100 * video.wrong_share:.1f}"])
        if len(self.sequences) > most:
            rows.append([f"and {len(self.sequences) - most} more", *[""] * (len(header) - 1)])
        return header, rows


def write_failures(videos: Iterable[JudgedVideo], folder: Location, title: str, clips: int = 6) -> Failures:
    """Write the contact sheet, the index and up to ``clips`` videos; those of an earlier call are removed.

    Args:
        folder: a local one exists and can be written.
        title: what was judged, for the sheet.

    Raises:
        MotipError: an image is missing or damaged, or a file cannot be written.
    """
    if isinstance(folder, RemotePath):
        with tempfile.TemporaryDirectory(prefix="motip-") as place:
            found = write_failures(videos, Path(place), title, clips)
            _remove_earlier(folder)
            for name in found.files:
                put(Path(place) / name, folder / name)
        return found
    judged = list(videos)
    sequences = worst_sequences(judged)
    moments = worst_moments(sequences, clips) if clips else []
    names = [_name(rank, moment) for rank, moment in enumerate(moments, start=1)]
    _remove_earlier(folder)
    if sequences:
        _write_picture(folder / SHEET, contact_sheet(sequences, title, len(judged)))
    for rank, (moment, name) in enumerate(zip(moments, names, strict=True), start=1):
        write_clip(moment, folder / name, f"{rank}/{len(moments)}")
    files = [*([SHEET] if sequences else []), INDEX, *names]
    found = Failures(sequences, moments, files, len(judged) - len(sequences))
    write_json_atomic(folder / INDEX, _index(found, title, names))
    return found


def contact_sheet(sequences: Sequence[JudgedVideo], title: str, of: int) -> np.ndarray:
    """(H, W, 3) RGB: a row for each of the worst sequences, its worst frames from left to right.

    Args:
        sequences: with errors, the worst first.
        of: how many videos were judged.
    """
    width = COLUMNS * TILE[0] + (COLUMNS + 1) * 6
    shown = sequences[:ROWS]
    what = f"{title}: the worst {len(shown)} of {of} sequences, their worst frames from left to right"
    parts = [headline(what, width, 48, 0.8), legend(width, 40)]
    for rank, video in enumerate(shown, start=1):
        parts.append(headline(f"{rank}. {_told(video)}", width, 34, 0.55))
        parts.append(_row(video, width))
    return np.concatenate([*parts, np.full((8, width, 3), GROUND, np.uint8)])


def write_clip(moment: Moment, path: Path, rank: str = "") -> None:
    """Write a moment as H.264 at the video's own rate, with a legend below the picture.

    Raises:
        MotipError: an image is missing, or the file cannot be written.
    """
    video = moment.video
    positions = range(moment.first, moment.last + 1)
    with VideoWriter(path, Fraction(video.fps).limit_denominator(1001), CRF) as writer:
        for position, image in zip(positions, video.images(positions), strict=True):
            view = whole_view(image.shape[1], image.shape[0])
            picture = paint(image, video.marks(position, hold=True), view)
            told = headline(
                f"{rank}  {video.title}  {_frame_told(video, position)}".strip(), view.shown_width, 30, 0.55
            )
            writer.write(np.concatenate([told, picture, legend(view.shown_width)]))


def _row(video: JudgedVideo, width: int) -> np.ndarray:
    """The worst frames of a video side by side."""
    row = np.full((CAPTION + TILE[1] + 6, width, 3), GROUND, np.uint8)
    positions = worst_frames(video, COLUMNS)
    for column, (position, image) in enumerate(zip(positions, video.images(positions), strict=True)):
        marks = video.marks(position)
        view = zoomed_view(image.shape[1], image.shape[0], TILE, marks)
        enlarged = view.width < image.shape[1] or view.height < image.shape[0]
        told = _frame_told(video, position) + (" (part of the picture)" if enlarged else "")
        x = 6 + column * (TILE[0] + 6)
        row[:CAPTION, x : x + TILE[0]] = headline(told, TILE[0], CAPTION, 0.48, (190, 190, 190))
        row[CAPTION : CAPTION + TILE[1], x : x + TILE[0]] = framed(paint(image, marks, view), *TILE)
    return row


def _told(video: JudgedVideo) -> str:
    counts = video.counts()
    return (
        f"{video.title}: {100 * video.wrong_share:.0f} % wrong: {counts[MISSED]} missed, {counts[FALSE]} false "
        f"positives, {counts[SWITCH]} ID switches, {video.boxes} labelled boxes in {len(video.frames)} frames"
    )


def _frame_told(video: JudgedVideo, position: int) -> str:
    counts = video.counts(position, position)
    parts = [(counts[MISSED], "missed"), (counts[FALSE], "false"), (counts[SWITCH], "switched")]
    told = ", ".join(f"{number} {what}" for number, what in parts if number) or "no error"
    return f"frame {int(video.frames[position]) + 1}: {told}"


def _name(rank: int, moment: Moment) -> str:
    """Such as ``01_aerial_uav0001_frames_12-71.mp4``; frames count from 1."""
    first, last = (int(moment.video.frames[position]) + 1 for position in (moment.first, moment.last))
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in moment.video.title)
    return f"{rank:02d}_{plain}_frames_{first}-{last}.mp4"


def _write_picture(path: Path, picture: np.ndarray) -> None:
    done, data = cv2.imencode(".png", picture[..., ::-1])
    if not done:
        raise MotipError("the contact sheet could not be encoded as PNG", where=path, found=str(picture.shape))
    with atomic_write(path) as temporary:
        temporary.write_bytes(data.tobytes())


def _remove_earlier(folder: Location) -> None:
    """Remove what the index of an earlier call names: its clips have other names and would stand beside the new."""
    if not (folder / INDEX).is_file():
        return
    for name in read_json(folder / INDEX).get("files", []):
        path = folder / Path(name).name
        if path.name == SHEET or path.suffix == ".mp4":
            path.unlink(missing_ok=True)


def _index(found: Failures, title: str, names: Sequence[str]) -> dict[str, Any]:
    """Everything shown, in words and numbers; frames and ids count from 1, as in the pictures and MOT files."""
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
                "sequence": moment.video.title,
                "first_frame": int(moment.video.frames[moment.first]) + 1,
                "last_frame": int(moment.video.frames[moment.last]) + 1,
                "worst_frame": int(moment.video.frames[moment.worst]) + 1,
                "weight": moment.weight,
                **moment.counts,
                "switches": moment.video.switches(moment.first, moment.last),
            }
            for moment, name in zip(found.moments, names, strict=True)
        ],
    }
