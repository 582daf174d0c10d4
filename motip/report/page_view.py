"""View of the report page: the rows and cells that its templates show, from ``PageFacts``, without reading files."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from motip.evaluation.bootstrap import MEAN
from motip.evaluation.comparison import Comparison, Difference
from motip.evaluation.domain_matrix import Column
from motip.evaluation.scores import Scores, Values
from motip.report.drawing import Colour, text_colour
from motip.report.page_facts import Change, Matrix, PageFacts, StageFacts, changes

METRICS = ("HOTA", "IDF1", "DetRe", "DetPr")
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


@dataclass(frozen=True)
class ChangeView:
    """Change of a score: its value with a mark, its interval, and the CSS class better, worse or ""."""

    text: str
    interval: str
    kind: str = ""


@dataclass(frozen=True)
class ScoreView:
    """A score in percent and its change, None if there is none."""

    metric: str
    value: str
    change: ChangeView | None


@dataclass(frozen=True)
class ClassView:
    """The scores of a class, or of the mean over the classes."""

    name: str
    scores: tuple[ScoreView, ...]


@dataclass(frozen=True)
class SourceView:
    """A validation source: the number of its sequences, what the changes refer to, and at least one class."""

    name: str
    sequences: int
    note: str
    classes: tuple[ClassView, ...]


@dataclass(frozen=True)
class StageView:
    """A stage in the table of the stages; without sources if it is unfinished or has no scores."""

    facts: StageFacts
    sources: tuple[SourceView, ...]

    @property
    def rows(self) -> int:
        """Number of table rows."""
        return sum(len(source.classes) for source in self.sources)


def stage_views(page: PageFacts) -> list[StageView]:
    """The stages with their scores, and the changes against the stage before."""
    return [StageView(stage, _sources(page, stage) if stage.finished else ()) for stage in page.stages]


def _sources(page: PageFacts, stage: StageFacts) -> tuple[SourceView, ...]:
    found = []
    for name, change in changes(page, stage).items():
        scores = stage.scores[name]
        classes = tuple(_class(each, values, change.comparison) for each, values in _score_rows(scores).items())
        if classes:
            found.append(SourceView(name, len(scores.sequences), change_note(change, len(scores.sequences)), classes))
    return tuple(found)


def _score_rows(scores: Scores) -> dict[str, Values]:
    """The classes, followed by their mean if they are several."""
    rows = scores.per_class
    return {**rows, MEAN: scores.class_averaged} if len(rows) > 1 else rows


def _class(name: str, values: Values, comparison: Comparison | None) -> ClassView:
    scores = []
    for metric in METRICS:
        value = values.get(metric)
        change = None if comparison is None else _change(comparison.of(name, metric))
        scores.append(ScoreView(metric, DASH if value is None else f"{value:.1f}", change))
    return ClassView("mean" if name == MEAN else name, tuple(scores))


def change_note(change: Change, sequences: int) -> str:
    """What the changes refer to: the earlier stage, and the shared sequences if they are fewer than the scored ones."""
    if change.comparison is None:
        return f"no change shown: {change.why}"
    shared = change.comparison.sequences
    part = f" on the {shared} of them that both were scored on" if shared < sequences else ""
    return "; ".join((f"against {change.before}{part}", *change.comparison.notes))


def _change(each: Difference) -> ChangeView | None:
    if each.difference is None:
        return None
    if each.low is None or each.high is None:
        return ChangeView(signed(each.difference), "no interval")
    mark, kind = (
        ("≈", "") if each.within_noise else ("▲", "better") if each.verdict == "B is better" else ("▼", "worse")
    )
    return ChangeView(f"{mark} {signed(each.difference)}", f"{signed(each.low)} to {signed(each.high)}", kind)


def signed(value: float) -> str:
    """`+1.5` or `−0.4` (U+2212); a change that rounds to zero is `0.0`."""
    text = f"{abs(value):.1f}"
    return text if text == "0.0" else f"{MINUS if value < 0 else '+'}{text}"


def hours(seconds: float) -> str:
    """`1.25 h`, or `under 0.01 h`."""
    return f"{seconds / 3600:.2f} h" if seconds >= 36 else "under 0.01 h"


@dataclass(frozen=True)
class HeatCell:
    """A scored cell of the heat map.

    Attributes:
        value: percent.
        trained_on: whether the stage's model was trained on the domain.
        loss: points lost if the cell counts as forgotten, else None.
        background, colour: RGB 0..255 of the cell and its text.
    """

    value: float
    trained_on: bool
    loss: float | None
    background: Colour
    colour: Colour


@dataclass(frozen=True)
class HeatRow:
    """A stage's cells, None where it was not scored, and its backward transfer in points, None if undefined."""

    stage: str
    cells: tuple[HeatCell | None, ...]
    transfer: float | None


@dataclass(frozen=True)
class HeatMap:
    """The stage-by-domain matrix.

    Attributes:
        allowed: loss in points above which a cell counts as forgotten.
        columns: domain, and class, "mean" or "" below it.
        forgotten: the forgotten cells in words, one line each.
    """

    metric: str
    allowed: float
    columns: tuple[tuple[str, str], ...]
    rows: tuple[HeatRow, ...]
    forgotten: tuple[str, ...]


def heat_map(matrix: Matrix) -> HeatMap:
    """The cells of the matrix in the colours of ``domains.png``."""
    values = matrix.values
    columns = values.columns(classes=True)
    several = {domain for domain, name in columns if name}
    rows, lines = [], []
    for stage in values.stages:
        forgotten = values.forgotten(stage, matrix.allowed, matrix.each_class)
        losses = {(each.domain, each.class_name): each.loss for each in forgotten}
        cells = tuple(_heat_cell(matrix, stage, column, losses.get(column)) for column in columns)
        rows.append(HeatRow(stage, cells, matrix.transfer.get(stage)))
        lines += [f"{stage}: {each.describe(values.metric)}" for each in forgotten]
    heads = tuple((domain, name or ("mean" if domain in several else "")) for domain, name in columns)
    return HeatMap(values.metric, matrix.allowed, heads, tuple(rows), tuple(lines))


def _heat_cell(matrix: Matrix, stage: str, column: Column, loss: float | None) -> HeatCell | None:
    value = matrix.values.value(stage, column)
    if value is None:
        return None
    background = _background(value)
    return HeatCell(value, matrix.values.is_trained_on(stage, column[0]), loss, background, text_colour(background))


def _background(value: float) -> Colour:
    """RGB of a value 0..100."""
    from matplotlib import colormaps

    red, green, blue, _ = colormaps["viridis"](min(max(value, 0.0), 100.0) / 100)
    return round(255 * red), round(255 * green), round(255 * blue)


@dataclass(frozen=True)
class WeightsFile:
    """A weights file of the chain.

    Attributes:
        origin: what it was made from.
        state: as in ``StageFacts``; empty for weights that no stage of the curriculum trained, as are the rest.
        transfer: summary of the tensor transfer at the stage's start.
        data_digest: its first 12 characters.
        run_id: of the stage in MLflow, or "none".
    """

    name: str
    sha256: str
    path: str
    origin: str
    state: str = ""
    transfer: str = ""
    data_digest: str = ""
    run_id: str = ""


def weights_chain(page: PageFacts) -> list[WeightsFile]:
    """The weights files from the first to the last."""
    files = []
    for stage in (each for each in page.stages if each.finished):
        before, record = page.before(stage), stage.record
        parent, transfer = record.get("parent_sha256"), record.get("transfer") or {}
        if before is None and parent is not None:
            path = str(transfer.get("path", ""))
            files.append(WeightsFile("given weights", str(parent), path, "from outside this curriculum"))
        start = "fresh weights" if parent is None else "the weights above" if before is None else before.name
        files.append(
            WeightsFile(
                stage.name,
                str(record["sha256"]),
                str(record["checkpoint"]),
                f"from {start}",
                stage.state,
                transfer.get("summary", ""),
                str(record.get("data_digest", ""))[:12],
                record.get("run_id") or "none",
            )
        )
    return files


def verify_command(page: PageFacts) -> str:
    """The command that recomputes the digests; empty without a run."""
    if not page.run_id:
        return ""
    return f"motip lineage verify {page.run_id} --storage {shlex.quote(str(page.folder.parent.parent))}"
