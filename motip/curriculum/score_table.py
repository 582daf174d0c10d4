"""Scores of several data sources as one table, for the runs' evaluation tables."""

from __future__ import annotations

from collections.abc import Mapping

from motip.evaluate.scores import Scores


def score_rows(scores: Mapping[str, Mapping[str, Scores]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: for each domain and source its classes, then the means.

    Args:
        scores: domain -> source -> scores; with "" as the only domain the table has no column for it.
    """
    header: list[str] = []
    rows: list[list[str]] = []
    for domain, own in scores.items():
        for source, each in own.items():
            columns, lines = each.table()
            header = [*(["domain"] if domain else []), "source", "protocol", "class", *columns[1:]]
            rows += [[*([domain] if domain else []), source, each.protocol, *line] for line in lines]
    return header, rows
