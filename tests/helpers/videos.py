"""Small videos of a moving square, written with PyAV directly instead of the project's writer."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np


def picture(number: int, height: int = 96, width: int = 160) -> np.ndarray:
    """(H, W, 3) uint8 RGB: a red square that moves four pixels a frame over a grey slope."""
    image = np.empty((height, width, 3), np.uint8)
    image[:] = np.linspace(60, 200, width, dtype=np.uint8)[None, :, None]
    left = 8 + 4 * number
    image[30:54, left : left + 24] = (220, 30, 30)
    return image


def write_video(
    path: Path, frames: int = 7, fps: Fraction | int = 12, codec: str = "mpeg4", size: tuple[int, int] = (96, 160)
) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        container.start_encoding()  # writes the header even without frames
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_images(folder: Path, numbers: range, name: str = "{:08d}.png") -> Path:
    folder.mkdir(parents=True)
    for index, number in enumerate(numbers):
        cv2.imwrite(str(folder / name.format(number)), picture(index)[..., ::-1])
    return folder


@dataclass(frozen=True)
class VideoFacts:
    """Properties of a video file; ``index_first``: the moov atom precedes the data, as streaming playback needs."""

    codec: str
    pixels: str
    fps: Fraction
    frames: int
    size: tuple[int, int]
    index_first: bool
    images: list[np.ndarray]


def facts(path: Path) -> VideoFacts:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        data = path.read_bytes()
        return VideoFacts(
            stream.codec_context.name,
            str(stream.codec_context.pix_fmt),
            Fraction(stream.average_rate or 0),
            len(images),
            (stream.height, stream.width),
            data.find(b"moov") < data.find(b"mdat"),
            images,
        )
