"""The sections of the report page, each from facts to HTML. Nothing here reads a file."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

from motip.evaluate.bootstrap import MEAN
from motip.evaluate.comparison import COVERAGE, Difference
from motip.evaluate.domain_matrix import Column
from motip.evaluate.scores import Scores
from motip.report.drawing import text_colour
from motip.report.markup import Markup, Part, tag
from motip.report.page_facts import Change, Matrix, PageFacts, StageFacts, changes
from motip.report.progress import duration

METRICS = ("HOTA", "IDF1", "DetRe", "DetPr")
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def stages_section(page: PageFacts) -> Markup:
    """The stages with their data, time and scores, and the change against the stage before."""
    heads = ["Stage", "Videos", "Training", "Best epoch", "Validated on", "Class", *METRICS]
    texts = {"Stage", "Validated on", "Class"}
    header = tag(
        "thead",
        tag(
            "tr",
            [tag("th", name, scope="col", role="columnheader", class_="text" if name in texts else None)
             for name in heads],
            role="row",
        ),
        role="rowgroup",
    )  # fmt: skip
    bodies = [
        tag("tbody", _stage_rows(page, stage, len(heads)), class_="stage", role="rowgroup") for stage in page.stages
    ]
    legend = (
        "Scores in percent, of each stage's best epoch on its own locked validation videos. Below a score: its change "
        f"against the stage that the weights come from, on the same videos, with the {COVERAGE:.0f} % interval of a "
        "paired bootstrap over the sequences. "
    )
    marks = [
        tag("span", "▲ better", class_="better"), ", ", tag("span", "▼ worse", class_="worse"),
        ", ≈ within noise. The interval says nothing of another training seed.",
    ]  # fmt: skip
    table = tag("table", tag("caption", legend, marks), header, bodies, class_="stack", role="table")
    return section("stages", "Stages", tag("div", table, class_="scroll", tabindex=0, role="region",
                                            aria_label="Table of the stages"))  # fmt: skip


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
    """Cells of each source and class: classes first, then their mean."""
    lines = []
    for source, change in changes(page, stage).items():
        scores = stage.scores[source]
        named = [*scores.per_class, MEAN] if len(scores.per_class) > 1 else list(scores.per_class)
        for number, row in enumerate(named):
            values = scores.class_averaged if row == MEAN else scores.per_class[row]
            cells = [tag("th", "mean" if row == MEAN else row, scope="row", role="rowheader")]
            if number == 0:
                place = f"{source}: {_count(len(scores.sequences), 'sequence')}"
                why = _why(change, len(scores.sequences))
                cells.insert(0, _cell("Validated on", place, why, "note", rowspan=len(named), class_="text on"))
            for metric in METRICS:
                value = values.get(metric)
                difference = change.comparison.of(row, metric) if change.comparison is not None else None
                shown = DASH if value is None else f"{value:.1f}"
                cells.append(_cell(metric, shown, _difference(difference)))
            lines.append(cells)
    return lines


def _why(change: Change, sequences: int) -> str:
    """What the changes are against; they may be of fewer sequences than the scores above them."""
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
    """`+1.5`, `-0.4` (with a minus sign); a change that rounds to nothing is `0.0`."""
    text = f"{abs(value):.1f}"
    return text if text == "0.0" else f"{MINUS if value < 0 else '+'}{text}"


def _cell(
    label: str, value: str, small: Part = "", small_class: str = "change", *, rowspan: int | None = None,
    class_: str | None = None,
) -> Markup:  # fmt: skip
    body = [value, tag("span", small, class_=small_class) if small else None]
    return tag("td", tag("span", body, class_="body"), data_label=label, rowspan=rowspan, role="cell", class_=class_)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 36 else "under 0.01 h"


def domains_section(matrix: Matrix | None) -> Markup:
    """The heat map as a table: colour, number, and a frame with the loss where something was forgotten."""
    if matrix is None:
        return section("domains", "Stage by domain", tag("p", "No stage was scored by domain.", class_="quiet"))
    values, allowed = matrix.values, matrix.allowed
    columns = values.columns(classes=True)
    several = {domain for domain, name in columns if name}
    header = [tag("th", "After", scope="col", class_="text")]
    for domain, name in columns:
        header.append(tag("th", domain, tag("br"), name or ("mean" if domain in several else None), scope="col"))
    header.append(tag("th", "Backward transfer", scope="col"))
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
    forgotten = [
        f"{stage}: {each.describe(values.metric)}"
        for stage in values.stages
        for each in values.forgotten(stage, allowed, matrix.each_class)
    ]
    words: Markup = tag("p", "Nothing was forgotten.")
    if forgotten:
        words = tag("div", tag("strong", "Forgotten"), _list(forgotten), class_="notice")
    shown = tag("div", table, class_="scroll", tabindex=0, role="region", aria_label="Stage by domain")
    return section("domains", "Stage by domain", words, shown)


def _heat_cell(matrix: Matrix, stage: str, column: Column, loss: float | None) -> Markup:
    value = matrix.values.value(stage, column)
    if value is None:
        return tag("td", DASH, tag("span", "not scored", class_="hidden"), class_="none")
    ground = _colour(value)
    # The same in light and dark, so the text's colour is chosen for it.
    style = f"background:rgb{ground};color:rgb{text_colour(ground)}"
    text = f"{value:.1f}" + ("" if matrix.values.is_known(stage, column[0]) else "*")
    if loss is None:
        return tag("td", text, style=style)
    lost = tag("span", f"▼ {MINUS}{loss:.1f}", tag("span", " forgotten", class_="hidden"), class_="loss")
    return tag("td", text, lost, style=style, class_="lost")


def _colour(value: float) -> tuple[int, int, int]:
    """RGB of 0..100, of the map that ``domains.png`` uses."""
    from matplotlib import colormaps

    red, green, blue, _ = colormaps["viridis"](min(max(value, 0.0), 100.0) / 100)
    return round(255 * red), round(255 * green), round(255 * blue)


_STATES = {
    "same": "the file is still the one recorded",
    "changed": "the file is NOT the one recorded",
    "missing": "the file is not there any more",
    "not read": "in an object store, not read again for this page",
}


def chain_section(page: PageFacts) -> Markup:
    """Every weights file from the first to the last, with its sha256 and where it came from."""
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
                [record.get("transfer", {}).get("summary", ""), tag("br"),
                 "data ", tag("code", str(record.get("data_digest", ""))[:12]),
                 ", run ", tag("code", record.get("run_id") or "none")],
            )
        )  # fmt: skip
    if not rows:
        return section("weights", "Chain of weights", tag("p", "No stage is finished yet.", class_="quiet"))
    heads = ["Weights", "sha256 of the file", "What it is made of"]
    header = tag(
        "thead",
        tag("tr", [tag("th", each, scope="col", class_="text", role="columnheader") for each in heads], role="row"),
        role="rowgroup",
    )
    command = f"motip lineage verify {page.run_id} --storage {shlex.quote(str(page.folder.parent.parent))}"
    check = ["Compute the digests anew: ", tag("code", command)] if page.run_id else None
    table = tag("table", header, tag("tbody", rows, role="rowgroup"), class_="stack", role="table")
    return section(
        "weights",
        "Chain of weights",
        tag("p", "Each stage starts from the file above it, whole, known by its digest. ", check),
        tag("div", table, class_="scroll", tabindex=0, role="region", aria_label="Chain of weights"),
    )


def _given_row(record: Mapping[str, object]) -> Markup | None:
    """The weights a first stage starts from, which no stage made."""
    sha256, transfer = record.get("parent_sha256"), record.get("transfer")
    if sha256 is None:
        return None
    path = transfer.get("path", "") if isinstance(transfer, Mapping) else ""
    return _chain_row("given weights", str(sha256), str(path), "made by no stage of this curriculum", None, None)


def _chain_row(name: str, sha256: str, path: str, start: str, state: Part, more: Part) -> Markup:
    return tag(
        "tr",
        tag("th", name, scope="row", role="rowheader"),
        tag("td", tag("span", tag("code", sha256), tag("br"), state, class_="body"), class_="text", role="cell",
            data_label="sha256"),
        tag("td", tag("span", start, tag("br"), tag("code", path), tag("br") if more else None,
                      tag("span", more, class_="quiet") if more else None, class_="body"),
            class_="text", role="cell", data_label="made of"),
        role="row",
    )  # fmt: skip


def missing_section(lines: Sequence[str]) -> Markup:
    """What the page would show and could not find; nothing where all is there."""
    if not lines:
        return Markup()
    return tag("div", tag("strong", "Not on this page"), _list(lines), class_="notice", role="note")


def section(identity: str, title: str, *parts: Part) -> Markup:
    """A part of the page with its heading, which the links at the top lead to."""
    return tag("section", tag("h2", title, id=f"{identity}-title"), parts, id=identity,
               aria_labelledby=f"{identity}-title")  # fmt: skip


def _list(lines: Iterable[str]) -> Markup:
    return tag("ul", [tag("li", line) for line in lines])


def headline(page: PageFacts) -> Part:
    """One sentence: what came out at the end."""
    finished = [stage for stage in page.stages if stage.finished]
    if not finished:
        return "No stage is finished yet."
    last = finished[-1]
    told = "; ".join(f"{_hota(scores)} on {source}" for source, scores in last.scores.items())
    text = f"{len(finished)} of {len(page.stages)} stages finished. "
    return [text, "The last, ", tag("strong", last.name), f", has {told}." if told else ", has no scores."]


def _hota(scores: Scores) -> str:
    return f"HOTA {scores.hota:.1f}"
