"""Scores of several sources as one table, for the evaluation tables in MLflow."""

from __future__ import annotations

from collections.abc import Mapping

from motip.evaluation.scores import Scores


def score_rows(scores: Mapping[str, Mapping[str, Scores]]) -> tuple[list[str], list[list[str]]]:
    """Header and text rows: for each domain and source one row per class, then the averages.

    Args:
        scores: domain -> source -> scores; the domain "" gets no domain column.
    """
    header: list[str] = []
    rows: list[list[str]] = []
    for domain, own in scores.items():
        for source, each in own.items():
            columns, lines = each.table()
            header = [*(["domain"] if domain else []), "source", "protocol", "class", *columns[1:]]
            rows += [[*([domain] if domain else []), source, each.protocol, *line] for line in lines]
    return header, rows
