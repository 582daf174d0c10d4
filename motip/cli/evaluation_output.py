"""Output of `motip evaluate`: tables of an evaluation, its errors and a threshold search, and the files of a search."""

from __future__ import annotations

from motip.cli.console import line, note, table
from motip.errors import MotipError
from motip.evaluation.bootstrap import MEAN
from motip.evaluation.checkpoint import EvaluateOptions, evaluate_checkpoint, prepared_job, write_result
from motip.evaluation.comparison import Comparison, compare, comparisons_json
from motip.evaluation.evaluator import Evaluation
from motip.evaluation.outcome_summary import OutcomeSummary
from motip.evaluation.threshold_search import (
    ThresholdSearchInput,
    ThresholdSearchResult,
    candidate_settings,
    check_search_split,
    search_thresholds,
)
from motip.report.threshold_plot import threshold_figure
from motip.storage.paths import atomic_output


def run_evaluation(options: EvaluateOptions, *, sweep_thresholds: bool = False, thresholds: str | None = None) -> None:
    """Evaluate, or search the thresholds; print the result.

    Raises:
        MotipError: options that exclude each other, or as the two functions below.
    """
    if thresholds is not None and not sweep_thresholds:
        raise MotipError("--thresholds needs --sweep-thresholds", where="--thresholds", fix="add --sweep-thresholds")
    if options.errors and sweep_thresholds:
        raise MotipError(
            "--errors and --sweep-thresholds exclude each other",
            where="--errors, --sweep-thresholds",
            fix="search the thresholds first, then evaluate with --errors",
        )
    if sweep_thresholds:
        sweep_checkpoint(options, thresholds)
    else:
        _evaluate_and_print(options)


def _evaluate_and_print(options: EvaluateOptions) -> None:
    found = evaluate_checkpoint(options, line)
    done, split = found.evaluation, options.split
    _show_scores(done)
    for source, summary in found.outcomes.items():
        _show_errors(source, summary, found.class_names[source])
    again = f", {done.reused} tracked before" if done.reused else ""
    files = f", scores_{split}.json and errors_{split}.json" if options.errors else f" and scores_{split}.json"
    line(f"{done.videos} videos{again}; tracks{files} are in {found.folder}")


def sweep_checkpoint(options: EvaluateOptions, thresholds: str | None = None) -> ThresholdSearchResult:
    """Track and score the val videos at many DET_THRESH; print and write the best one and the confidence histogram.

    Args:
        thresholds: comma-separated; None: the default grid.

    Raises:
        MotipError: invalid options or data, or a split other than val.
    """
    check_search_split(options.split)
    with prepared_job(options, line) as job:
        tried = candidate_settings(job.loaded.settings, None if thresholds is None else _numbers(thresholds))
        subject = ThresholdSearchInput(job.loaded.model, job.sha256, tuple(tried), job.class_maps, job.protocols)
        done = search_thresholds(subject, job.loaded.settings, job.work)
    # Compare the best setting with the configured one, and write the result.
    folder = job.work.folder
    differences = _compare_with_configured(done)
    stored = {
        "checkpoint": str(options.checkpoint),
        "sha256": job.sha256,
        "split": options.split,
        "averaged": job.work.averaged,
        **done.to_json(),
        "best_against_configured": comparisons_json(differences),
    }
    write_result(stored, folder / "thresholds_val.json", options)
    with atomic_output(folder / "thresholds_val.png") as path:
        threshold_figure(done).savefig(path, dpi=110)
    # Print the tables.
    _show_threshold_search(done, differences)
    again = f", {done.reused} tracked before" if done.reused else ""
    line(f"{done.videos} videos{again}; thresholds_val.json and thresholds_val.png are in {folder}")
    return done


def _compare_with_configured(done: ThresholdSearchResult) -> dict[str, Comparison]:
    """Source -> the best setting (B) compared with the configured one (A); empty if they are the same."""
    best, configured = done.candidates[done.best], done.candidates[done.configured]
    if best is configured:
        return {}
    return {source: compare(configured.scores[source], best.scores[source]) for source in best.scores}


def _show_scores(done: Evaluation) -> None:
    """Print a table and a caption per source, then the notes."""
    for source, scores in done.scores.items():
        table(*scores.table(), title=source)
        line(scores.caption())
    for source in done.tracked_only:
        note(f"{source} has no labels of the averaged classes: tracked, not scored")
    for text in done.notes:
        note(text)


def _show_errors(source: str, summary: OutcomeSummary, class_names: tuple[str, ...]) -> None:
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


def _show_threshold_search(done: ThresholdSearchResult, differences: dict[str, Comparison]) -> None:
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


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise MotipError(
            "a threshold is not a number", where="--thresholds", found=text, expected="such as 0.2,0.3,0.4"
        ) from None
