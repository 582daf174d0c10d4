"""What an evaluation, its errors and a threshold sweep look like on the screen."""

from __future__ import annotations

from motip.cli.console import console, note, table
from motip.evaluate.bootstrap import MEAN
from motip.evaluate.comparison import Comparison, compare
from motip.evaluate.evaluation import Evaluation
from motip.evaluate.outcome_summary import Summary
from motip.evaluate.threshold_search import Sweep


def show_scores(done: Evaluation) -> None:
    """A table per source, with what it is about."""
    for source, scores in done.scores.items():
        header, rows = scores.table()
        table(header, rows, title=source)
        console().print(scores.caption(), highlight=False)
    for source in done.tracked_only:
        note(f"{source} has no label of the classes that are averaged: tracked, not scored")
    for text in done.notes:
        note(text)


def show_errors(source: str, summary: Summary, class_names: tuple[str, ...]) -> None:
    """Which objects of a source are lost, class by class."""
    for name in class_names:
        header, rows = summary.table(name)
        table(header, rows, title=f"{source}, {name}: what became of the labelled boxes")
        switches = {gap: number for gap, number in summary.gaps[name].items() if number}
        if switches:
            told = ", ".join(f"{number} at {gap}" for gap, number in switches.items())
            console().print(f"ID switches by frames since the last match: {told}", highlight=False)
    worst = [f"{each['sequence']} {each['frame']} ({each['errors']})" for each in summary.worst_frames(5)]
    if worst:
        console().print(f"{source}, frames with most errors (0-based): {', '.join(worst)}", highlight=False)


def show_sweep(done: Sweep) -> dict[str, Comparison]:
    """Print a sweep; returns how the best setting differs from the configured one, by source."""
    header, rows = done.table()
    table(header, rows, title="HOTA by DET_THRESH, mean of the classes" + (" and sources" if done.several else ""))
    best, configured = done.candidates[done.best], done.candidates[done.configured]
    lines = done.bars()
    console().print("detections by confidence, IoU 0.5: # true, - false positives", highlight=False)
    for line in lines:
        console().print(line, highlight=False, markup=False)
    for source in done.skipped:
        note(f"{source} has no label of the classes that are averaged: not swept")
    for text in done.notes:
        note(text)
    if done.at_the_edge:
        note("the best threshold is at the end of those tried: try others with --thresholds")
    det, newborn = best.settings.det_thresh, best.settings.newborn_thresh
    if best is configured:
        console().print(f"best: DET_THRESH {det:g}, NEWBORN_THRESH {newborn:g}, as configured", highlight=False)
        return {}
    differences = {source: compare(configured.scores[source], best.scores[source]) for source in best.scores}
    for source, comparison in differences.items():
        hota = comparison.of(MEAN, "HOTA")
        told = "too few sequences for an interval"
        if hota.low is not None and hota.high is not None:
            told = f"95 % interval {hota.low:+.1f} .. {hota.high:+.1f}, {hota.verdict.replace('B is', 'the best is')}"
        console().print(f"{source}: HOTA {hota.difference:+.1f} against the configured one ({told})", highlight=False)
        for text in comparison.notes:
            note(f"{source}: {text}")
    note("the best of many on these videos looks a little better than it will on others")
    console().print(
        f"best: DET_THRESH {det:g}, NEWBORN_THRESH {newborn:g}: HOTA {best.hota:.1f}, "
        f"{configured.hota:.1f} as configured ({configured.settings.det_thresh:g}). To use it: motip track "
        f"--score_thresh {det:g} --newborn_thresh {newborn:g}, or DET_THRESH and NEWBORN_THRESH in the configuration",
        highlight=False,
    )
    return differences
