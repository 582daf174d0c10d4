"""Log-log plots of the growth benchmark: measured quantities against size, with fitted lines."""

from __future__ import annotations

import math
import re
from pathlib import Path

from benchmarks.records import Record
from benchmarks.results import Machine
from motip.storage.atomic import atomic_write

CLAIM = "growth"


def file_name(work: str) -> str:
    return f"growth_{re.sub(r'[^a-z0-9]+', '_', work.lower()).strip('_')}.png"


def exponent(sizes: list[float], values: list[float]) -> tuple[float, float]:
    """Slope and factor of the least-squares line through the logarithms: value = factor x size ** slope."""
    x = [math.log(size) for size in sizes]
    y = [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return slope, math.exp(mean_y - slope * mean_x)


def draw(machines: list[Machine], folder: Path) -> list[Path]:
    """Write one plot per kind of growth with a record on any machine; returns the paths."""
    works: dict[str, list[tuple[str, Record]]] = {}
    for machine in machines:
        claim = machine.claims.get(CLAIM)
        for record in claim.records if claim else []:
            if record.points:
                works.setdefault(record.work, []).append((machine.heading(), record))
    return [_picture(work, records, folder / file_name(work)) for work, records in works.items()]


def _range(values: list[float]) -> tuple[float, float]:
    """Limits of an axis, at least a factor of ten apart, so that constant quantities appear flat."""
    low, high = min(values) / 1.2, max(values) * 1.2
    widen = max(1.0, math.sqrt(10 * low / high))
    return low / widen, high * widen


def _picture(work: str, records: list[tuple[str, Record]], path: Path) -> Path:
    from matplotlib.figure import Figure  # without pyplot, which would search for a display

    names = [name for name in records[0][1].points[0] if name != "at"]
    figure = Figure(figsize=(3.4 * len(names), 2.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for label, record in records:
            sizes = [point["at"] for point in record.points]
            values = [point[name] for point in record.points]
            slope, factor = exponent(sizes, values)
            dots = axes.loglog(sizes, values, "o", label=label if len(records) > 1 else None)
            line = [factor * size**slope for size in sizes]
            axes.loglog(sizes, line, "-", linewidth=1, color=dots[0].get_color(), label=f"exponent {slope:.2f}")
        axes.set(xlabel=work, ylabel=name)
        axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
        low, high = _range([point[name] for _, record in records for point in record.points])
        axes.set_ylim(low, high)
        ticks = [digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5)]
        axes.set_yticks(*zip(*((tick, f"{tick:g}") for tick in ticks if low <= tick <= high), strict=True))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with atomic_write(path) as temporary:
        # Without the library version in the file, equal figures give equal bytes.
        figure.savefig(temporary, dpi=100, metadata={"Software": None})
    return path
