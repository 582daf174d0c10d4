"""Images and videos of the report page: embedded images, posters, captions."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import cv2
import numpy as np

from motip.storage.paths import Location

INLINE_BYTES = 400_000
"""Larger images are embedded as JPEG, which makes sheets of photographs several times smaller."""
_INLINE_WIDTH = 1800
"""Largest width in pixels of an image embedded as JPEG; wider ones are reduced."""
_POSTER_WIDTH = 960


@dataclass(frozen=True)
class PageVideo:
    """A side-by-side video of the page.

    Attributes:
        title: the domain.
        file: path relative to the page; empty if there is no video.
        text: caption: sequence and stages, or the reason why there is no video.
        poster: data URI of the image shown until the video plays, and in print.
    """

    title: str
    file: str
    text: str
    poster: str = ""


@dataclass(frozen=True)
class EmbeddedImage:
    """An image as a data URI; width and height in pixels."""

    uri: str
    width: int
    height: int


def embed(path: Location) -> EmbeddedImage | None:
    """An image file, reduced if it is large; None if it cannot be decoded."""
    content = path.read_bytes()
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        return None
    if len(content) > INLINE_BYTES:
        return _jpeg(pixels, _INLINE_WIDTH, 88)
    height, width = pixels.shape[:2]
    return EmbeddedImage(_data_uri(content, "png"), width, height)


def poster(pixels: np.ndarray) -> str:
    """Data URI of an (H, W, 3) uint8 RGB image, reduced to _POSTER_WIDTH."""
    return _jpeg(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), _POSTER_WIDTH, 80).uri


def _jpeg(pixels: np.ndarray, widest: int, quality: int) -> EmbeddedImage:
    """An (H, W, 3) uint8 BGR image as JPEG, reduced to the width ``widest``; quality 0..100."""
    height, width = pixels.shape[:2]
    if width > widest:
        height, width = round(height * widest / width), widest
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    content = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    return EmbeddedImage(_data_uri(content, "jpeg"), width, height)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
