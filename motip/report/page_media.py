"""The sections of the report page that hold pictures and videos."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from motip.report.markup import Markup, tag
from motip.report.page_facts import Picture, StageFacts
from motip.report.page_parts import section

INLINE_BYTES = 400_000
"""A larger picture goes into the page as JPEG: sheets of photographs are several times smaller so."""
INLINE_WIDTH = 1800
"""Pixels; wider pictures are reduced to it."""
POSTER_WIDTH = 960


@dataclass(frozen=True)
class Clip:
    """A video beside the page.

    Attributes:
        title: the domain.
        file: relative to the page; empty where there is none.
        text: which sequence, by which stages; or why there is no video.
        poster: JPEG that stands there until the video plays, and on paper.
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


def videos_section(clips: Sequence[Clip]) -> Markup:
    """The side-by-side videos."""
    parts: list[Markup] = []
    for clip in clips:
        parts.append(tag("h3", clip.title))
        if not clip.file:
            parts.append(tag("p", clip.text, class_="quiet"))
            continue
        link = tag("a", "open the file", href=clip.file)
        video = tag(
            "video",
            src=clip.file,
            poster=_data("jpeg", clip.poster) if clip.poster else None,
            controls=True,
            preload="metadata",
            playsinline=True,
            aria_label=f"{clip.title}: {clip.text}",
        )
        parts.append(tag("figure", video, tag("figcaption", clip.text, " · ", link)))
    if not clips:
        parts.append(tag("p", "No sequence could be shown.", class_="quiet"))
    return section("videos", "The same sequence by each stage", parts)


def failures_section(stages: Iterable[StageFacts]) -> Markup:
    """Failure sheets of each stage that has some."""
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


def _image(picture: Picture, alt: str) -> Markup:
    """The picture inside the page."""
    pixels = cv2.imdecode(np.frombuffer(picture.content, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        return tag("p", f"{picture.name} is no picture that can be read", class_="quiet")
    height, width = pixels.shape[:2]
    address = _data("png", picture.content)
    if len(picture.content) > INLINE_BYTES:
        if width > INLINE_WIDTH:
            height, width = round(height * INLINE_WIDTH / width), INLINE_WIDTH
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        address = _data("jpeg", _jpeg(pixels, 88))
    return tag("img", src=address, alt=alt, width=width, height=height)


def poster_of(pixels: np.ndarray) -> bytes:
    """JPEG of an (H, W, 3) uint8 RGB image, reduced to POSTER_WIDTH."""
    height, width = pixels.shape[:2]
    if width > POSTER_WIDTH:
        size = (POSTER_WIDTH, round(height * POSTER_WIDTH / width))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return _jpeg(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), 80)


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """JPEG of a BGR image."""
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
