"""Plot of a threshold search: scores over DET_THRESH, and the confidence histogram of the detections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from motip.evaluation.threshold_search import ThresholdSearchResult

_COLOURS = {"HOTA": "#1f4e79", "DetA": "#c55a11", "AssA": "#548235"}


def threshold_figure(sweep: ThresholdSearchResult) -> Figure:
    """Left: HOTA, DetA and AssA over DET_THRESH. Right: true and false positives by confidence, stacked."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    scores, confidence = figure.subplots(1, 2)
    thresholds = [each.settings.det_thresh for each in sweep.candidates]
    best, configured = sweep.candidates[sweep.best], sweep.candidates[sweep.configured]
    for name, colour in _COLOURS.items():
        scores.plot(
            thresholds, [each.metric(name) for each in sweep.candidates], marker="o", ms=3, c=colour, label=name
        )
    # Histogram of the detections.
    pooled = sweep.pooled()
    bins = len(pooled["true"])
    lefts = [index / bins for index in range(bins)]
    confidence.bar(lefts, pooled["true"], 1 / bins, align="edge", color="#548235", label="true positives")
    confidence.bar(
        lefts, pooled["false"], 1 / bins, bottom=pooled["true"], align="edge", color="#c00000", label="false positives"
    )
    # Best and configured threshold.
    for axes in (scores, confidence):
        axes.axvline(best.settings.det_thresh, color="black", lw=1, label=f"best, {best.settings.det_thresh:g}")
        if configured is not best:
            axes.axvline(
                configured.settings.det_thresh,
                color="grey",
                lw=1,
                ls="--",
                label=f"configured, {configured.settings.det_thresh:g}",
            )
        axes.set_xlim(0, 1)
        axes.legend(fontsize=8)
    scores.set(xlabel="DET_THRESH", ylabel="percent, mean of the classes", ylim=(0, None))
    scores.set_title(f"{sweep.videos} val videos", fontsize=10)
    confidence.set(xlabel="confidence of the detection", ylabel=f"detections above {sweep.floor:g}")
    confidence.set_title("detections, IoU 0.5", fontsize=10)
    return figure
