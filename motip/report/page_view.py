"""Texts and colours that the templates of the report page compute from ``PageFacts``."""

from __future__ import annotations

from motip.evaluation.bootstrap import MEAN
from motip.evaluation.scores import Scores, Values
from motip.report.drawing import Colour
from motip.report.page_facts import Change

METRICS = ("HOTA", "IDF1", "DetRe", "DetPr")
MINUS = "\N{MINUS SIGN}"


def score_rows(scores: Scores) -> dict[str, Values]:
    """The classes, followed by their mean if they are several."""
    rows = scores.per_class
    return {**rows, MEAN: scores.class_averaged} if len(rows) > 1 else rows


def change_note(change: Change, sequences: int) -> str:
    """What the changes refer to: the earlier stage, and the shared sequences if they are fewer than the scored ones."""
    if change.comparison is None:
        return f"no change shown: {change.why}"
    shared = change.comparison.sequences
    part = f" on the {shared} of them that both were scored on" if shared < sequences else ""
    return "; ".join((f"against {change.before}{part}", *change.comparison.notes))


def signed(value: float) -> str:
    """`+1.5` or `−0.4` (U+2212); a change that rounds to zero is `0.0`."""
    text = f"{abs(value):.1f}"
    return text if text == "0.0" else f"{MINUS if value < 0 else '+'}{text}"


def hours(seconds: float) -> str:
    """`1.25 h`, or `under 0.01 h`."""
    return f"{seconds / 3600:.2f} h" if seconds >= 36 else "under 0.01 h"


def heat_colour(value: float) -> Colour:
    """RGB 0..255 of a value in percent, as in ``domains.png``."""
    from matplotlib import colormaps

    red, green, blue, _ = colormaps["viridis"](value / 100)
    return round(255 * red), round(255 * green), round(255 * blue)
