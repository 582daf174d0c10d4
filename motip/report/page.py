"""The report page of a curriculum: ``report.html``, one file that needs nothing but the videos beside it."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Protocol

from motip.data.clip_loader import read_video_frames
from motip.data.manifest import Manifest
from motip.errors import MotipError
from motip.report import page_media as media
from motip.report import page_parts as parts
from motip.report.markup import Markup, tag
from motip.report.page_facts import PageFacts, gaps, read_page_facts
from motip.report.page_media import Clip
from motip.report.side_by_side import Tile, write_side_by_side
from motip.report.stage_list import read_stage_list
from motip.report.stage_tracks import Means, choose_video, domains_shown, tracks_of
from motip.storage.paths import Location, RemotePath, files_under, put, write_bytes

PAGE = "report.html"
FILES = "report_files"
SECTIONS = {
    "stages": "Stages",
    "domains": "Domains",
    "weights": "Weights",
    "dashboards": "Dashboards",
    "videos": "Videos",
    "failures": "Failures",
}

_POLICY = "default-src 'none'; img-src data:; media-src 'self' file: blob:; style-src 'unsafe-inline'"
"""What the page may load: its own pictures and videos. A name that smuggles in a script still could not run it."""


class Attachments(Protocol):
    """The part of ``motip.lineage.Lineage`` that takes files."""

    def log_artifact(self, run_id: str, path: Path | str, folder: str = "") -> None: ...


@dataclass(frozen=True)
class Page:
    """A written page.

    Attributes:
        path: of ``report.html``.
        videos: file names in ``report_files/`` beside it.
        missing: what it could not show, one line each; the page says so too.
    """

    path: Location
    videos: tuple[str, ...]
    missing: tuple[str, ...]


def write_page(
    folder: Location,
    out: Location | None = None,
    *,
    means: Means | None = None,
    lineage: Attachments | None = None,
    run_id: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> Page:
    """Make the page of a curriculum from what its folders hold.

    Args:
        folder: of the curriculum, ``curricula/NAME`` in the storage.
        out: where ``report.html`` and ``report_files/`` go; None: into ``folder``.
        means: how sequences are tracked that a stage has no stored tracks of; None: in this process, on the CPU.
        lineage: keeps page and videos as artifacts of the curriculum's run.
        run_id: that run; by default the one noted in the folder.
        say: told what takes long.

    Raises:
        MotipError: no curriculum's folder, or files that cannot be written. Parts that are missing are no error.
    """
    facts = read_page_facts(folder, read_stage_list(folder))
    facts = replace(facts, run_id=run_id or facts.run_id)
    target = folder if out is None else out
    with tempfile.TemporaryDirectory(prefix="motip-") as temporary:
        # Finished elsewhere first: MLflow takes local files, the storage may be remote, and a page half done is none.
        work = Path(temporary)
        clips, videos, trouble = _clips(facts, means or Means(), work / FILES, say)
        missing = (*gaps(facts), *trouble)
        (work / PAGE).write_text(str(page_html(facts, clips, missing)), encoding="utf-8")
        for name in videos:
            put(work / FILES / name, target / FILES / name)
        write_bytes(target / PAGE, (work / PAGE).read_bytes())
        _drop_old_videos(target / FILES, videos)
        if lineage is not None and facts.run_id:
            lineage.log_artifact(facts.run_id, work / PAGE, "report")
            for name in videos:
                lineage.log_artifact(facts.run_id, work / FILES / name, f"report/{FILES}")
    return Page(target / PAGE, tuple(videos), missing)


def page_html(facts: PageFacts, clips: list[Clip], missing: tuple[str, ...]) -> Markup:
    """The whole document."""
    style = resources.files("motip.report").joinpath("page.css").read_text(encoding="utf-8")
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{facts.name}: curriculum report"),
        tag("style", Markup(style)),
    )
    links = [tag("li", tag("a", title, href=f"#{identity}")) for identity, title in SECTIONS.items()]
    origin = [f"Made {now} from ", tag("code", str(facts.folder))]
    if facts.run_id:
        origin += [", MLflow run ", tag("code", facts.run_id)]
    body = tag(
        "body",
        tag("a", "Skip to the stages", href="#stages", class_="skip"),
        tag(
            "header",
            tag("h1", "Curriculum ", facts.name),
            tag("p", parts.headline(facts)),
            tag("nav", tag("ul", links), aria_label="Sections"),
        ),
        tag(
            "main",
            parts.missing_section(missing),
            parts.stages_section(facts),
            parts.domains_section(facts.matrix),
            parts.chain_section(facts),
            media.dashboards_section(facts.stages),
            media.videos_section(clips),
            media.failures_section(facts.stages),
        ),
        tag("footer", tag("p", origin, class_="quiet")),
    )
    return Markup(f"<!doctype html>\n{tag('html', head, body, lang='en')}\n")


def open_in_browser(path: Location) -> bool:
    """Open the page where somebody can see it: only with a display, and never from an object store."""
    display = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if isinstance(path, RemotePath) or not display:
        return False
    return webbrowser.open(path.resolve().as_uri())


def _clips(
    facts: PageFacts, means: Means, folder: Path, say: Callable[[str], None]
) -> tuple[list[Clip], list[str], list[str]]:
    """A video for each domain: clips, file names, and what went wrong."""
    shown = domains_shown(facts)
    clips: list[Clip] = []
    videos: list[str] = []
    trouble: list[str] = []
    if not shown:
        return clips, videos, ["the videos: no stage has scores, so no sequence is known to show"]
    storage = facts.folder.parent.parent
    try:
        manifest = Manifest.load(storage)
    except MotipError as error:
        return clips, videos, [f"the videos: {error.what} ({error.where})"]
    for domain, sources in shown.items():
        name = f"side_by_side_{re.sub(r'[^A-Za-z0-9_-]', '_', domain)}.mp4"
        try:
            clips.append(_clip(facts, manifest, domain, sources, means, folder / name, say))
        except MotipError as error:
            clips.append(Clip(domain, "", f"No video: {error.what}"))
            trouble.append(f"the video of {domain}: {error.what}" + (f" ({error.where})" if error.where else ""))
            continue
        videos.append(name)
    return clips, videos, trouble


def _clip(
    facts: PageFacts,
    manifest: Manifest,
    domain: str,
    sources: list[str],
    means: Means,
    path: Path,
    say: Callable[[str], None],
) -> Clip:
    storage = facts.folder.parent.parent
    video = choose_video(facts, manifest, sources, storage)
    say(f"report page: {domain}, {video.source}/{video.video} by each stage")
    found = [(stage, tracks_of(stage, video, storage, means)) for stage in facts.stages if stage.finished]
    tracks = [each for _, each in found if each is not None]
    if not tracks:
        raise MotipError("no stage has stored tracks of its sequences", where=f"{video.source}/{video.video}")
    tiles = [Tile(each.stage.name, each.rows, each.class_names) for each in tracks]
    written = write_side_by_side(read_video_frames(video, str(storage)), tiles, path, video.fps)
    text = f"{video.source}/{video.video}, {written.frames} frames, by {', '.join(tile.caption for tile in tiles)}"
    without = [stage.name for stage, each in found if each is None]
    if without:
        text += f"; without {', '.join(without)}, which has no stored tracks of it"
    unseen = [each.stage.name for each in tracks if domain not in _trained_on(facts, each.stage.name)]
    if unseen and facts.matrix is not None:
        text += f"; zero-shot for {', '.join(unseen)}"
    return Clip(domain, f"{FILES}/{path.name}", text, media.poster_of(written.poster))


def _trained_on(facts: PageFacts, stage: str) -> set[str]:
    """Domains that the stage's model has been trained on."""
    if facts.matrix is None:
        return set()
    known = facts.matrix.values.known or {}
    return set(known.get(stage, ()))


def _drop_old_videos(folder: Location, kept: list[str]) -> None:
    """Videos of an earlier page that this one does not show."""
    for path in files_under(folder):
        if path.name.startswith("side_by_side_") and path.name not in kept:
            path.unlink()
