"""The report page: correct numbers, escaped text, and a page that lists missing parts."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from jinja2 import UndefinedError
from typer.testing import CliRunner

import motip.cli.launch as launch
from motip.cli.main import app
from motip.config import load_curriculum
from motip.curriculum import Options
from motip.data.video_reader import open_source
from motip.errors import MotipError
from motip.evaluation.comparison import compare
from motip.report import page as report_page
from motip.report.page import TEMPLATES, open_in_browser, write_page
from motip.report.page_facts import MAX_SHEETS, Change, read_page_facts
from motip.report.page_media import INLINE_BYTES
from motip.report.page_view import change_note, signed
from motip.report.side_by_side import STRIP, Tile, columns_of, write_side_by_side
from motip.report.stage_list import StageList, read_stage_list, write_stage_list
from motip.report.stage_tracks import TrackingOptions
from motip.storage.paths import location
from tests.helpers.report_curriculum import ReportedCurriculum, save_png
from tests.helpers.track_rows import rows

HOSTILE = "<script>alert('x')</script>\"&\x00\u202e"


class Reader(HTMLParser):
    """Parsed page: text of every table cell by section and row, all tags with attributes, unclosed tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self._section = ""
        self._cell = False
        self.feed(html)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        assert name != "p" or "p" not in self.open
        self.tags.append((name, dict(attributes)))
        if name not in ("img", "meta", "link", "br"):
            self.open.append(name)
        if name == "section":
            self._section = str(dict(attributes)["id"])
        elif name == "tr":
            self.rows.setdefault(self._section, []).append([])
        elif name in ("td", "th"):
            self._cell = True
            self.rows[self._section][-1].append("")
        elif name == "br" and self._cell:
            self.rows[self._section][-1][-1] += " "

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name
        if name in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.rows[self._section][-1][-1] += data

    def row(self, section: str, start: str) -> list[str]:
        """The first row with a cell that starts with ``start``."""
        return next(row for row in self.rows[section] if any(cell.startswith(start) for cell in row))

    def named(self, name: str) -> Iterator[dict[str, str | None]]:
        return (attributes for each, attributes in self.tags if each == name)


@pytest.fixture
def copied(reported: ReportedCurriculum, tmp_path: Path) -> Path:
    """A copy of the curriculum's folder in a separate storage, which a test may damage."""
    storage = reported.folder.parent.parent
    for name in ("curricula", "evaluations", "shards"):
        shutil.copytree(storage / name, tmp_path / name)
    return tmp_path / "curricula" / reported.folder.name


def stage_of(folder: Path, name: str) -> Path:
    return next(path.parent for path in (folder / name).glob("*/stage.json"))


# ---- content -------------------------------------------------------------------------------------------------------


def test_every_tag_is_closed_and_nothing_external_is_loaded(reported: ReportedCurriculum) -> None:
    reader = Reader(reported.html)
    assert reader.open == []
    addresses = [value for _, each in reader.tags for key, value in each.items() if key in ("src", "href", "poster")]
    files = {each for each in addresses if each and not each.startswith(("#", "data:"))}
    assert files == {f"report_files/{name}" for name in reported.page.videos}
    assert not list(reader.named("script"))


def test_table_has_the_scores_of_each_class(reported: ReportedCurriculum) -> None:
    reader = Reader(reported.html)
    for stage, source in (("BDD-Refinement", "ground"), ("Vis-Specialist", "aerial")):
        scores = reported.scores[stage][source]
        first = reader.row("stages", stage)
        number = reader.rows["stages"].index(first)
        for line, name in enumerate([*scores.per_class, "mean"]):
            values = scores.class_averaged if name == "mean" else scores.per_class[name]
            cells = reader.rows["stages"][number + line][-5:]
            assert cells[0] == name
            for cell, metric in zip(cells[1:], ("HOTA", "IDF1", "DetRe", "DetPr"), strict=True):
                assert cell.startswith(f"{values[metric]:.1f}"), (stage, name, metric)
    record = json.loads((reported.stage_folder("Vis-Specialist") / "stage.json").read_text())
    assert first[1].startswith(f"{record['videos']}{record['frames']} frames")


def test_change_and_interval_are_those_of_motip_compare(reported: ReportedCurriculum) -> None:
    before, after = (reported.scores[stage]["ground"] for stage in ("BDD-Foundation", "BDD-Refinement"))
    # A class that is absent from a resample has an interval that begins at 0.
    found = [compare(before, after).of(name, "HOTA") for name in after.per_class]
    each = next(one for one in found if one.low is not None and one.low > 0)
    assert each.low is not None and each.high is not None and each.difference is not None
    reader = Reader(reported.html)
    number = reader.rows["stages"].index(reader.row("stages", "BDD-Refinement"))
    shown = next(row for row in reader.rows["stages"][number : number + 3] if row[-5] == each.row)
    expected = f"▲ {signed(each.difference)} {signed(each.low)} to {signed(each.high)}"
    assert shown[-4] == f"{after.per_class[each.row]['HOTA']:.1f}{expected}"


def test_change_on_fewer_sequences_than_the_score_has_a_note(reported: ReportedCurriculum) -> None:
    before, after = (reported.scores[stage]["ground"] for stage in ("BDD-Foundation", "BDD-Refinement"))
    change = Change("BDD-Foundation", compare(before, after))
    assert change_note(change, 3).split(";")[0] == "against BDD-Foundation"
    text = change_note(change, 15).split(";")[0]
    assert text == "against BDD-Foundation on the 3 of them that both were scored on"


def test_scores_on_other_data_are_not_compared(reported: ReportedCurriculum) -> None:
    row = Reader(reported.html).row("stages", "Vis-Adaptation")
    assert "other data: BDD-Refinement has no scores on aerial" in row[4]
    assert "▲" not in "".join(row) and "▼" not in "".join(row)


def test_heat_map_marks_forgotten_cells(reported: ReportedCurriculum) -> None:
    best = reported.scores["BDD-Refinement"]["ground"].hota
    now = reported.scores["Vis-Specialist"]["ground"].hota
    reader = Reader(reported.html)
    row = next(row for row in reader.rows["domains"] if row[0] == "Vis-Specialist")
    assert row[1] == f"{now:.1f}▼ \N{MINUS SIGN}{best - now:.1f} forgotten"
    assert row[4] == f"{reported.scores['Vis-Specialist']['aerial'].hota:.1f}"
    first = next(row for row in reader.rows["domains"] if row[0] == "BDD-Foundation")
    assert first[4] == "\N{EN DASH}not scored"
    assert f"ground: HOTA {best:.1f} after BDD-Refinement, {now:.1f} now" in reader.text
    marked = [each for each in reader.named("td") if each.get("class") == "lost"]
    assert len(marked) == 6  # two stages; mean and two classes of the ground domain


def test_weights_chain_has_every_digest_in_order(reported: ReportedCurriculum) -> None:
    reader = Reader(reported.html)
    records = [json.loads((reported.stage_folder(stage) / "stage.json").read_text()) for stage in reported.scores]
    digests = [row[1][:64] for row in reader.rows["weights"][1:]]
    assert digests == [records[0]["parent_sha256"], *(record["sha256"] for record in records)]
    assert "from BDD-Foundation" in reader.row("weights", "BDD-Refinement")[2]
    assert all("still the one recorded" in row[1] for row in reader.rows["weights"][2:])


def test_images_are_embedded_and_large_ones_are_reduced(reported: ReportedCurriculum) -> None:
    sheet = next(reported.folder.rglob("contact_sheet.png"))
    assert sheet.stat().st_size > INLINE_BYTES
    pictures = list(Reader(reported.html).named("img"))
    assert [each["alt"] for each in pictures if "dashboard" in str(each["alt"])] == [
        f"{stage}: dashboard with the curves of its training" for stage in reported.scores
    ]
    shown = next(each for each in pictures if "failure sheet" in str(each["alt"]))
    assert str(shown["src"]).startswith("data:image/jpeg") and shown["width"] == "1800"
    assert all(str(each["src"]).startswith("data:image/") for each in pictures)


def test_videos_show_every_stage(reported: ReportedCurriculum) -> None:
    reader = Reader(reported.html)
    assert "zero-shot for BDD-Foundation, BDD-Refinement" in reader.text
    for name in reported.page.videos:
        source = open_source(str(reported.folder / "report_files" / name))
        frames = [image for _, image in source]
        assert len(frames) == 8 and frames[0].shape[1] == 2 * 640
        assert frames[0].shape[0] % 2 == 0


def test_page_and_videos_are_mlflow_artifacts(reported: ReportedCurriculum) -> None:
    client = reported.lineage._store.client()
    folders = ("report", "report/report_files")
    names = {each.path for folder in folders for each in client.list_artifacts(reported.run_id, folder)}
    assert {"report/report.html", *(f"report/report_files/{name}" for name in reported.page.videos)} <= names
    kept = Path(client.download_artifacts(reported.run_id, "report/report.html")).read_text()
    assert kept == reported.html


# ---- hostile and missing parts ------------------------------------------------------------------------------------


def test_hostile_names_are_escaped(copied: Path) -> None:
    stored = json.loads((copied / "stages.json").read_text())
    stored["name"] = stored["stages"][0]["stage"] = HOSTILE
    (copied / "stages.json").write_text(json.dumps(stored))
    folder = stage_of(copied, "BDD-Foundation")
    record = json.loads((folder / "stage.json").read_text())
    record["transfer"]["summary"] = record["run_id"] = record["data_digest"] = HOSTILE
    (folder / "stage.json").write_text(json.dumps(record))
    save_png(folder / "failures" / "'onerror='alert(1).png", np.zeros((4, 4, 3), np.uint8))
    made = write_page(copied, tracking=TrackingOptions(track=False))
    html = Path(str(made.path)).read_text(encoding="utf-8")
    reader = Reader(html)
    assert reader.open == [] and not list(reader.named("script"))
    assert all("onerror" not in each for _, each in reader.tags)
    assert "\x00" not in html and "\u202e" not in html
    assert "<script>alert('x')</script>" in reader.text
    policy = next(each["content"] for each in reader.named("meta") if "http-equiv" in each)
    assert str(policy).startswith("default-src 'none'; img-src data:")


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("<b>", "&lt;b&gt;"),
        ("{{ 1 }}", "{{ 1 }}"),
        ('"', "&#34;"),
        (1.5, "1.5"),
        ("\ud800", "\N{REPLACEMENT CHARACTER}"),
        ("a\nb\r\x7f", "a\nb\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_templates_escape_all_other_text(part: object, expected: str) -> None:
    text = '{% macro inner(part) %}<i>{{ part }}</i>{% endmacro %}<p title="{{ part }}">{{ inner(part) }}</p>'
    rendered = TEMPLATES.from_string(text).render(part=part)
    assert rendered == f'<p title="{expected}"><i>{expected}</i></p>'


def test_name_that_a_template_does_not_get_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'heading' is undefined"):
        TEMPLATES.from_string("<h1>{{ heading }}</h1>").render()


def test_page_lists_missing_parts(copied: Path) -> None:
    (copied / "domains.json").unlink()
    shutil.rmtree(copied.parent.parent / "shards")
    two, three, four = (stage_of(copied, name) for name in ("BDD-Refinement", "Vis-Adaptation", "Vis-Specialist"))
    shutil.rmtree(two / "scores")
    (three / "domains.json").write_text("{")
    (four / "stage.json").write_text(json.dumps({"status": "running"}))
    for picture in copied.rglob("*.png"):
        picture.unlink()
    made = write_page(copied)
    html = Path(str(made.path)).read_text()
    reader = Reader(html)
    assert reader.open == [] and made.videos == ()
    missing = "\n".join(made.missing)
    assert "the domains: no stage was scored by domain" in missing
    assert "BDD-Refinement: scores: the scores of the stage's best epoch are missing" in missing
    assert "Vis-Adaptation: scores by domain: not a JSON file" in missing
    assert "Vis-Specialist: the stage is not finished" in missing
    assert "the videos: " in missing
    assert all(line in reader.text for line in made.missing)
    assert reader.text.count("no dashboard.png in its folder") == 4
    assert "3 of 4 stages finished" in reader.text


def test_sheets_beyond_the_limit_are_counted(copied: Path) -> None:
    folder = stage_of(copied, "BDD-Foundation")
    for number in range(MAX_SHEETS + 2):
        save_png(folder / "failures" / f"{number:02d}.png", np.zeros((4, 4, 3), np.uint8))
    made = write_page(copied, tracking=TrackingOptions(track=False))
    reader = Reader(Path(str(made.path)).read_text())
    assert f"BDD-Foundation: {MAX_SHEETS} sheets" in reader.text and f"2 more sheets are in {folder}" in reader.text
    assert sum("BDD-Foundation: failure sheet" in str(each["alt"]) for each in reader.named("img")) == MAX_SHEETS


def test_changed_and_missing_weights_are_marked(copied: Path) -> None:
    one, two = (stage_of(copied, name) for name in ("BDD-Foundation", "BDD-Refinement"))
    for folder, name in ((one, "damaged.pth"), (two, "gone.pth")):
        record = json.loads((folder / "stage.json").read_text())
        record["checkpoint"] = str(folder / name)
        (folder / "stage.json").write_text(json.dumps(record))
    (one / "damaged.pth").write_bytes(b"other")
    made = write_page(copied, tracking=TrackingOptions(track=False))
    reader = Reader(Path(str(made.path)).read_text())
    assert "the file is NOT the one recorded" in reader.row("weights", "BDD-Foundation")[1]
    assert "the file is missing" in reader.row("weights", "BDD-Refinement")[1]


def test_without_stored_tracks_and_tracking_there_are_no_videos(copied: Path) -> None:
    shutil.rmtree(copied.parent.parent / "evaluations")
    made = write_page(copied, tracking=TrackingOptions(track=False))
    assert made.videos == ()
    assert "the video of ground: no stage has stored tracks of its sequences" in "\n".join(made.missing)
    assert not list((copied / "report_files").glob("*.mp4")), "videos of the earlier page are removed"


def test_tracks_with_other_settings_are_not_used(copied: Path) -> None:
    for path in (copied.parent.parent / "evaluations").rglob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "inputs": "other"}))
    assert write_page(copied, tracking=TrackingOptions(track=False)).videos == ()


# ---- list of stages ------------------------------------------------------------------------------------------------


def test_without_a_stage_list_the_chain_is_found_by_digest(copied: Path) -> None:
    listed = read_stage_list(copied)
    (copied / "stages.json").unlink()
    found = read_stage_list(copied)
    assert list(found.folders) == ["BDD-Foundation", "BDD-Refinement", "Vis-Adaptation", "Vis-Specialist"]
    assert found.folders == listed.folders and found.name == listed.name


def test_stage_list_moves_with_the_storage_and_has_untrained_stages(tmp_path: Path) -> None:
    home = tmp_path / "a" / "curricula" / "c"
    elsewhere = tmp_path / "elsewhere"
    write_stage_list(home, StageList("c", {"one": home / "one" / "x", "two": elsewhere, "three": None}, "r"))
    (tmp_path / "a").rename(tmp_path / "b")
    moved = tmp_path / "b" / "curricula" / "c"
    assert read_stage_list(moved) == StageList("c", {"one": moved / "one" / "x", "two": elsewhere, "three": None}, "r")
    facts = read_page_facts(moved, read_stage_list(moved))
    assert facts.stages[2].missing == ("not trained yet",)


def test_folder_without_a_curriculum_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MotipError, match="no finished stage"):
        read_stage_list(tmp_path)
    with pytest.raises(MotipError, match="no such folder"):
        read_stage_list(tmp_path / "nowhere")
    (tmp_path / "stages.json").write_text("[]")
    with pytest.raises(MotipError, match="not a valid list of stages"):
        read_stage_list(tmp_path)


# ---- the verb, and the page at the end of training -----------------------------------------------------------------


def test_verb_accepts_a_folder_or_a_run_id(reported: ReportedCurriculum, tmp_path: Path) -> None:
    storage = str(reported.folder.parent.parent)
    record = json.loads((reported.stage_folder("BDD-Refinement") / "stage.json").read_text())
    for named in (str(reported.folder), reported.run_id, record["run_id"]):
        out = tmp_path / named[-8:]
        arguments = ["report", "page", named, "--storage", storage, "--out", str(out), "--stored-only"]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        assert result.output.splitlines()[-1] == f"report page: {out}/report.html"
        assert "Vis-Specialist" in (out / "report.html").read_text()


def test_missing_failure_sheets_are_drawn_once(copied: Path, tmp_path: Path) -> None:
    kept = stage_of(copied, "Vis-Specialist") / "failures_val" / "contact_sheet.png"
    before = kept.read_bytes()
    arguments = ["report", "page", str(copied), "--out", str(tmp_path / "out"), "--stored-only", "--sheets"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert len(list(copied.rglob("contact_sheet.png"))) == 4 and kept.read_bytes() == before
    html = (tmp_path / "out" / "report.html").read_text()
    assert "no failure sheets in its folder" not in html
    assert sum("failure sheet" in str(each["alt"]) for each in Reader(html).named("img")) == 4


def test_open_prints_the_path_and_opens_only_on_a_display(
    reported: ReportedCurriculum, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(report_page.webbrowser, "open", lambda address: opened.append(address) or True)
    monkeypatch.setattr(report_page.sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    result = CliRunner().invoke(app, ["report", "open", str(reported.folder)], catch_exceptions=False)
    assert result.output.splitlines()[-1] == f"report page: {reported.folder}/report.html"
    assert opened == []
    monkeypatch.setenv("DISPLAY", ":0")
    assert open_in_browser(reported.folder / "report.html")
    assert opened == [(reported.folder / "report.html").as_uri()]
    assert not open_in_browser(location("s3://bucket/report.html"))


def test_failing_page_does_not_fail_the_training(
    reported: ReportedCurriculum, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    curriculum = load_curriculum(reported.folder.parents[2] / "curriculum.yaml")
    notes: list[str] = []
    result = SimpleNamespace(lineage=reported.lineage, run_id=reported.run_id)
    options = Options(data_root=".", storage=str(reported.folder.parent.parent), workers=0)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(launch, "write_page", fails)
    with caplog.at_level(logging.ERROR):
        made = launch._report_page(curriculum, options, None, result, SimpleNamespace(note=notes.append))  # type: ignore[arg-type]
    assert made is None
    assert (
        "the report page was not written: disk full" in notes[0] and f"motip report page {reported.folder}" in notes[0]
    )
    assert "disk full" in caplog.text and "Traceback" in caplog.text


# ---- side by side -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tiles", "columns"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (9, 3), (10, 4)])
def test_tiles_are_nearly_square(tiles: int, columns: int) -> None:
    assert columns_of(tiles) == columns


def test_each_tile_shows_its_own_tracks(tmp_path: Path) -> None:
    frames = [(number, np.full((60, 100, 3), 128, np.uint8)) for number in range(3)]
    full = Tile("full", rows((1, 0, 20, 10, 80, 50, 0)), ["car"])
    empty = Tile("empty", rows(), ["car"])
    made = write_side_by_side(frames, [full, empty, empty], tmp_path / "out.mp4", 5.0, tile_width=200)
    assert made.frames == 3
    images = [image for _, image in open_source(str(tmp_path / "out.mp4"))]
    height = 120 + STRIP
    assert images[0].shape == (2 * height, 400, 3)
    left, right = images[1][STRIP:height, :200], images[1][STRIP:height, 200:]
    assert np.abs(left.astype(int) - 128).max() > 60, "the box of the first tile"
    assert np.abs(right.astype(int) - 128).max() < 20, "the second tile has no tracks"
    assert np.abs(images[0][STRIP:height, :200].astype(int) - 128).max() < 20, (
        "the first tile has none in another frame"
    )
    # The box at twice the size: its left side is at x = 40.
    assert cv2.cvtColor(left, cv2.COLOR_RGB2GRAY)[60, 36:45].min() < 90
    assert images[1][height:, 200:].max() < 40, "the unused tile is dark"
    assert made.poster.shape == images[1].shape


def test_without_tiles_or_frames_no_file_is_left(tmp_path: Path) -> None:
    with pytest.raises(MotipError, match="no tracks"):
        write_side_by_side([], [], tmp_path / "out.mp4", 5.0)
    with pytest.raises(MotipError, match="no frames"):
        write_side_by_side([], [Tile("a", rows(), ["car"])], tmp_path / "out.mp4", 5.0)
    assert list(tmp_path.iterdir()) == []
