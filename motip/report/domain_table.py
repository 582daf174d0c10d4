"""Terminal table of the matrix R[stage][domain], with losses against the best earlier stage."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from motip.evaluation.domain_matrix import Column, DomainMatrix


def domain_table(
    matrix: DomainMatrix, transfer: Mapping[str, float | None], allowed: float = 5.0, each_class: bool = True
) -> Table:
    """One row per stage; one column per domain and, for a domain with several classes, per class.

    A value more than ``allowed`` points below the best earlier stage is red with the loss in brackets; a zero-shot
    value (the model was not trained on the domain) has an asterisk.

    Args:
        transfer: stage -> backward transfer in points, None if undefined.
        each_class: mark losses of single classes too, not only those of a domain's mean.
    """
    table = Table(
        title=f"Domains: {matrix.metric} in percent on the locked val videos, after each stage",
        title_justify="left",
        caption=_caption(matrix, allowed),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    columns = matrix.columns(classes=True)
    table.add_column("after", no_wrap=True)
    for domain, name in columns:
        table.add_column(name or domain, justify="right", no_wrap=True, header_style="dim" if name else None)
    table.add_column("backward transfer", justify="right", no_wrap=True)
    for stage in matrix.stages:
        losses = {(each.domain, each.class_name): each.loss for each in matrix.forgotten(stage, allowed, each_class)}
        change = transfer.get(stage)
        table.add_row(
            stage,
            *(_cell(matrix, stage, column, losses.get(column)) for column in columns),
            "-" if change is None else f"{change:+.1f}",
        )
    return table


def _cell(matrix: DomainMatrix, stage: str, column: Column, loss: float | None) -> Text:
    value = matrix.value(stage, column)
    if value is None:
        return Text("-", style="dim")
    if loss is not None:
        return Text(f"{value:.1f} (-{loss:.1f})", style="bold red")
    return Text(f"{value:.1f}" if matrix.is_trained_on(stage, column[0]) else f"{value:.1f}*")


def _caption(matrix: DomainMatrix, allowed: float) -> str:
    parts = [f"in brackets: points lost since the best earlier stage, if over {allowed:g}"]
    if any(not matrix.is_trained_on(stage, domain) for stage, cells in matrix.values.items() for domain in cells):
        parts.insert(0, "* zero-shot: the model has not seen the domain")
    return "\n".join(parts)
