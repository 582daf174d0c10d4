"""HTML report of a curriculum: ``report.html``, self-contained except for the videos in ``report_files/``."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from jinja2 import Environment, PackageLoader, StrictUndefined

from motip.data.clip_loader import read_video_frames
from motip.data.manifest import Manifest
from motip.errors import MotipError
from motip.evaluation.comparison import COVERAGE
from motip.report.page_facts import PageFacts, missing_parts, read_page_facts
from motip.report.page_media import PageVideo, data_uri, embed, poster_jpeg
from motip.report.page_view import METRICS, heat_map, hours, signed, stage_views, verify_command, weights_chain
from motip.report.progress import duration
from motip.report.side_by_side import Tile, write_side_by_side
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
TEMPLATES.filters.update(data_uri=data_uri, duration=duration, embed=embed, hours=hours, signed=signed)


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
        shown, videos, failed = _videos(facts, tracking or TrackingOptions(), work / FILES, log)
        missing = (*missing_parts(facts), *failed)
        (work / PAGE).write_text(page_html(facts, shown, missing), encoding="utf-8")
        # Videos before the page that refers to them.
        for name in videos:
            upload(work / FILES / name, target / FILES / name)
        write_bytes(target / PAGE, (work / PAGE).read_bytes())
        _remove_old_videos(target / FILES, videos)
        if lineage is not None and facts.run_id:
            lineage.log_artifact(facts.run_id, target / PAGE, f"report/{PAGE}")
            for name in videos:
                lineage.log_artifact(facts.run_id, target / FILES / name, f"report/{FILES}/{name}")
    return Page(target / PAGE, tuple(videos), missing)


def page_html(facts: PageFacts, videos: list[PageVideo], missing: tuple[str, ...]) -> str:
    """The complete HTML document."""
    return TEMPLATES.get_template("page.html.j2").render(
        page=facts,
        stages=stage_views(facts),
        heat=None if facts.matrix is None else heat_map(facts.matrix),
        weights=weights_chain(facts),
        videos=videos,
        missing=missing,
        metrics=METRICS,
        coverage=f"{COVERAGE:.0f}",
        verify=verify_command(facts),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def open_in_browser(path: Location) -> bool:
    """Open the page in a browser if there is a display and the page is a local file; returns whether it was opened."""
    display = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if isinstance(path, RemotePath) or not display:
        return False
    return webbrowser.open(path.resolve().as_uri())


def _videos(
    facts: PageFacts, tracking: TrackingOptions, folder: Path, log: Callable[[str], None]
) -> tuple[list[PageVideo], list[str], list[str]]:
    """Write one video per domain: what to show, file names, and one line for each that failed."""
    domains = scored_domains(facts)
    shown: list[PageVideo] = []
    names: list[str] = []
    failed: list[str] = []
    if not domains:
        return shown, names, ["the videos: no stage has scores, so there is no sequence to show"]
    storage = facts.folder.parent.parent
    try:
        manifest = Manifest.load(storage)
    except MotipError as error:
        return shown, names, [f"the videos: {error.what} ({error.where})"]
    for domain, sources in domains.items():
        name = f"side_by_side_{re.sub(r'[^A-Za-z0-9_-]', '_', domain)}.mp4"
        try:
            shown.append(_video(facts, manifest, domain, sources, tracking, folder / name, log))
        except MotipError as error:
            shown.append(PageVideo(domain, "", f"No video: {error.what}"))
            failed.append(f"the video of {domain}: {error.what}" + (f" ({error.where})" if error.where else ""))
            continue
        names.append(name)
    return shown, names, failed


def _video(
    facts: PageFacts,
    manifest: Manifest,
    domain: str,
    sources: list[str],
    tracking: TrackingOptions,
    path: Path,
    log: Callable[[str], None],
) -> PageVideo:
    """Write the side-by-side video of a domain; raises MotipError without a video or tracks."""
    storage = facts.folder.parent.parent
    video = choose_video(facts, manifest, sources, storage)
    log(f"report page: {domain}, {video.source}/{video.video} by each stage")
    found = [(stage, tracks_of(stage, video, storage, tracking)) for stage in facts.stages if stage.finished]
    tracks = [each for _, each in found if each is not None]
    if not tracks:
        raise MotipError("no stage has stored tracks of its sequences", where=f"{video.source}/{video.video}")
    tiles = [Tile(each.stage.name, each.rows, each.class_names) for each in tracks]
    written = write_side_by_side(read_video_frames(video, str(storage)), tiles, path, video.fps)
    # Caption: which stages are shown, which are not, which are zero-shot.
    text = f"{video.source}/{video.video}, {written.frames} frames, by {', '.join(tile.caption for tile in tiles)}"
    without = [stage.name for stage, each in found if each is None]
    if without:
        text += f"; without {', '.join(without)}, which has no stored tracks of it"
    unseen = [each.stage.name for each in tracks if domain not in _trained_on(facts, each.stage.name)]
    if unseen and facts.matrix is not None:
        text += f"; zero-shot for {', '.join(unseen)}"
    return PageVideo(domain, f"{FILES}/{path.name}", text, poster_jpeg(written.poster))


def _trained_on(facts: PageFacts, stage: str) -> set[str]:
    """Domains that the stage's model was trained on."""
    if facts.matrix is None:
        return set()
    trained_on = facts.matrix.values.trained_on or {}
    return set(trained_on.get(stage, ()))


def _remove_old_videos(folder: Location, kept: list[str]) -> None:
    """Remove videos of an earlier page that this one does not show."""
    for path in files_under(folder):
        if path.name.startswith("side_by_side_") and path.name not in kept:
            path.unlink()
