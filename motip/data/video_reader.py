"""Video reader: frames of video files (PyAV), numbered images and folders of images."""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from motip.data.decode import decode_rgb
from motip.data.formats.common import IMAGE_SUFFIXES, read_seqinfo, trailing_number
from motip.errors import MotipError

_IMAGE_FPS = Fraction(30)
"""Default frame rate of numbered images, without seqinfo.ini and --fps."""
_PATTERN = re.compile(r"%(0\d+)?d")


class VideoSource(ABC):
    """Frames of a video in order, decoded on demand.

    Iterating yields (0-based frame number, (H, W, 3) uint8 RGB). Frames of a video file are counted; numbered images
    keep the numbers of their names, so that MOT rows written from them refer to the same files.

    Attributes:
        path: as the user gave it.
        fps: frames per second.
        frames: number of frames, None if the file does not state it.
        notes: assumptions made.
        damaged: number of packets that could not be decoded so far.
    """

    def __init__(self, path: str, fps: Fraction, frames: int | None, notes: tuple[str, ...] = ()) -> None:
        self.path = path
        self.fps = fps
        self.frames = frames
        self.notes = notes
        self.damaged = 0

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """(frame number, (H, W, 3) uint8 RGB) in order."""


def open_source(
    path: str, *, start: int | None = None, end: int | None = None, fps: float | None = None
) -> VideoSource:
    """Open a video file, a pattern such as ``img1/%08d.jpg``, or a folder of images.

    Args:
        start: first frame, counted from 1 (for images: the number in the name).
        end: last frame, included.
        fps: overrides the frame rate of the source.

    Raises:
        MotipError: no such file, not a video, or no frame in the range.
    """
    if (start is not None and start < 1) or (end is not None and end < (start or 1)):
        raise MotipError(
            "the frame range is empty",
            where="--start_frame, --end_frame",
            found=f"{start if start is not None else 1}..{end}",
            expected="1 <= start_frame <= end_frame (frames count from 1)",
        )
    first, last = (start or 1) - 1, None if end is None else end - 1
    rate = None if fps is None else _checked_rate(fps)
    file = Path(path).expanduser()
    if _PATTERN.search(file.name) or file.is_dir():
        return _ImageSource(path, _numbered_files(file), first, last, rate)
    if not file.is_file():
        raise MotipError(
            "no such video",
            where=file,
            expected="a video file, a pattern such as img1/%08d.jpg, or a folder of images",
            fix="check --video_path",
        )
    return _FileSource(path, first, last, rate)


class _FileSource(VideoSource):
    """A video file."""

    def __init__(self, path: str, first: int, last: int | None, rate: Fraction | None) -> None:
        import av

        self._file = Path(path).expanduser()
        self._first, self._last = first, last
        with _readable(self._file) as container:
            stream = container.streams.video[0]
            stated = stream.average_rate or stream.guessed_rate
            if rate is None and not stated:
                raise MotipError("the video does not state its frame rate", where=self._file, fix="set --fps")
            count = stream.frames
            if not count and container.duration and stated:
                count = round(container.duration / av.time_base * stated)
        frames = None
        if count:
            frames = max(0, min(count, count if last is None else last + 1) - first)
        super().__init__(path, rate or Fraction(stated).limit_denominator(100_000), frames)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        decoded = 0
        with _readable(self._file) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in self._decode(container, stream):
                number, decoded = decoded, decoded + 1
                if self._last is not None and number > self._last:
                    break
                if number >= self._first:
                    # Phones store frames in sensor orientation with a rotation tag.
                    image = frame.to_ndarray(format="rgb24")
                    turns = round(frame.rotation / 90) % 4
                    yield number, np.ascontiguousarray(np.rot90(image, turns)) if turns else image
        if decoded <= self._first:
            raise MotipError(
                "the video has no frames" if not decoded else "the video is shorter than the requested range",
                where=self._file,
                found=f"{decoded} frames" + (f", {self.damaged} damaged packets" if self.damaged else ""),
                expected=f"frame {self._first + 1}" if decoded else "at least one frame that decodes",
                fix="check the file with a player, or correct --start_frame",
            )

    def _decode(self, container: Any, stream: Any) -> Iterator[Any]:
        import av

        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                self.damaged += 1


class _ImageSource(VideoSource):
    """Numbered images."""

    def __init__(
        self, path: str, files: list[tuple[int, Path]], first: int, last: int | None, rate: Fraction | None
    ) -> None:
        chosen = [(number, file) for number, file in files if number >= first and (last is None or number <= last)]
        if not chosen:
            raise MotipError(
                "no image is in the requested range",
                where="--start_frame, --end_frame",
                found=f"images {files[0][0] + 1} to {files[-1][0] + 1}",
                expected=f"some of {first + 1}..{'' if last is None else last + 1}",
            )
        stated = rate or _stated_rate(files[0][1].parent)
        notes = () if stated else (f"the images state no frame rate, {_IMAGE_FPS} is assumed (--fps overrides it)",)
        super().__init__(path, stated or _IMAGE_FPS, len(chosen), notes)
        self._files = chosen

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for number, file in self._files:
            yield number, decode_rgb(file.read_bytes(), where=file)


def _numbered_files(path: Path) -> list[tuple[int, Path]]:
    """Image files of a folder or pattern with their 0-based frame numbers, in order."""
    if path.is_dir():
        folder = path / "img1" if (path / "img1").is_dir() else path
        files = sorted(file for file in folder.iterdir() if file.suffix in IMAGE_SUFFIXES)
        numbers = [(trailing_number(file.stem), file) for file in files]
        found = [(number, file) for number, file in numbers if number is not None]
        if len({number for number, _ in found}) < len(files):  # names without numbers, or duplicate numbers
            found = list(enumerate(files, start=1))
    else:
        folder = path.parent
        match = _PATTERN.search(path.name)
        assert match is not None
        digits = rf"(\d{{{int(match[1])},}})" if match[1] else r"(0|[1-9]\d*)"
        name = re.compile(re.escape(path.name[: match.start()]) + digits + re.escape(path.name[match.end() :]))
        matched = [(name.fullmatch(file.name), file) for file in folder.iterdir()] if folder.is_dir() else []
        found = [(int(hit[1]), file) for hit, file in matched if hit]
    if not found:
        raise MotipError(
            "no images found",
            where=path,
            found=f"folder {folder} {'without a matching file' if folder.is_dir() else 'does not exist'}",
            expected="files such as 00000001.jpg",
            fix="check --video_path",
        )
    found.sort()
    # Names count from 1 (all benchmarks) or from 0; both start at frame number 0.
    offset = 1 if found[0][0] >= 1 else 0
    return [(number - offset, file) for number, file in found]


def _stated_rate(folder: Path) -> Fraction | None:
    """Frame rate from a MOTChallenge seqinfo.ini next to the image folder, or None."""
    info = folder.parent / "seqinfo.ini"
    if not info.is_file():
        return None
    (rate,) = read_seqinfo(info, {"frameRate": float}, fix="set --fps")
    return _checked_rate(rate)


def _checked_rate(fps: float) -> Fraction:
    if not 0 < fps <= 1000:
        raise MotipError("invalid frame rate", where="--fps", found=fps, expected="frames per second, above 0")
    return Fraction(fps).limit_denominator(1001)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[Any]:
    import av

    try:
        container = av.open(str(path))
    except av.error.FFmpegError as error:
        raise MotipError(
            "the video cannot be opened",
            where=path,
            found=error.strerror,
            expected="a complete video file that FFmpeg reads (mp4, mkv, avi, mov, webm, …)",
            fix="check with a player whether it is damaged or still being written",
        ) from error
    with container:
        if not container.streams.video:
            raise MotipError(
                "the file has no video stream", where=path, found=f"{len(container.streams)} other streams"
            )
        if container.streams.video[0].codec_context is None:
            raise MotipError(
                "no decoder for this video",
                where=path,
                found="a codec that the installed FFmpeg (PyAV) does not support",
                expected="a common codec such as H.264, H.265, VP9, AV1 or MPEG-4",
                fix="convert it, for example: ffmpeg -i VIDEO -c:v libx264 converted.mp4",
            )
        yield container
