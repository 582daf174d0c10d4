"""Sections of the report page with text and tables: HTML from ``PageFacts``, without reading files."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

from motip.evaluation.bootstrap import MEAN
from motip.evaluation.comparison import COVERAGE, Difference
from motip.evaluation.domain_matrix import Column
from motip.evaluation.scores import Scores
from motip.report.drawing import text_colour
from motip.report.markup import Markup, Part, tag
from motip.report.page_facts import Change, Matrix, PageFacts, StageFacts, changes
from motip.report.progress import duration

METRICS = ("HOTA", "IDF1", "DetRe", "DetPr")
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def stages_section(page: PageFacts) -> Markup:
    """Table of the stages: data, training time, scores, and the change against the stage before."""
    heads = ["Stage", "Videos", "Training", "Best epoch", "Validated on", "Class", *METRICS]
    texts = {"Stage", "Validated on", "Class"}
    cells = [
        tag("th", name, scope="col", role="columnheader", class_="text" if name in texts else None) for name in heads
    ]
    header = tag("thead", tag("tr", cells, role="row"), role="rowgroup")
    bodies = [
        tag("tbody", _stage_rows(page, stage, len(heads)), class_="stage", role="rowgroup") for stage in page.stages
    ]
    legend = (
        "Scores in percent, of each stage's best epoch on its own locked validation videos. Below a score: its change "
        f"against the stage that the weights come from, on the same videos, with the {COVERAGE:.0f} % interval of a "
        "paired bootstrap over the sequences. "
    )
    symbols = [
        tag("span", "▲ better", class_="better"),
        ", ",
        tag("span", "▼ worse", class_="worse"),
        ", ≈ within noise. The interval does not cover the variance between training seeds.",
    ]
    table = tag("table", tag("caption", legend, symbols), header, bodies, class_="stack", role="table")
    return section("stages", "Stages", _scrolling(table, "Table of the stages"))


def _scrolling(table: Markup, label: str) -> Markup:
    """A table that scrolls inside its own box on narrow screens."""
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)


def _stage_rows(page: PageFacts, stage: StageFacts, width: int) -> list[Markup]:
    name = tag("code", stage.name) if not stage.finished else tag("strong", stage.name)
    lines = _score_lines(page, stage) if stage.finished else []
    head = tag("th", name, scope="rowgroup", rowspan=max(1, len(lines)), role="rowheader", class_="text stage")
    if not lines:
        why = "; ".join(stage.missing) or "no scores"
        return [tag("tr", head, tag("td", why, colspan=width - 1, class_="text quiet", role="cell"), role="row")]
    record = stage.record
    facts = [
        ("Videos", f"{record['videos']}", _count(int(record["frames"]), "frame")),
        ("Training", duration(float(record["seconds"])), _hours(float(record["seconds"]))),
        ("Best epoch", f"{int(record['best_epoch']) + 1} of {record['epochs']}", ""),
    ]
    shared = [_cell(label, text, small, rowspan=len(lines)) for label, text, small in facts]
    rows = []
    for number, cells in enumerate(lines):
        rows.append(tag("tr", [head, *shared] if number == 0 else None, cells, role="row"))
    return rows


def _score_lines(page: PageFacts, stage: StageFacts) -> list[list[Markup]]:
    """One list of cells per source and class: the classes first, then their mean."""
    lines = []
    for source, change in changes(page, stage).items():
        scores = stage.scores[source]
        named = [*scores.per_class, MEAN] if len(scores.per_class) > 1 else list(scores.per_class)
        for number, row in enumerate(named):
            values = scores.class_averaged if row == MEAN else scores.per_class[row]
            cells = [tag("th", "mean" if row == MEAN else row, scope="row", role="rowheader")]
            if number == 0:
                data = f"{source}: {_count(len(scores.sequences), 'sequence')}"
                why = _reference(change, len(scores.sequences))
                cells.insert(0, _cell("Validated on", data, why, "note", rowspan=len(named), class_="text on"))
            for metric in METRICS:
                value = values.get(metric)
                difference = change.comparison.of(row, metric) if change.comparison is not None else None
                shown = DASH if value is None else f"{value:.1f}"
                cells.append(_cell(metric, shown, _difference(difference)))
            lines.append(cells)
    return lines


def _reference(change: Change, sequences: int) -> str:
    """What the changes refer to: the earlier stage, and the shared sequences if they are fewer than the scored ones."""
    if change.comparison is None:
        return f"no change shown: {change.why}"
    notes = "; ".join(change.comparison.notes)
    shared = change.comparison.sequences
    part = f" on the {shared} of them that both were scored on" if shared < sequences else ""
    return f"against {change.before}{part}" + (f"; {notes}" if notes else "")


def _difference(each: Difference | None) -> Markup | str:
    if each is None or each.difference is None:
        return ""
    if each.low is None or each.high is None:
        return tag("span", signed(each.difference), tag("br"), "no interval")
    mark, kind = (
        ("≈", None) if each.within_noise else ("▲", "better") if each.verdict == "B is better" else ("▼", "worse")
    )
    interval = f"{signed(each.low)} to {signed(each.high)}"
    return tag("span", f"{mark} {signed(each.difference)}", tag("br"), interval, class_=kind)


def signed(value: float) -> str:
    """`+1.5` or `−0.4` (U+2212); a change that rounds to zero is `0.0`."""
    text = f"{abs(value):.1f}"
    return text if text == "0.0" else f"{MINUS if value < 0 else '+'}{text}"


def _cell(
    label: str,
    value: str,
    small: Part = "",
    small_class: str = "change",
    *,
    rowspan: int | None = None,
    class_: str | None = None,
) -> Markup:
    body = [value, tag("span", small, class_=small_class) if small else None]
    return tag("td", tag("span", body, class_="body"), data_label=label, rowspan=rowspan, role="cell", class_=class_)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 36 else "under 0.01 h"


def domains_section(matrix: Matrix | None) -> Markup:
    """The heat map as a table: colour and number; a forgotten cell has a frame and its loss."""
    if matrix is None:
        return section("domains", "Stage by domain", tag("p", "No stage was scored by domain.", class_="quiet"))
    values, allowed = matrix.values, matrix.allowed
    columns = values.columns(classes=True)
    several = {domain for domain, name in columns if name}
    header = [tag("th", "After", scope="col", class_="text")]
    for domain, name in columns:
        header.append(tag("th", domain, tag("br"), name or ("mean" if domain in several else None), scope="col"))
    header.append(tag("th", "Backward transfer", scope="col"))
    # Rows, one per stage.
    rows = []
    for stage in values.stages:
        losses = {
            (each.domain, each.class_name): each.loss for each in values.forgotten(stage, allowed, matrix.each_class)
        }
        cells = [_heat_cell(matrix, stage, column, losses.get(column)) for column in columns]
        change = matrix.transfer.get(stage)
        cells.append(tag("td", DASH if change is None else signed(change), class_="none" if change is None else None))
        rows.append(tag("tr", tag("th", stage, scope="row"), cells))
    caption = (
        f"{values.metric} in percent on the locked validation videos of every domain, after each stage. A red frame "
        f"with ▼ marks what was forgotten: more than {allowed:g} points below the best stage before. * marks a domain "
        "that the model has not been trained on. Backward transfer: the mean change of the domains learned before."
    )
    table = tag("table", tag("caption", caption), tag("thead", tag("tr", header)), tag("tbody", rows), class_="heat")
    # The same in words.
    forgotten = [
        f"{stage}: {each.describe(values.metric)}"
        for stage in values.stages
        for each in values.forgotten(stage, allowed, matrix.each_class)
    ]
    words: Markup = tag("p", "Nothing was forgotten.")
    if forgotten:
        words = tag("div", tag("strong", "Forgotten"), _list(forgotten), class_="notice")
    return section("domains", "Stage by domain", words, _scrolling(table, "Stage by domain"))


def _heat_cell(matrix: Matrix, stage: str, column: Column, loss: float | None) -> Markup:
    value = matrix.values.value(stage, column)
    if value is None:
        return tag("td", DASH, tag("span", "not scored", class_="hidden"), class_="none")
    ground = _colour(value)
    # The same in the light and dark schemes, so the text colour is set with it.
    style = f"background:rgb{ground};color:rgb{text_colour(ground)}"
    text = f"{value:.1f}" + ("" if matrix.values.is_trained_on(stage, column[0]) else "*")
    if loss is None:
        return tag("td", text, style=style)
    lost = tag("span", f"▼ {MINUS}{loss:.1f}", tag("span", " forgotten", class_="hidden"), class_="loss")
    return tag("td", text, lost, style=style, class_="lost")


def _colour(value: float) -> tuple[int, int, int]:
    """RGB of a value 0..100, in the colour map of ``domains.png``."""
    from matplotlib import colormaps

    red, green, blue, _ = colormaps["viridis"](min(max(value, 0.0), 100.0) / 100)
    return round(255 * red), round(255 * green), round(255 * blue)


_STATES = {
    "same": "the file is still the one recorded",
    "changed": "the file is NOT the one recorded",
    "missing": "the file is missing",
    "not read": "in an object store, not read again for this page",
}


def chain_section(page: PageFacts) -> Markup:
    """Every weights file from the first to the last, with its sha256 and its origin."""
    # One row per file.
    rows = []
    for stage in (each for each in page.stages if each.finished):
        before, record = page.before(stage), stage.record
        if before is None:
            rows.append(_given_row(record))
        start = "the weights above" if before is None else before.name
        if record.get("parent_sha256") is None:
            start = "fresh weights"
        bad = stage.state in ("changed", "missing")
        rows.append(
            _chain_row(
                stage.name,
                str(record["sha256"]),
                str(record["checkpoint"]),
                f"from {start}",
                tag("span", _STATES[stage.state], class_="worse" if bad else "quiet"),
                [
                    record.get("transfer", {}).get("summary", ""),
                    tag("br"),
                    "data ",
                    tag("code", str(record.get("data_digest", ""))[:12]),
                    ", run ",
                    tag("code", record.get("run_id") or "none"),
                ],
            )
        )
    if not rows:
        return section("weights", "Chain of weights", tag("p", "No stage is finished yet.", class_="quiet"))
    # Table and the command to verify it.
    heads = ["Weights", "sha256 of the file", "What it is made of"]
    header = tag(
        "thead",
        tag("tr", [tag("th", each, scope="col", class_="text", role="columnheader") for each in heads], role="row"),
        role="rowgroup",
    )
    command = f"motip lineage verify {page.run_id} --storage {shlex.quote(str(page.folder.parent.parent))}"
    check = ["To recompute the digests: ", tag("code", command)] if page.run_id else None
    table = tag("table", header, tag("tbody", rows, role="rowgroup"), class_="stack", role="table")
    return section(
        "weights",
        "Chain of weights",
        tag("p", "Each stage starts from the complete file above it, identified by its digest. ", check),
        _scrolling(table, "Chain of weights"),
    )


def _given_row(record: Mapping[str, object]) -> Markup | None:
    """The weights that a first stage starts from, which no stage of the curriculum trained; None for fresh weights."""
    sha256, transfer = record.get("parent_sha256"), record.get("transfer")
    if sha256 is None:
        return None
    path = transfer.get("path", "") if isinstance(transfer, Mapping) else ""
    return _chain_row("given weights", str(sha256), str(path), "from outside this curriculum", None, None)


def _chain_row(name: str, sha256: str, path: str, start: str, state: Part, more: Part) -> Markup:
    details = [tag("br"), tag("span", more, class_="quiet")] if more else None
    file = tag("span", tag("code", sha256), tag("br"), state, class_="body")
    origin = tag("span", start, tag("br"), tag("code", path), details, class_="body")
    return tag(
        "tr",
        tag("th", name, scope="row", role="rowheader"),
        tag("td", file, class_="text", role="cell", data_label="sha256"),
        tag("td", origin, class_="text", role="cell", data_label="made of"),
        role="row",
    )


def missing_section(lines: Sequence[str]) -> Markup:
    """List of the parts that could not be read; empty markup if there are none."""
    if not lines:
        return Markup()
    return tag("div", tag("strong", "Not on this page"), _list(lines), class_="notice", role="note")


def section(identity: str, title: str, *parts: Part) -> Markup:
    """A section with its heading; ``identity`` is the target of the link in the navigation."""
    heading = tag("h2", title, id=f"{identity}-title")
    return tag("section", heading, parts, id=identity, aria_labelledby=f"{identity}-title")


def _list(lines: Iterable[str]) -> Markup:
    return tag("ul", [tag("li", line) for line in lines])


def headline(page: PageFacts) -> Part:
    """The stages finished so far and the HOTA of the last one, in two sentences."""
    finished = [stage for stage in page.stages if stage.finished]
    if not finished:
        return "No stage is finished yet."
    last = finished[-1]
    scored = "; ".join(f"{_hota(scores)} on {source}" for source, scores in last.scores.items())
    text = f"{len(finished)} of {len(page.stages)} stages finished. "
    return [text, "The last, ", tag("strong", last.name), f", has {scored}." if scored else ", has no scores."]


def _hota(scores: Scores) -> str:
    return f"HOTA {scores.hota:.1f}"
