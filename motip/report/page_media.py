"""Sections of the report page with images and videos: dashboards, side-by-side videos, failure sheets."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from motip.report.markup import Markup, tag
from motip.report.page_facts import ImageFile, StageFacts
from motip.report.page_parts import section

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


def dashboards_section(stages: Iterable[StageFacts]) -> Markup:
    """The dashboard of each stage that has one."""
    parts = []
    for stage in stages:
        if stage.dashboard is None:
            parts.append(tag("p", f"{stage.name}: no dashboard.png in its folder", class_="quiet"))
            continue
        label = f"{stage.name}: dashboard with the curves of its training"
        parts.append(tag("details", tag("summary", stage.name), _image(stage.dashboard, label), open=True))
    return section("dashboards", "Dashboards", parts)


def videos_section(videos: Sequence[PageVideo]) -> Markup:
    """The side-by-side videos, one per domain."""
    parts: list[Markup] = []
    for each in videos:
        parts.append(tag("h3", each.title))
        if not each.file:
            parts.append(tag("p", each.text, class_="quiet"))
            continue
        link = tag("a", "open the file", href=each.file)
        video = tag(
            "video",
            src=each.file,
            poster=_data("jpeg", each.poster) if each.poster else None,
            controls=True,
            preload="metadata",
            playsinline=True,
            aria_label=f"{each.title}: {each.text}",
        )
        parts.append(tag("figure", video, tag("figcaption", each.text, " · ", link)))
    if not videos:
        parts.append(tag("p", "No sequence could be shown.", class_="quiet"))
    return section("videos", "The same sequence by each stage", parts)


def failures_section(stages: Iterable[StageFacts]) -> Markup:
    """The failure sheets of each stage."""
    parts = []
    for stage in stages:
        if not stage.sheets:
            parts.append(tag("p", f"{stage.name}: no failure sheets in its folder", class_="quiet"))
            continue
        figures = [
            tag("figure", _image(each, f"{stage.name}: failure sheet {each.name}"), tag("figcaption", each.name))
            for each in stage.sheets
        ]
        more = tag("p", f"{stage.more_sheets} more sheets are in {stage.folder}") if stage.more_sheets else None
        count = f"{stage.name}: {len(stage.sheets)} {'sheet' if len(stage.sheets) == 1 else 'sheets'}"
        parts.append(
            tag(
                "details",
                tag("summary", count),
                tag("div", figures, class_="sheets"),
                tag("p", more) if more else None,
                open=True,
            )
        )
    return section("failures", "Failure sheets", parts)


def _image(file: ImageFile, alt: str) -> Markup:
    """The image embedded as a data URI."""
    pixels = cv2.imdecode(np.frombuffer(file.content, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        return tag("p", f"{file.name} cannot be decoded", class_="quiet")
    height, width = pixels.shape[:2]
    address = _data("png", file.content)
    if len(file.content) > INLINE_BYTES:
        if width > INLINE_WIDTH:
            height, width = round(height * INLINE_WIDTH / width), INLINE_WIDTH
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        address = _data("jpeg", _jpeg(pixels, 88))
    return tag("img", src=address, alt=alt, width=width, height=height)


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


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
