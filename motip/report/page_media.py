"""Images and videos of the report page: embedded images, posters, captions."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import cv2
import numpy as np

from motip.report.page_facts import PageImage

INLINE_BYTES = 400_000
"""Larger images are embedded as JPEG, which makes sheets of photographs several times smaller."""
INLINE_WIDTH = 1800
"""Largest width in pixels of an image embedded as JPEG; wider ones are reduced."""
POSTER_WIDTH = 960


@dataclass(frozen=True)
class PageVideo:
    """A side-by-side video of the page.

    Attributes:
        title: the domain.
        file: path relative to the page; empty if there is no video.
        text: caption: sequence and stages, or the reason why there is no video.
        poster: JPEG shown until the video plays, and in print.
    """

    title: str
    file: str
    text: str
    poster: bytes = b""


@dataclass(frozen=True)
class EmbeddedImage:
    """An image as a data URI; width and height in pixels."""

    uri: str
    width: int
    height: int


def embed(file: PageImage) -> EmbeddedImage | None:
    """The image as a data URI, reduced if it is large; None if it cannot be decoded."""
    pixels = cv2.imdecode(np.frombuffer(file.content, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        return None
    height, width = pixels.shape[:2]
    if len(file.content) <= INLINE_BYTES:
        return EmbeddedImage(data_uri(file.content, "png"), width, height)
    if width > INLINE_WIDTH:
        height, width = round(height * INLINE_WIDTH / width), INLINE_WIDTH
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return EmbeddedImage(data_uri(_jpeg(pixels, 88), "jpeg"), width, height)


def poster_jpeg(pixels: np.ndarray) -> bytes:
    """JPEG of an (H, W, 3) uint8 RGB image, reduced to POSTER_WIDTH."""
    height, width = pixels.shape[:2]
    if width > POSTER_WIDTH:
        size = (POSTER_WIDTH, round(height * POSTER_WIDTH / width))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return _jpeg(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), 80)


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """JPEG of an (H, W, 3) uint8 BGR image; quality 0..100."""
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def data_uri(content: bytes, kind: str) -> str:
    """Data URI of an encoded image; kind is its format, such as jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
