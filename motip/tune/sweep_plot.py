"""Figure of a hyper-parameter sweep: parallel coordinates of the trials, and the score over the learning rate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from motip.config.sweep_file import Choices, Range
from motip.tune.trial_records import BASELINE, Trial

MAP = "viridis"
_RATE = "LR"
"""Key of the right panel's x axis; the first searched range if it is not searched."""
BASELINE_COLOUR, BEST_COLOUR = "#c00000", "#d9730d"
_QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
_BOX = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
_LABEL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "va": "center", "color": "0.2", "bbox": _BOX}


def trials_figure(
    trials: Sequence[Trial],
    repeats: Sequence[Trial],
    space: Mapping[str, Range | Choices],
    baseline: Mapping[str, Any],
    *,
    title: str,
    metric: str,
    best: str,
) -> Figure:
    """Left: parallel coordinates. Right: the score over LR, or over the first range, or by trial number.

    Colour is the score. Pruned trials are dashed and hollow, with the score at which they were pruned.

    Args:
        repeats: trainings of the same settings with further seeds.
        baseline: the configuration's values for the searched keys; None if it uses an equivalent key instead.
        best: key of the best trial, highlighted like the baseline.
    """
    scored = [trial for trial in trials if trial.value is not None]
    values = [_score(trial) for trial in scored] or [0.0]
    high = max(values) if max(values) > min(values) else min(values) + 1
    plot = _Plot(scored, repeats, space, baseline, metric, best, Normalize(min(values), high))
    figure = Figure(figsize=(7.5 + 1.6 * len(space), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1 + 0.45 * len(space), 1.25])
    plot.draw_parallel(left)
    plot.draw_over_rate(right)
    failed = len(trials) - len(scored)
    count = f"{len(trials)} trials" + (f", {failed} without a score are not shown" if failed else "")
    figure.suptitle(f"{title}: {count}", fontsize=11)
    return figure


@dataclass(frozen=True)
class _Plot:
    """The trials with a score, and how they are drawn.

    Attributes:
        norm: scores to heights and colours from 0 to 1.
    """

    trials: Sequence[Trial]
    repeats: Sequence[Trial]
    space: Mapping[str, Range | Choices]
    baseline: Mapping[str, Any]
    metric: str
    best: str
    norm: Normalize

    def draw_parallel(self, axes: Axes) -> None:
        """A vertical axis for each key and one for the score; heights are fractions of each axis's own range."""
        # axes and their tick labels
        scales = {
            key: _Scale(values, [self._value(trial, key) for trial in self.trials])
            for key, values in self.space.items()
        }
        labels = [scale.ticks() for scale in scales.values()]
        labels.append([(height, f"{float(self.norm.inverse(height)):.1f}") for height in _QUARTERS])
        for x, ticks in enumerate(labels):
            axes.axvline(x, color="0.75", lw=1, zorder=0)
            for height, text in ticks:
                axes.annotate(text, (x, height), (4, 0), **_LABEL)

        # a line per trial, highlighted ones on top
        for trial in sorted(self.trials, key=lambda each: (each.key in (BASELINE, self.best), _score(each))):
            heights = [scale.height(self._value(trial, key)) for key, scale in scales.items()]
            heights.append(float(self.norm(_score(trial))))
            points = {x: height for x, height in enumerate(heights) if height is not None}
            colour, width = self._colour_and_width(trial)
            line = "--" if trial.status == "pruned" else "-"
            axes.plot(list(points), list(points.values()), line, c=colour, lw=width, alpha=0.9)
        end = len(scales)
        axes.set_xticks(range(end + 1), [*self.space, self.metric], fontsize=8)
        axes.set(yticks=[], ylim=(-0.06, 1.06), xlim=(-0.15, end + 0.35))
        axes.set_title("parallel coordinates; dashed: pruned", fontsize=9)
        axes.spines[["left", "right", "top"]].set_visible(False)

    def draw_over_rate(self, axes: Axes) -> None:
        """The score over RATE, with a dash for each further seed."""
        # a dot per trial
        ranges = {key: values for key, values in self.space.items() if isinstance(values, Range)}
        key = _RATE if _RATE in ranges else next(iter(ranges), None)
        for number, trial in enumerate(self.trials):
            x = number if key is None else self._value(trial, key)
            if x is None:
                continue
            colour, width = self._colour_and_width(trial)
            fill = "white" if trial.status == "pruned" else colour
            axes.plot([x], [_score(trial)], "o", ms=7, mec=colour, mew=1.5, mfc=fill, zorder=width)
            same = [each for each in self.repeats if each.setting == trial.key]
            further = [each.value for each in same if each.value is not None]
            axes.plot([x] * len(further), further, "_", ms=14, mew=2, c=colour, zorder=5)

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
        axes.set(xlabel=key or "trial", ylabel=f"{self.metric}, percent")
        axes.grid(alpha=0.3)
        axes.set_title(f"{self.metric} over {key or 'the trials'}", fontsize=9)

    def _value(self, trial: Trial, key: str) -> Any:
        return {**self.baseline, **trial.values}.get(key)

    def _colour_and_width(self, trial: Trial) -> tuple[Any, float]:
        """Baseline and best are highlighted, the others coloured by score."""
        if trial.key == BASELINE:
            return BASELINE_COLOUR, 2.5
        if trial.key == self.best:
            return BEST_COLOUR, 2.5
        return colormaps[MAP](float(self.norm(_score(trial))) * 0.92), 1.2


class _Scale:
    """Maps the values of a key to heights from 0 to 1; `plotted` ones may lie outside the space."""

    def __init__(self, space: Range | Choices, plotted: Sequence[Any]) -> None:
        known = [each for each in plotted if each is not None]
        self._texts: list[str] = []
        self._ticks: Sequence[int] | None = None
        if isinstance(space, Choices):
            self._texts = list(dict.fromkeys(json.dumps(each) for each in (*space.choices, *known)))
            self._ticks = range(len(self._texts))
            self._norm = Normalize(0, max(1, len(self._texts) - 1))
            return
        low, high = min([space.low, *known]), max([space.high, *known])
        self._norm = LogNorm(low, high) if space.log and low > 0 else Normalize(low, high)
        if not space.log and high - low <= 8 and all(float(each).is_integer() for each in (low, high, *known)):
            self._ticks = range(int(low), int(high) + 1)

    def height(self, value: Any) -> float | None:
        """Height of a value; None for None."""
        if value is None:
            return None
        return float(self._norm(self._texts.index(json.dumps(value)) if self._texts else value))

    def ticks(self) -> list[tuple[float, str]]:
        """Height and text of each tick."""
        if self._ticks is None:
            return [(height, f"{self._norm.inverse(height):.3g}") for height in _QUARTERS]
        return [(float(self._norm(tick)), self._texts[tick] if self._texts else f"{tick}") for tick in self._ticks]


def _score(trial: Trial) -> float:
    return trial.value or 0.0
