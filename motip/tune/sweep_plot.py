"""The picture of a hyper-parameter sweep: every trial as a line across its values, and the score over each rate."""

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
"""The score is drawn over this key; over the first range where it is not searched."""
HAND, BEST = "#c00000", "#d9730d"
_CLEAR = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}


@dataclass(frozen=True)
class Shown:
    """One trial.

    Attributes:
        values: of all searched keys; None where the hand-set configuration says it another way.
        value: its best epoch's score; None where it failed.
        status: `finished`, `pruned` or `failed`.
        repeats: scores of the same setting with further seeds.
    """

    key: str
    values: Mapping[str, Any]
    value: float | None
    status: str
    repeats: tuple[float, ...] = ()


def sweep_figure(
    trials: Sequence[Shown],
    space: Mapping[str, Range | Choices],
    *,
    title: str,
    metric: str,
    hand_set: str,
    best: str,
) -> Figure:
    """Left: parallel coordinates. Right: the score over LR, or over the first range, or trial after trial.

    Colour is the score. Pruned trials are dashed and hollow, with the score at which they were given up.

    Args:
        hand_set, best: keys of the trials that are drawn out.
    """
    figure = Figure(figsize=(7.5 + 1.6 * len(space), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1 + 0.45 * len(space), 1.25])
    scored = [trial for trial in trials if trial.value is not None]
    values = [trial.value for trial in scored if trial.value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    look = _Look(Normalize(low, high if high > low else low + 1), hand_set, best)
    _parallel(left, scored, space, metric, look)
    _over_rate(right, scored, space, metric, look)
    failed = len(trials) - len(scored)
    counted = f"{len(trials)} trials" + (f", {failed} without a score are not drawn" if failed else "")
    figure.suptitle(f"{title}: {counted}", fontsize=11)
    return figure


def _parallel(
    axes: Axes, trials: Sequence[Shown], space: Mapping[str, Range | Choices], metric: str, look: _Look
) -> None:
    """One upright axis for each key and one for the score; heights are shares of each axis's own range."""
    keys = list(space)
    scales = [_Scale(space[key], [trial.values.get(key) for trial in trials]) for key in keys]
    for place, scale in enumerate(scales):
        axes.axvline(place, color="0.75", lw=1, zorder=0)
        for height, text in scale.ticks():
            _label(axes, place, height, text)
    end = len(keys)
    axes.axvline(end, color="0.75", lw=1, zorder=0)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        _label(axes, end, share, f"{float(look.norm.inverse(share)):.1f}")
    for trial in sorted(trials, key=lambda each: (look.stands_out(each), each.value or 0.0)):
        heights = [scale.height(trial.values.get(key)) for key, scale in zip(keys, scales, strict=True)]
        points = [(place, height) for place, height in enumerate(heights) if height is not None]
        points.append((end, float(look.norm(trial.value or 0.0))))
        colour, width = look.of(trial)
        style = "--" if trial.status == "pruned" else "-"
        axes.plot(*zip(*points, strict=True), style, c=colour, lw=width, alpha=0.9)
    axes.set_xticks(range(end + 1), [*keys, metric], fontsize=8)
    axes.set(yticks=[], ylim=(-0.06, 1.06), xlim=(-0.15, end + 0.35))
    axes.set_title("parallel coordinates; dashed: pruned", fontsize=9)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def _label(axes: Axes, place: float, height: float, text: str) -> None:
    axes.annotate(
        text, (place, height), (4, 0), textcoords="offset points", fontsize=7, va="center", color="0.2", bbox=_CLEAR
    )


def _over_rate(
    axes: Axes, trials: Sequence[Shown], space: Mapping[str, Range | Choices], metric: str, look: _Look
) -> None:
    ranges = [key for key, values in space.items() if isinstance(values, Range)]
    key = RATE if RATE in ranges else next(iter(ranges), None)
    for number, trial in enumerate(trials):
        place = trial.values.get(key) if key is not None else number
        if place is None or trial.value is None:
            continue
        colour, width = look.of(trial)
        hollow = trial.status == "pruned"
        axes.plot(
            *([place], [trial.value], "o"), ms=7, mec=colour, mew=1.5, mfc="white" if hollow else colour, zorder=width
        )
        if trial.repeats:
            axes.plot([place] * len(trial.repeats), trial.repeats, "_", ms=14, mew=2, c=colour, zorder=5)
    for label, colour in (("hand-set", HAND), ("best", BEST)):
        axes.plot([], [], "o", c=colour, label=label)
    axes.plot([], [], "o", mec="0.4", mfc="white", label="pruned, score when given up")
    axes.plot([], [], "_", ms=14, mew=2, c="0.4", label="same setting, further seed")
    axes.legend(fontsize=7, loc="best")
    if key is not None and space[key].log:  # type: ignore[union-attr]
        axes.set_xscale("log")
        # By default every digit between two powers of ten gets a label where there is room for three of them.
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=key or "trial", ylabel=f"{metric}, percent")
    axes.grid(alpha=0.3)
    axes.set_title(f"{metric} over {key or 'the trials'}", fontsize=9)


@dataclass(frozen=True)
class _Look:
    """How a trial is drawn: its score as a colour, hand-set and best in colours of their own and on top."""

    norm: Normalize
    hand_set: str
    best: str

    def of(self, trial: Shown) -> tuple[Any, float]:
        """Colour and line width."""
        if trial.key == self.hand_set:
            return HAND, 2.5
        if trial.key == self.best:
            return BEST, 2.5
        return colormaps[MAP](float(self.norm(trial.value or 0.0)) * 0.92), 1.2

    def stands_out(self, trial: Shown) -> bool:
        return trial.key in (self.hand_set, self.best)


class _Scale:
    """Where the values of a key stand on an axis from 0 to 1."""

    def __init__(self, space: Range | Choices, drawn: Sequence[Any]) -> None:
        self._space = space
        numbers = [float(each) for each in drawn if isinstance(each, (int, float))]
        if isinstance(space, Range):
            # The hand-set value may lie outside the range.
            self._low, self._high = min([space.low, *numbers]), max([space.high, *numbers])
            self._log = space.log and self._low > 0
            self._whole = all(number.is_integer() for number in (self._low, self._high, *numbers))
            self._texts: list[str] = []
        else:
            texts = [json.dumps(each) for each in (*space.choices, *drawn) if each is not None]
            self._texts = list(dict.fromkeys(texts))
            self._low, self._high, self._log = 0.0, float(max(1, len(self._texts) - 1)), False
            self._whole = False

    def height(self, value: Any) -> float | None:
        if value is None:
            return None
        number = float(self._texts.index(json.dumps(value))) if self._texts else float(value)
        if self._log:
            return (math.log(number) - math.log(self._low)) / (math.log(self._high) - math.log(self._low))
        return self._share(number)

    def _share(self, number: float) -> float:
        return (number - self._low) / (self._high - self._low)

    def ticks(self) -> list[tuple[float, str]]:
        if self._texts:
            return [(number / self._high, text) for number, text in enumerate(self._texts)]
        found = []
        if self._whole and not self._log and self._high - self._low <= 8:
            return [(self._share(number), f"{number}") for number in range(int(self._low), int(self._high) + 1)]
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            if self._log:
                number = math.exp(math.log(self._low) + share * (math.log(self._high) - math.log(self._low)))
            else:
                number = self._low + share * (self._high - self._low)
            found.append((share, f"{number:.3g}"))
        return found
