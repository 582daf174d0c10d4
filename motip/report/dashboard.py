"""Training dashboard: one PNG per stage with twelve panels over the epochs, redrawn after every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from motip.errors import MotipError
from motip.report.stage_history import History
from motip.storage.paths import Location, atomic_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Panel = Callable[[Axes, History], None]

FILE = "dashboard.png"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
"""The Okabe-Ito palette, safe for colour-blind readers; lines also differ in their markers."""
MARKERS = "osD^vPX*"
FAILED = "#D9D9D9"
LOWEST = -50.0
"""MOTA is unbounded below; a value under this many percent is drawn as an arrow with its number."""

_STYLE: dict[Any, Any] = {
    "font.size": 13,
    "axes.titlesize": 15,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "0.88",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 11.5,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
    "lines.linewidth": 2.2,
    "lines.markersize": 6,
}
_GROUPS = {"backbone": "backbone", "linear_proj": "sampling points", "dictionary": "ID words", "rest": "all others"}


def dashboard(history: History) -> Figure:
    """Figure of 1500 x 1560 pixels: losses, scores, gradient norms, learning rates, throughput, memory, skipped clips.

    Epochs count from 1. An epoch without a record or without a finite loss is a grey hatched gap that no line crosses;
    an epoch that was trained but not scored has no point in the score panels.
    """
    with rc_context(_STYLE):
        # 1500 pixels across; shown at 60 % in a README the text is still about 11 pixels high.
        figure = Figure(figsize=(15, 15.6), dpi=100, facecolor="white")
        grid = figure.subplots(4, 3)
        figure.subplots_adjust(left=0.055, right=0.985, top=0.91, bottom=0.065, hspace=0.42, wspace=0.2)
        for axes, (title, unit, draw) in zip(grid.flat, _PANELS, strict=True):
            axes.set(title=title, ylabel=unit)
            draw(axes, history)
            _frame(axes, history)
        figure.suptitle(_title(history), x=0.055, y=0.985, ha="left", va="top", fontsize=20, weight="bold")
        figure.text(0.055, 0.951, _subtitle(history), fontsize=13, color="0.25", va="top")
        figure.text(0.055, 0.014, _footer(history), fontsize=12, color="0.25")
    return figure


def draw_dashboard(folder: Location, target: Location) -> History:
    """Draw the dashboard of a stage's folder into ``target`` (.png), written atomically; returns the history read.

    Raises:
        MotipError: not a stage's folder, no finished epoch, or the picture cannot be written.
    """
    history = History.load(folder)
    if not history.epochs:
        raise MotipError(
            "this stage has no finished epoch yet",
            where=folder,
            expected="at least one epoch_<n>/metrics.json",
            fix="wait for its first epoch",
        )
    write_dashboard(history, target)
    return history


def write_dashboard(history: History, target: Location) -> None:
    """Write the dashboard of a history to ``target`` atomically; raises MotipError if it cannot be written."""
    with atomic_output(target) as path:
        dashboard(history).savefig(path, format="png")


def _title(history: History) -> str:
    done = "finished" if history.finished else "in training"
    return f"{history.stage}: {len(history.epochs)} of {history.planned} epochs, {done}"


def _subtitle(history: History) -> str:
    best = history.best_epoch()
    if best is None:
        return "no epoch is scored yet"
    metrics = history.epochs[best]
    names = list(dict.fromkeys([history.best, "HOTA", "DetA", "AssA", "IDF1", "MOTA", "DetRe", "DetPr"]))
    scores = ", ".join(f"{name} {metrics[name]:.1f}" for name in names if name in metrics)
    return f"best epoch {best + 1} (checkpoint_{best}.pth): {scores}"


def _footer(history: History) -> str:
    failed = history.failed()
    parts = ["dotted: best epoch", "scores: mean of the classes on the locked validation videos"]
    if failed:
        numbers = ", ".join(str(epoch + 1) for epoch in failed)
        parts.insert(1, f"grey: without a finished record or finite loss ({_shortened(numbers)})")
    return "   ·   ".join(parts)


def _shortened(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[:limit].rsplit(",", 1)[0] + ", …"


def _points(history: History, name: str) -> Iterator[tuple[float, float]]:
    """(epoch from 1, value) pairs of a metric: NaN for a failed epoch; an epoch without the metric is omitted."""
    failed = set(history.failed())
    for epoch in range(history.last + 1):
        if epoch in failed:
            yield epoch + 1, math.nan
        elif name in history.epochs[epoch]:
            yield epoch + 1, history.epochs[epoch][name]


def _line(axes: Axes, history: History, name: str, label: str, index: int, scale: float = 1.0) -> None:
    """Draw one metric over the epochs in the ``index``-th colour, if any epoch has a finite value."""
    points = list(_points(history, name))
    values = [scale * value for _, value in points]
    if not any(math.isfinite(value) for value in values):
        return
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    # Thin the markers on long runs; with gaps, keep all, or an isolated point would be invisible.
    every = max(1, len(points) // 25) if not history.failed() else 1
    axes.plot([x for x, _ in points], values, color=colour, marker=marker, markevery=every, label=label, zorder=3)


def _steps(axes: Axes, history: History, name: str, index: int, label: str | None = None) -> None:
    """Draw one metric of the logged steps, faint without a label; the line breaks at a missing epoch."""
    xs, ys, previous = [], [], None
    for epoch, done, values in history.steps:
        if previous is not None and epoch > previous + 1:
            xs.append(float(previous + 1))
            ys.append(math.nan)
        xs.append(epoch + done)
        ys.append(values.get(name, math.nan))
        previous = epoch
    if any(math.isfinite(value) for value in ys):
        alpha, width = (1.0, 2.0) if label else (0.35, 1.0)
        axes.plot(xs, ys, color=COLOURS[index % len(COLOURS)], label=label, alpha=alpha, lw=width, zorder=2)


def _losses(axes: Axes, history: History) -> None:
    _steps(axes, history, "loss", 0)
    for index, (name, label) in enumerate((("loss", "total"), ("detr_loss", "detection"), ("id_loss", "ID"))):
        _line(axes, history, f"train/{name}", label, index)
    _from_zero(axes, history, "train/loss", headroom=1.7)  # for the legend above the three lines


def _scores(*names: str) -> Panel:
    return lambda axes, history: _percent(axes, history, {name: name for name in names})


def _per_class(metric: str) -> Panel:
    return lambda axes, history: _percent(axes, history, {f"{metric}/{name}": name for name in history.classes()})


def _percent(axes: Axes, history: History, names: Mapping[str, str]) -> None:
    """Draw metrics (name -> label) on 0 to 10, 25, 50 or 100 percent.

    A negative MOTA lowers the axis; values below LOWEST are arrows.
    """
    for index, (name, label) in enumerate(names.items()):
        _line(axes, history, name, label, index)
    points = [(x, value, index) for index, name in enumerate(names) for x, value in _points(history, name)]
    lowest = min((value for _, value, _ in points if math.isfinite(value)), default=0.0)
    highest = max((value for _, value, _ in points if math.isfinite(value)), default=100.0)
    top = next(each for each in (10.0, 25.0, 50.0, 100.0) if highest <= 0.8 * each or each == 100)
    bottom = max(LOWEST, 10 * math.floor(lowest / 10)) if lowest < 0 else 0.0
    axes.set_ylim(*_padded(bottom, top))
    if lowest < 0:
        axes.axhline(0, color="0.5", lw=1)
    below = [(x, value, index) for x, value, index in points if value < LOWEST]
    for x, value, index in below:
        axes.plot([x], [LOWEST + 4], marker="v", ms=9, color=COLOURS[index % len(COLOURS)], clip_on=False, zorder=4)
        if len(below) <= 6:
            axes.annotate(f"{value:.0f}", (x, LOWEST + 9), ha="center", fontsize=10)


def _gradients(axes: Axes, history: History) -> None:
    axes.set_yscale("log")
    # Labels at 1, 2 and 5 times powers of ten, as plain numbers.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    for index, (name, label) in enumerate((("detr_grad_norm", "detector"), ("other_grad_norm", "all others"))):
        _steps(axes, history, name, index)
        _line(axes, history, f"train/{name}", label, index)
    low, high = axes.get_ylim()
    axes.set_ylim(low, 5 * high)  # for the legend above the lines


def _rates(axes: Axes, history: History) -> None:
    axes.set_yscale("log")
    same: dict[tuple[float, ...], list[str]] = {}
    for name, label in _GROUPS.items():
        values = tuple(step.get(f"lr/{name}", math.nan) for _, _, step in history.steps)
        if any(value > 0 for value in values):
            same.setdefault(values, []).append(name)
            continue
        if any(value == 0 for value in values):
            axes.plot([], [], color="0.6", label=f"{label}: 0")
    # One line per group of parameters that share a schedule.
    for index, names in enumerate(same.values()):
        label = ", ".join(_GROUPS[name] for name in names) if len(names) < len(_GROUPS) else "all parameters"
        _steps(axes, history, f"lr/{names[0]}", index, label)
    if len(same) > 1 or len(next(iter(same.values()), ())) < len(_GROUPS):
        # Rates differ by powers of ten: leave space for the legend above the highest.
        low, high = axes.get_ylim()
        axes.set_ylim(low / 1.5, 40 * high)


def _throughput(axes: Axes, history: History) -> None:
    _line(axes, history, "clips_per_s", "clips per second", 0)
    _from_zero(axes, history, "clips_per_s")


def _waiting(axes: Axes, history: History) -> None:
    _line(axes, history, "time/wait_share", "waiting share", 1, scale=100.0)
    axes.set_ylim(*_padded(0, 100))


def _memory(axes: Axes, history: History) -> None:
    # An epoch without a step record has 0 here, which is not a measurement.
    if any(value > 0 for _, value in _points(history, "device/memory_gib")):
        _line(axes, history, "device/memory_gib", "memory", 2)
        _from_zero(axes, history, "device/memory_gib")


def _skipped(axes: Axes, history: History) -> None:
    # The stored count is cumulative over the stage.
    stored = {
        epoch + 1: metrics["clips_skipped"]
        for epoch, metrics in sorted(history.epochs.items())
        if "clips_skipped" in metrics
    }
    if stored:
        counts = np.diff([0.0, *stored.values()]).clip(min=0.0)
        axes.bar(list(stored), counts, width=0.7, color=COLOURS[1], label="skipped", zorder=3)
        axes.set_ylim(0, max(1.0, 1.15 * counts.max()))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.text(0.98, 0.95, f"{counts.sum():.0f} in all", transform=axes.transAxes, ha="right", va="top")


def _padded(low: float, high: float) -> tuple[float, float]:
    """The range with a margin of 3 % for the markers at its ends."""
    return low - 0.03 * (high - low), high + 0.03 * (high - low)


def _from_zero(axes: Axes, history: History, name: str, headroom: float = 1.25) -> None:
    """Set the y range to 0 .. headroom x the largest epoch mean; an outlier step must not flatten the curve."""
    highest = max((value for _, value in _points(history, name) if math.isfinite(value)), default=0.0)
    if highest > 0:
        axes.set_ylim(-0.03 * highest, headroom * highest)


def _frame(axes: Axes, history: History) -> None:
    """Draw what all panels share: the epoch axis, failed epochs, the best epoch, the legend."""
    axes.set_xlabel("epoch")
    axes.set_xlim(0, max(history.planned, history.last + 1) + 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    for epoch in history.failed():
        axes.axvspan(epoch + 0.5, epoch + 1.5, facecolor=FAILED, edgecolor="0.6", hatch="//", lw=0, zorder=0)
    drawn = bool(axes.lines or axes.patches[len(history.failed()) :])
    best = history.best_epoch()
    if best is not None:
        axes.axvline(best + 1, color="0.3", lw=1.2, ls=":", zorder=1)
    if not drawn:
        axes.text(0.5, 0.5, "not recorded yet", transform=axes.transAxes, ha="center", va="center", color="0.4")
        axes.set_yticks([], minor=False)
        axes.tick_params(which="both", left=False, labelleft=False)
        return
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1 or axes.get_title(loc="left").endswith("by class"):
        axes.legend(handles, labels, ncols=2 if len(labels) > 4 else 1, loc="best")


_PANELS: tuple[tuple[str, str, Panel], ...] = (
    ("Losses", "loss (no unit)", _losses),
    ("HOTA, IDF1, MOTA", "percent", _scores("HOTA", "IDF1", "MOTA")),
    ("HOTA by class", "percent", _per_class("HOTA")),
    ("Detection: recall against precision", "percent", _scores("DetRe", "DetPr")),
    ("Association against detection", "percent", _scores("AssA", "DetA")),
    ("Detection recall by class", "percent", _per_class("DetRe")),
    ("Gradient norm before clipping", "L2 norm (log)", _gradients),
    ("Learning rate", "per step (log)", _rates),
    ("Clips skipped", "clips in the epoch", _skipped),
    ("Throughput", "clips per second", _throughput),
    ("Waiting for data", "percent of the epoch's time", _waiting),
    ("Memory, most in an epoch", "GiB", _memory),
)
"""Title, unit and drawing function of each panel."""
