"""HTML report of a curriculum: ``report.html``, self-contained except for the videos in ``report_files/``."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from jinja2 import Environment, PackageLoader, StrictUndefined

from motip.data.clip_loader import read_video_frames
from motip.data.manifest import Manifest, VideoEntry
from motip.errors import MotipError
from motip.evaluation.bootstrap import MEAN
from motip.evaluation.comparison import COVERAGE
from motip.report.drawing import text_colour
from motip.report.page_facts import MAX_SHEETS, PageFacts, in_one_line, read_page_facts
from motip.report.page_media import PageVideo, embed, poster
from motip.report.page_view import METRICS, change_note, heat_colour, hours, score_rows, signed
from motip.report.progress import duration
from motip.report.side_by_side import write_side_by_side
from motip.report.stage_list import read_stage_list
from motip.report.stage_tracks import TrackingOptions, choose_video, scored_domains, tracks_of
from motip.storage.paths import Location, RemotePath, files_under, upload, write_bytes

PAGE = "report.html"
FILES = "report_files"
_UNSHOWN = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\u202a-\\u202e\\u2066-\\u2069]")
"""Control characters not allowed in HTML, lone surrogates, and bidirectional overrides."""


def _shown(value: object) -> object:
    """An inserted value without the characters of ``_UNSHOWN``; the output of a macro passed through here already."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return _UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", value)
    return value


TEMPLATES = Environment(
    loader=PackageLoader("motip.report"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
)
_FILTERS = (change_note, duration, embed, heat_colour, hours, score_rows, signed, text_colour)
TEMPLATES.filters.update({each.__name__: each for each in _FILTERS})
TEMPLATES.globals.update(METRICS=METRICS, MEAN=MEAN, COVERAGE=COVERAGE, MAX_SHEETS=MAX_SHEETS)


class Attachments(Protocol):
    """The part of ``motip.lineage.Lineage`` that logs artifacts."""

    def log_artifact(self, run_id: str, file: Location, path: str = "") -> None: ...


@dataclass(frozen=True)
class Page:
    """A written page.

    Attributes:
        path: of ``report.html``.
        videos: file names in ``report_files/``.
        missing: parts that could not be shown, one line each; the page lists them too.
    """

    path: Location
    videos: tuple[str, ...]
    missing: tuple[str, ...]


def write_page(
    folder: Location,
    out: Location | None = None,
    *,
    tracking: TrackingOptions | None = None,
    lineage: Attachments | None = None,
    run_id: str = "",
    log: Callable[[str], None] = lambda text: None,
) -> Page:
    """Write the report page of a curriculum from the files in its folder.

    Args:
        folder: of the curriculum, ``curricula/NAME`` in the storage.
        out: folder for ``report.html`` and ``report_files/``; None: ``folder``.
        tracking: how to track sequences without stored tracks; None: in this process, on the CPU.
        lineage: logs page and videos as artifacts of the curriculum's run.
        run_id: id of that run; default: the one in ``stages.json``.
        log: called with a progress line before each video.

    Raises:
        MotipError: not a curriculum's folder, or files that cannot be written. Missing parts are listed on the page.
    """
    facts = read_page_facts(folder, read_stage_list(folder))
    facts = replace(facts, run_id=run_id or facts.run_id)
    target = folder if out is None else out
    with tempfile.TemporaryDirectory(prefix="motip-") as temporary:
        # Complete in a temporary folder first: MLflow logs local files, the storage may be remote.
        work = Path(temporary)
        missing = [*facts.missing_parts]
        shown = _videos(facts, tracking or TrackingOptions(), work / FILES, log, missing)
        videos = [Path(video.file).name for video in shown if video.file]
        (work / PAGE).write_text(_page_html(facts, shown, missing), encoding="utf-8")
        # Videos before the page that refers to them.
        for name in videos:
            upload(work / FILES / name, target / FILES / name)
        write_bytes(target / PAGE, (work / PAGE).read_bytes())
        _remove_old_videos(target / FILES, videos)
        if lineage is not None and facts.run_id:
            lineage.log_artifact(facts.run_id, target / PAGE, f"report/{PAGE}")
            for name in videos:
                lineage.log_artifact(facts.run_id, target / FILES / name, f"report/{FILES}/{name}")
    return Page(target / PAGE, tuple(videos), tuple(missing))


def _page_html(facts: PageFacts, videos: Sequence[PageVideo], missing: Sequence[str]) -> str:
    """The complete HTML document."""
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return TEMPLATES.get_template("page.html.j2").render(page=facts, videos=videos, missing=missing, made=made)


def open_in_browser(path: Location) -> bool:
    """Open the page in a browser if there is a display and the page is a local file; returns whether it was opened."""
    display = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if isinstance(path, RemotePath) or not display:
        return False
    return webbrowser.open(path.resolve().as_uri())


def _videos(
    facts: PageFacts, tracking: TrackingOptions, folder: Path, log: Callable[[str], None], missing: list[str]
) -> list[PageVideo]:
    """Write one video per domain; what cannot be shown is added to ``missing``, one line each."""
    domains = scored_domains(facts)
    if not domains:
        missing.append("the videos: no stage has scores, so there is no sequence to show")
        return []
    try:
        manifest = Manifest.load(facts.storage)
    except MotipError as error:
        missing.append(f"the videos: {in_one_line(error)}")
        return []
    shown = []
    for domain, sources in domains.items():
        name = f"side_by_side_{re.sub(r'[^A-Za-z0-9_-]', '_', domain)}.mp4"
        try:
            video = choose_video(facts, manifest, sources)
            log(f"report page: {domain}, {video.source}/{video.video} by each stage")
            shown.append(_video(facts, domain, video, tracking, folder / name))
        except MotipError as error:
            shown.append(PageVideo(domain, "", f"No video: {error.what}"))
            missing.append(f"the video of {domain}: {in_one_line(error)}")
    return shown


def _video(facts: PageFacts, domain: str, video: VideoEntry, tracking: TrackingOptions, path: Path) -> PageVideo:
    """Write the side-by-side video of a domain; raises MotipError without tracks."""
    found = {stage.name: tracks_of(stage, video, facts.storage, tracking) for stage in facts.stages if stage.finished}
    tiles = [tile for tile in found.values() if tile is not None]
    if not tiles:
        raise MotipError("no stage has stored tracks of its sequences", where=f"{video.source}/{video.video}")
    written = write_side_by_side(read_video_frames(video, str(facts.storage)), tiles, path, video.fps)
    # Caption: which stages are shown, which are not, which are zero-shot.
    text = f"{video.source}/{video.video}, {written.frames} frames, by {', '.join(tile.caption for tile in tiles)}"
    without = [name for name, tile in found.items() if tile is None]
    if without:
        text += f"; without {', '.join(without)}, which has no stored tracks of it"
    if facts.matrix is not None:
        values = facts.matrix.values
        unseen = [tile.caption for tile in tiles if not values.is_trained_on(tile.caption, domain)]
        if unseen:
            text += f"; zero-shot for {', '.join(unseen)}"
    return PageVideo(domain, f"{FILES}/{path.name}", text, poster(written.poster))


def _remove_old_videos(folder: Location, kept: list[str]) -> None:
    """Remove videos of an earlier page that this one does not show."""
    for path in files_under(folder):
        if path.name.startswith("side_by_side_") and path.name not in kept:
            path.unlink()
