"""`motip compare`: differences between two evaluations with paired bootstrap intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from motip.cli import options
from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.evaluation.scores import Scores


def compare(
    a: Annotated[
        str,
        typer.Argument(metavar="A", help="Scores file, folder of an evaluation or a stage, or MLflow run id."),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; the differences are B - A.")],
    split: options.Split = "val",
    sources: options.Sources = None,
    metrics: Annotated[
        str | None, typer.Option(help="Metrics in the table, comma-separated, e.g. HOTA,IDF1 (default: all).")
    ] = None,
    draws: Annotated[int, typer.Option(help="Number of bootstrap resamples for the interval.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the resampling; equal seeds give equal intervals.")] = 0,
    storage: options.Storage = "~/motip",
    json: options.Json = False,
) -> None:
    """Show the differences between two evaluations of the same videos, each with its 95 % interval.

    The interval is a paired bootstrap over sequences: A and B are resampled together. If it contains 0, the difference
    is within noise. It does not cover the variance between training seeds.

    Example: motip compare ~/motip/evaluations/3f2a91c0d5e7 ~/motip/evaluations/8b10c44e72fd
    """
    from motip.cli.console import as_json, line, note, table
    from motip.evaluation.comparison import COVERAGE, METRICS, comparisons_json
    from motip.evaluation.comparison import compare as compare_scores

    shown = METRICS if metrics is None else _metrics(metrics)
    (origin_a, scores_a), (origin_b, scores_b) = (_load(named, split, storage) for named in (a, b))
    chosen = _sources(sources, scores_a, scores_b)
    results = {name: compare_scores(scores_a[name], scores_b[name], draws, seed) for name in chosen}
    if json:
        as_json({"a": origin_a, "b": origin_b, "sources": comparisons_json(results)})
        return
    # One table per source.
    line(f"A: {origin_a}\nB: {origin_b}")
    for name, result in results.items():
        table(*result.table(shown), title=name)
        caption = (
            f"protocol {result.identity['protocol']}, split {result.identity['split']}, "
            f"classes {result.identity['classes'].replace(',', ', ')}, {result.sequences} sequences "
            f"({result.identity['sequences'][:12]}); {result.resamples} resamples, seed {result.seed}"
        )
        line(caption)
        for text in result.notes:
            note(f"{name}: {text}")
    # Sources without a counterpart, and the caveat.
    for side, own, other in (("A", scores_a, scores_b), ("B", scores_b, scores_a)):
        for name in sorted(set(own) - set(other)):
            note(f"source {name} is in {side} only: not compared")
    note(f"about 1 of 20 such intervals excludes 0 by chance alone ({COVERAGE:.0f} %)")


def _load(named: str, split: str, storage: str) -> tuple[str, dict[str, Scores]]:
    """Origin of the scores, and the scores by source; ``named`` is a path or an MLflow run id."""
    from motip.cli.runs import is_run_id, open_lineage
    from motip.evaluation.score_files import best_of, epoch_of, load_scores, read_scores

    if not is_run_id(named):
        return load_scores(named, split)
    found = open_lineage(storage).scores(named)
    where = f"run {found.run_id}"
    epochs = {
        epoch: read_scores(stored, f"{where}, scores/{name}")
        for name, stored in found.files.items()
        if (epoch := epoch_of(name)) is not None
    }
    best = best_of(epochs, found.best, where)
    return f"{where} ({found.stage}, epoch {best})", epochs[best]


def _sources(named: str | None, a: dict[str, Scores], b: dict[str, Scores]) -> list[str]:
    common = [name for name in a if name in b]
    selected = common if named is None else options.names_in(named)
    missing = [name for name in selected if name not in common]
    if missing or not selected:
        raise MotipError(
            f"A and B do not both have scores of {missing[0]!r}" if missing else "A and B have no source in common",
            where="A, B" if named is None else "--sources",
            found=f"A: {', '.join(a)}; B: {', '.join(b)}",
            fix="evaluate both on the same sources",
        )
    return selected


def _metrics(named: str) -> tuple[str, ...]:
    from motip.evaluation.scores import COUNTS, PERCENTAGES

    valid = [name for name in (*PERCENTAGES, *COUNTS) if name not in ("GT", "TP")]
    selected = options.names_in(named)
    options.check_known("unknown metric", "--metrics", selected, valid)
    return tuple(selected)
