"""Tell what the domains' scores are: one line on the screen, metrics of the runs, table, CSV and heat map."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from motip.config import Domains
from motip.curriculum.domain_scores import Row
from motip.curriculum.score_table import score_rows
from motip.evaluate.domain_matrix import DomainMatrix, Forgetting
from motip.lineage import Lineage
from motip.lineage.tags import Tag
from motip.report.heatmap import heat_map, png_of
from motip.storage.atomic import digest
from motip.storage.paths import Location, read_json, write_bytes, write_json


@dataclass(frozen=True)
class DomainReport:
    """The matrix so far with the rows it is made of, what each stage lost, and the backward transfer.

    Attributes:
        transfer: stage -> mean change of the domains learned before it; None where there is none.
        folder: of the curriculum; the table, CSV and heat map lie there.
    """

    matrix: DomainMatrix
    rows: Mapping[str, Row]
    transfer: Mapping[str, float | None]
    wanted: Domains
    folder: Location

    def lost(self, stage: str) -> list[Forgetting]:
        """What a stage lost beyond what is allowed."""
        return self.matrix.forgotten(stage, self.wanted.allowed_loss, self.wanted.each_class)

    def lost_text(self, *stages: str) -> str:
        """All that the stages lost, in one line; `nothing` where that is so."""
        lost = [each for stage in stages for each in self.lost(stage)]
        return "; ".join(each.describe(self.matrix.metric) for each in lost) or "nothing"

    def line(self, stage: str) -> str:
        """A row for the screen, with what it cost."""
        row = self.rows[stage]
        effort = "scored before" if row.reused else f"{row.tracked} of {row.videos} videos tracked, {row.seconds:.0f} s"
        cells = " · ".join(self._cell(stage, domain) for domain in row.scores)
        return f"{stage}: {self.matrix.metric} {cells} ({'; '.join([effort, *row.notes])})"

    def _cell(self, stage: str, domain: str) -> str:
        classes = [column for column in self.matrix.columns(classes=True) if column[0] == domain and column[1]]
        values = [(column[1], self.matrix.value(stage, column)) for column in classes]
        inside = [f"{name} {value:.1f}" for name, value in values if value is not None]
        lacking = self.rows[stage].lacking.get(domain, ())
        if lacking:
            inside.append(f"the model has no {' and no '.join(lacking)}")
        unseen = "" if self.matrix.is_known(stage, domain) else " (zero-shot)"
        details = f" ({', '.join(inside)})" if inside else ""
        return f"{domain}{unseen} {self.matrix.values[stage][domain]:.1f}{details}"

    def tell(self, lineage: Lineage, stage: str, stage_run: str | None, curriculum_run: str) -> dict[str, str]:
        """Tell both runs what they have not been told of a row; returns what they know now (``Row.told``).

        The stage's run gets ``R/<domain>``, ``R/<domain>/<class>`` and ``backward_transfer``; the curriculum's gets the
        same as curves over the stages, and ``R/<stage>/<domain>``.
        """
        row, step = self.rows[stage], self.matrix.stages.index(stage)
        values, cells = self.matrix.row_dict(stage), self.matrix.cells(stage)
        transfer = self.transfer[stage]
        if transfer is not None:
            values["backward_transfer"] = transfer
        forgotten = self.lost_text(stage)
        told: dict[str, str] = {}
        for run, metrics in ((stage_run, values), (curriculum_run, {**values, **cells})):
            if run is None:
                continue
            told[run] = digest([metrics, forgotten])
            if row.told.get(run) == told[run]:
                continue
            lineage.log_metrics(run, metrics, step)
            if run == stage_run:
                lineage.set_tags(run, {Tag.FORGOTTEN: forgotten})
                lineage.log_dict(run, row.scores_json(), "domains/scores.json")
                header, lines = score_rows(row.scores)
                lineage.log_table(run, header, lines, "evaluation/domains.json")
        return told

    def publish(self, lineage: Lineage, run_id: str) -> None:
        """Table, CSV and heat map into the folder and the curriculum's run, unless they are there as they are."""
        matrix = self.matrix
        content = {
            **matrix.to_json(),
            "allowed_loss": self.wanted.allowed_loss,
            "each_class": self.wanted.each_class,
            "videos": self.wanted.videos,
            "backward_transfer": dict(self.transfer),
            "forgotten": {stage: self.lost_text(stage) for stage in matrix.stages},
            "lacking": {stage: row.lacking for stage, row in self.rows.items()},
            "rows": {stage: row.inputs for stage, row in self.rows.items()},
            "run_id": run_id,
        }
        path, identity = self.folder / "domains.json", digest(content)
        if path.is_file() and read_json(path).get("digest") == identity:
            return
        header, rows = self.table()
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        figure = heat_map(matrix, self.wanted.allowed_loss, self.wanted.each_class)
        lineage.log_table(run_id, header, rows, "domains/matrix.json")
        lineage.log_text(run_id, text.getvalue(), "domains/matrix.csv")
        lineage.log_figure(run_id, figure, "domains/heatmap.png")
        lineage.set_tags(run_id, {Tag.FORGOTTEN: self.lost_text(*matrix.stages)})
        write_bytes(self.folder / "domains.csv", text.getvalue().encode())
        write_bytes(self.folder / "domains.png", png_of(figure))
        # Written last: with it, nothing is written or told again.
        write_json(path, {**content, "digest": identity})

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Header and rows, one row per stage: domains with their classes, backward transfer, what was forgotten."""
        columns = self.matrix.columns(classes=True)
        header = ["stage", *(f"{domain} {name}".rstrip() for domain, name in columns), "backward transfer", "forgotten"]
        rows: list[list[Any]] = []
        for stage in self.matrix.stages:
            values = [self.matrix.value(stage, column) for column in columns]
            rows.append([stage, *values, self.transfer[stage], self.lost_text(stage)])
        return header, rows
