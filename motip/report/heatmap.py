"""Heat map of the matrix R[stage][domain]: rows are stages, columns are domains and their classes."""

from __future__ import annotations

import io

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from motip.evaluation.domain_matrix import Column, DomainMatrix

_CELL_INCHES = (1.15, 0.5)
DARK = 60.0
"""Below this value a cell is dark and its number is white."""


def heat_map(matrix: DomainMatrix, allowed: float = 5.0, each_class: bool = True) -> Figure:
    """A figure with one cell per stage and column, percent (0..100) as colour and number.

    Cells that were not scored are grey. A zero-shot value has an asterisk. A cell more than ``allowed`` points below
    the best earlier stage has a red frame and the loss below its value.

    Args:
        each_class: frame losses of single classes too, not only those of a domain's mean.
    """
    columns = matrix.columns(classes=True)
    width, height = 2.4 + _CELL_INCHES[0] * len(columns), 1.5 + _CELL_INCHES[1] * len(matrix.stages)
    # No pyplot: it keeps every figure in memory and chooses a backend by the display.
    figure = Figure(figsize=(max(width, 5.0), height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    values = [[matrix.value(stage, column) for column in columns] for stage in matrix.stages]
    shown = [[float("nan") if value is None else value for value in row] for row in values]
    axes.set_facecolor("0.9")
    image = axes.imshow(shown, cmap="viridis", vmin=0.0, vmax=100.0, aspect="auto")
    for row, stage in enumerate(matrix.stages):
        losses = {(each.domain, each.class_name): each.loss for each in matrix.forgotten(stage, allowed, each_class)}
        for number, column in enumerate(columns):
            value = values[row][number]
            if value is None:
                continue
            text = f"{value:.1f}" + ("" if matrix.is_trained_on(stage, column[0]) else "*")
            if column in losses:
                text += f"\n-{losses[column]:.1f}"
                axes.add_patch(Rectangle((number - 0.47, row - 0.45), 0.94, 0.9, fill=False, ec="red", lw=2.5))
            axes.text(number, row, text, ha="center", va="center", color="white" if value < DARK else "black")
    axes.set_xticks(range(len(columns)), _labels(columns))
    axes.set_yticks(range(len(matrix.stages)), list(matrix.stages))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label=f"{matrix.metric} in percent")
    figure.supxlabel(
        f"* not seen yet   red: more than {allowed:g} points below the best earlier stage", fontsize="small"
    )
    return figure


def _labels(columns: list[Column]) -> list[str]:
    """Column labels; a domain's mean is labelled only if the domain also has class columns."""
    several = {domain for domain, name in columns if name}
    return [f"{domain}\n{name or ('mean' if domain in several else '')}".rstrip() for domain, name in columns]


def png_of(figure: Figure) -> bytes:
    """The figure encoded as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
