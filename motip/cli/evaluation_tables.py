"""Tables of an evaluation, its errors and a threshold search, for the terminal."""

from __future__ import annotations

from motip.cli.console import line, note, table
from motip.evaluation.bootstrap import MEAN
from motip.evaluation.comparison import Comparison
from motip.evaluation.evaluator import Evaluation
from motip.evaluation.outcome_summary import OutcomeSummary
from motip.evaluation.threshold_search import ThresholdSearchResult


def show_scores(done: Evaluation) -> None:
    """Print a table and a caption per source, then the notes."""
    for source, scores in done.scores.items():
        table(*scores.table(), title=source)
        line(scores.caption())
    for source in done.tracked_only:
        note(f"{source} has no labels of the averaged classes: tracked, not scored")
    for text in done.notes:
        note(text)


def show_errors(source: str, summary: OutcomeSummary, class_names: tuple[str, ...]) -> None:
    """Print the outcomes of a source's labelled boxes, class by class."""
    for name in class_names:
        table(*summary.table(name), title=f"{source}, {name}: outcomes of the labelled boxes")
        switches = {gap: number for gap, number in summary.gaps[name].items() if number}
        if switches:
            counts = ", ".join(f"{number} at {gap}" for gap, number in switches.items())
            line(f"ID switches by frames since the last match: {counts}")
    worst = [f"{each['sequence']} {each['frame']} ({each['errors']})" for each in summary.worst_frames(5)]
    if worst:
        line(f"{source}, frames with most errors (0-based): {', '.join(worst)}")


def show_threshold_search(done: ThresholdSearchResult, differences: dict[str, Comparison]) -> None:
    """Print a threshold search.

    Args:
        differences: source -> the best setting compared with the configured one; empty if they are the same.
    """
    sources = " and sources" if done.has_several_sources else ""
    table(*done.table(), title=f"HOTA by DET_THRESH, mean of the classes{sources}")
    best, configured = done.candidates[done.best], done.candidates[done.configured]
    # Confidence histogram.
    line("detections by confidence, IoU 0.5: # true, - false positives")
    for bar in done.bars():
        line(bar)
    for source in done.skipped:
        note(f"{source} has no labels of the averaged classes: not included")
    for text in done.notes:
        note(text)
    if done.best_at_edge:
        note("the best threshold is at the edge of the range: extend it with --thresholds")
    # Best against configured.
    det, newborn = best.settings.det_thresh, best.settings.newborn_thresh
    if best is configured:
        line(f"best: DET_THRESH {det:g}, NEWBORN_THRESH {newborn:g}, as configured")
        return
    for source, comparison in differences.items():
        hota = comparison.of(MEAN, "HOTA")
        interval = "too few sequences for an interval"
        if hota.low is not None and hota.high is not None:
            verdict = hota.verdict.replace("B is", "the best is")
            interval = f"95 % interval {hota.low:+.1f} .. {hota.high:+.1f}, {verdict}"
        line(f"{source}: HOTA {hota.difference:+.1f} against the configured one ({interval})")
        for text in comparison.notes:
            note(f"{source}: {text}")
    note("the score of the best threshold is optimistic: it was selected on these videos")
    line(
        f"best: DET_THRESH {det:g}, NEWBORN_THRESH {newborn:g}: HOTA {best.hota:.1f}, "
        f"{configured.hota:.1f} as configured ({configured.settings.det_thresh:g}). To use it: motip track "
        f"--score_thresh {det:g} --newborn_thresh {newborn:g}, or DET_THRESH and NEWBORN_THRESH in the configuration"
    )
