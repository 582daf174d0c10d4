"""Figure of a hyper-parameter sweep: parallel coordinates of the trials, and the score over the learning rate."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from motip.config.sweep_file import Choices, Range

MAP = "viridis"
RATE = "LR"
"""Key of the right panel's x axis; the first searched range if it is not searched."""
BASELINE_COLOUR, BEST_COLOUR = "#c00000", "#d9730d"
_LABEL_BOX = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}


@dataclass(frozen=True)
class PlottedTrial:
    """One trial of the figure.

    Attributes:
        values: of all searched keys; None if the configuration uses an equivalent key instead.
        value: its best epoch's score in percent; None if it failed.
        status: `finished`, `pruned` or `failed`.
        repeats: scores of the same setting with further seeds.
    """

    key: str
    values: Mapping[str, Any]
    value: float | None
    status: str
    repeats: tuple[float, ...] = ()


def trials_figure(
    trials: Sequence[PlottedTrial],
    space: Mapping[str, Range | Choices],
    *,
    title: str,
    metric: str,
    baseline: str,
    best: str,
) -> Figure:
    """Left: parallel coordinates. Right: the score over LR, or over the first range, or by trial number.

    Colour is the score. Pruned trials are dashed and hollow, with the score at which they were pruned.

    Args:
        baseline, best: keys of the trials to highlight.
    """
    figure = Figure(figsize=(7.5 + 1.6 * len(space), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1 + 0.45 * len(space), 1.25])
    scored = [trial for trial in trials if trial.value is not None]
    values = [trial.value for trial in scored if trial.value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    style = _TrialStyle(Normalize(low, high if high > low else low + 1), baseline, best)
    _draw_parallel(left, scored, space, metric, style)
    _draw_over_rate(right, scored, space, metric, style)
    failed = len(trials) - len(scored)
    count = f"{len(trials)} trials" + (f", {failed} without a score are not shown" if failed else "")
    figure.suptitle(f"{title}: {count}", fontsize=11)
    return figure


def _draw_parallel(
    axes: Axes,
    trials: Sequence[PlottedTrial],
    space: Mapping[str, Range | Choices],
    metric: str,
    style: _TrialStyle,
) -> None:
    """A vertical axis for each key and one for the score; heights are fractions of each axis's own range."""
    # axes and their tick labels
    keys = list(space)
    scales = [_AxisScale(space[key], [trial.values.get(key) for trial in trials]) for key in keys]
    for x, scale in enumerate(scales):
        axes.axvline(x, color="0.75", lw=1, zorder=0)
        for height, text in scale.ticks():
            _label(axes, x, height, text)
    end = len(keys)
    axes.axvline(end, color="0.75", lw=1, zorder=0)
    for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
        _label(axes, end, fraction, f"{float(style.norm.inverse(fraction)):.1f}")

    # a line per trial, highlighted ones on top
    for trial in sorted(trials, key=lambda each: (style.is_highlighted(each), each.value or 0.0)):
        heights = [scale.height(trial.values.get(key)) for key, scale in zip(keys, scales, strict=True)]
        points = [(float(x), height) for x, height in enumerate(heights) if height is not None]
        points.append((float(end), float(style.norm(trial.value or 0.0))))
        colour, width = style.colour_and_width(trial)
        line = "--" if trial.status == "pruned" else "-"
        axes.plot([x for x, _ in points], [height for _, height in points], line, c=colour, lw=width, alpha=0.9)
    axes.set_xticks(range(end + 1), [*keys, metric], fontsize=8)
    axes.set(yticks=[], ylim=(-0.06, 1.06), xlim=(-0.15, end + 0.35))
    axes.set_title("parallel coordinates; dashed: pruned", fontsize=9)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def _label(axes: Axes, x: float, height: float, text: str) -> None:
    axes.annotate(
        text, (x, height), (4, 0), textcoords="offset points", fontsize=7, va="center", color="0.2", bbox=_LABEL_BOX
    )


def _draw_over_rate(
    axes: Axes,
    trials: Sequence[PlottedTrial],
    space: Mapping[str, Range | Choices],
    metric: str,
    style: _TrialStyle,
) -> None:
    """The score over RATE, with a dash for each further seed."""
    # a dot per trial
    ranges = {key: values for key, values in space.items() if isinstance(values, Range)}
    key = RATE if RATE in ranges else next(iter(ranges), None)
    for number, trial in enumerate(trials):
        x = trial.values.get(key) if key is not None else number
        if x is None or trial.value is None:
            continue
        colour, width = style.colour_and_width(trial)
        fill = "white" if trial.status == "pruned" else colour
        axes.plot([x], [trial.value], "o", ms=7, mec=colour, mew=1.5, mfc=fill, zorder=width)
        if trial.repeats:
            axes.plot([x] * len(trial.repeats), trial.repeats, "_", ms=14, mew=2, c=colour, zorder=5)

    # legend
    for label, colour in (("baseline", BASELINE_COLOUR), ("best", BEST_COLOUR)):
        axes.plot([], [], "o", c=colour, label=label)
    axes.plot([], [], "o", mec="0.4", mfc="white", label="pruned, score when pruned")
    axes.plot([], [], "_", ms=14, mew=2, c="0.4", label="same setting, further seed")
    axes.legend(fontsize=7, loc="best")

    # axes
    if key is not None and ranges[key].log:
        axes.set_xscale("log")
        # The default labels every digit between two powers of ten, which overlap.
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=key or "trial", ylabel=f"{metric}, percent")
    axes.grid(alpha=0.3)
    axes.set_title(f"{metric} over {key or 'the trials'}", fontsize=9)


@dataclass(frozen=True)
class _TrialStyle:
    """Colour and width of a trial: baseline and best are highlighted, the others coloured by score."""

    norm: Normalize
    baseline: str
    best: str

    def colour_and_width(self, trial: PlottedTrial) -> tuple[Any, float]:
        if trial.key == self.baseline:
            return BASELINE_COLOUR, 2.5
        if trial.key == self.best:
            return BEST_COLOUR, 2.5
        return colormaps[MAP](float(self.norm(trial.value or 0.0)) * 0.92), 1.2

    def is_highlighted(self, trial: PlottedTrial) -> bool:
        return trial.key in (self.baseline, self.best)


class _AxisScale:
    """Maps the values of a key to heights from 0 to 1."""

    def __init__(self, space: Range | Choices, plotted: Sequence[Any]) -> None:
        numbers = [float(each) for each in plotted if isinstance(each, (int, float))]
        if isinstance(space, Range):
            # The baseline's value may lie outside the range.
            self._low, self._high = min([space.low, *numbers]), max([space.high, *numbers])
            self._log = space.log and self._low > 0
            self._integers = all(number.is_integer() for number in (self._low, self._high, *numbers))
            self._texts: list[str] = []
        else:
            texts = [json.dumps(each) for each in (*space.choices, *plotted) if each is not None]
            self._texts = list(dict.fromkeys(texts))
            self._low, self._high, self._log = 0.0, float(max(1, len(self._texts) - 1)), False
            self._integers = False

    def height(self, value: Any) -> float | None:
        """Height of a value; None for None."""
        if value is None:
            return None
        number = float(self._texts.index(json.dumps(value))) if self._texts else float(value)
        if self._log:
            return (math.log(number) - math.log(self._low)) / (math.log(self._high) - math.log(self._low))
        return self._fraction(number)

    def _fraction(self, number: float) -> float:
        return (number - self._low) / (self._high - self._low)

    def ticks(self) -> list[tuple[float, str]]:
        """Height and text of each tick."""
        if self._texts:
            return [(number / self._high, text) for number, text in enumerate(self._texts)]
        if self._integers and not self._log and self._high - self._low <= 8:
            return [(self._fraction(number), f"{number}") for number in range(int(self._low), int(self._high) + 1)]
        found = []
        for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
            if self._log:
                number = math.exp(math.log(self._low) + fraction * (math.log(self._high) - math.log(self._low)))
            else:
                number = self._low + fraction * (self._high - self._low)
            found.append((fraction, f"{number:.3g}"))
        return found
