"""Report of the domain scores: console line, MLflow metrics, table, CSV and heat map."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from motip.config import Domains
from motip.curriculum.domain_scores import DomainScores
from motip.evaluation.domain_matrix import DomainMatrix, Forgetting
from motip.evaluation.score_table import score_rows
from motip.lineage import Lineage
from motip.lineage.tags import Tag
from motip.report.heatmap import heat_map, png_of
from motip.storage.atomic import digest
from motip.storage.paths import Location, read_json, write_bytes, write_json


@dataclass(frozen=True)
class DomainReport:
    """The domain matrix so far, its rows, forgetting per stage, and backward transfer.

    Attributes:
        transfer: stage -> backward transfer, the mean change over the domains learned before it; None if undefined.
        settings: the `domains:` block of the curriculum file.
        folder: the curriculum's folder, to which table, CSV and heat map are written.
    """

    matrix: DomainMatrix
    rows: Mapping[str, DomainScores]
    transfer: Mapping[str, float | None]
    settings: Domains
    folder: Location

    def lost(self, stage: str) -> list[Forgetting]:
        """Losses of a stage that exceed `allowed_loss`."""
        return self.matrix.forgotten(stage, self.settings.allowed_loss, self.settings.each_class)

    def lost_text(self, *stages: str) -> str:
        """All losses of the stages in one line, or `nothing`."""
        lost = [each for stage in stages for each in self.lost(stage)]
        return "; ".join(each.describe(self.matrix.metric) for each in lost) or "nothing"

    def line(self, stage: str) -> str:
        """One row as a console line, with the number of tracked videos and the seconds spent."""
        row = self.rows[stage]
        effort = "scored before" if row.reused else f"{row.tracked} of {row.videos} videos tracked, {row.seconds:.0f} s"
        cells = " · ".join(self._cell(stage, domain) for domain in row.scores)
        return f"{stage}: {self.matrix.metric} {cells} ({'; '.join([effort, *row.notes])})"

    def _cell(self, stage: str, domain: str) -> str:
        classes = [column for column in self.matrix.columns(classes=True) if column[0] == domain and column[1]]
        values = [(column[1], self.matrix.value(stage, column)) for column in classes]
        inside = [f"{name} {value:.1f}" for name, value in values if value is not None]
        missing = self.rows[stage].missing_classes.get(domain, ())
        if missing:
            inside.append(f"the model has no {' and no '.join(missing)}")
        unseen = "" if self.matrix.is_trained_on(stage, domain) else " (zero-shot)"
        details = f" ({', '.join(inside)})" if inside else ""
        return f"{domain}{unseen} {self.matrix.values[stage][domain]:.1f}{details}"

    def record(self, lineage: Lineage, stage: str, stage_run: str | None, curriculum_run: str) -> None:
        """Record a row in both runs; what they have already is not repeated.

        The stage's run gets ``R/<domain>``, ``R/<domain>/<class>`` and ``backward_transfer``; the curriculum's gets the
        same as curves over the stages, and ``R/<stage>/<domain>``.
        """
        row, step = self.rows[stage], self.matrix.stages.index(stage)
        values = self.matrix.row_dict(stage)
        transfer = self.transfer[stage]
        if transfer is not None:
            values["backward_transfer"] = transfer
        lineage.log_metrics(curriculum_run, {**values, **self.matrix.cells(stage)}, step)
        if stage_run is not None:
            lineage.log_metrics(stage_run, values, step)
            lineage.set_tags(stage_run, {Tag.FORGOTTEN: self.lost_text(stage)})
            lineage.log_dict(stage_run, row.scores_json(), "domains/scores.json")
            header, lines = score_rows(row.scores)
            lineage.log_table(stage_run, header, lines, "evaluation/domains.json")

    def publish(self, lineage: Lineage, run_id: str) -> None:
        """Write table, CSV and heat map to the folder and the curriculum's run, unless they are up to date."""
        matrix = self.matrix
        content = {
            **matrix.to_json(),
            "allowed_loss": self.settings.allowed_loss,
            "each_class": self.settings.each_class,
            "videos": self.settings.videos,
            "backward_transfer": dict(self.transfer),
            "forgotten": {stage: self.lost_text(stage) for stage in matrix.stages},
            "lacking": {stage: row.missing_classes for stage, row in self.rows.items()},
            "rows": {stage: row.inputs for stage, row in self.rows.items()},
            "run_id": run_id,
        }
        path, identity = self.folder / "domains.json", digest(content)
        if path.is_file() and read_json(path).get("digest") == identity:
            return
        header, rows = self.table()
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        figure = heat_map(matrix, self.settings.allowed_loss, self.settings.each_class)
        lineage.log_table(run_id, header, rows, "domains/matrix.json")
        lineage.log_text(run_id, text.getvalue(), "domains/matrix.csv")
        write_bytes(self.folder / "domains.csv", text.getvalue().encode())
        write_bytes(self.folder / "domains.png", png_of(figure))
        lineage.log_artifact(run_id, self.folder / "domains.png", "domains/heatmap.png")
        lineage.set_tags(run_id, {Tag.FORGOTTEN: self.lost_text(*matrix.stages)})
        # Written last: its digest marks everything above as done.
        write_json(path, {**content, "digest": identity})

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Header and one row per stage: domains with their classes, backward transfer, forgotten domains."""
        columns = self.matrix.columns(classes=True)
        header = ["stage", *(f"{domain} {name}".rstrip() for domain, name in columns), "backward transfer", "forgotten"]
        rows: list[list[Any]] = []
        for stage in self.matrix.stages:
            values = [self.matrix.value(stage, column) for column in columns]
            rows.append([stage, *values, self.transfer[stage], self.lost_text(stage)])
        return header, rows
