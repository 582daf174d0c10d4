"""`motip compare`: is B better than A, or is it noise?"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.evaluate.scores import Scores

_RUN_ID = re.compile(r"[0-9a-f]{32}")


def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", help="Scores file, folder of an evaluation or stage, or MLflow id of a run.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; its differences from A are shown.")],
    split: Annotated[str, typer.Option(help="Which scores of an evaluation's folder: val or test.")] = "val",
    sources: Annotated[
        str | None, typer.Option(help="Only these, comma-separated (default: all that both have).")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Only these in the table, comma-separated, e.g. HOTA,IDF1.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Sets of sequences that the interval is drawn from.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the draws; equal seeds give equal intervals.")] = 0,
    storage: Annotated[
        str, typer.Option(help="Storage of the runs, where A or B is one (MLFLOW_TRACKING_URI goes before it).")
    ] = "~/motip",
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show the differences between two evaluations of the same videos, each with its 95 % interval.

    The interval comes from drawing whole sequences with replacement, the same for A and B. Where it spans 0 the
    difference is within noise. Training again with another seed is a noise of its own, which it does not know.

    Example: motip compare ~/motip/evaluations/3f2a91c0d5e7 ~/motip/evaluations/8b10c44e72fd
    """
    from motip.cli.console import as_json, console, note, table
    from motip.evaluate.comparison import COVERAGE, METRICS, comparisons_json
    from motip.evaluate.comparison import compare as compare_scores

    shown = METRICS if metrics is None else _metrics(metrics)
    (place_a, scores_a), (place_b, scores_b) = (_load(place, split, storage) for place in (a, b))
    chosen = _sources(sources, scores_a, scores_b)
    results = {name: compare_scores(scores_a[name], scores_b[name], draws, seed) for name in chosen}
    if json:
        as_json({"a": place_a, "b": place_b, "sources": comparisons_json(results)})
        return
    console().print(f"A: {place_a}\nB: {place_b}", highlight=False)
    for name, result in results.items():
        header, rows = result.table(shown)
        table(header, rows, title=name)
        caption = (
            f"protocol {result.identity['protocol']}, split {result.identity['split']}, "
            f"classes {result.identity['classes'].replace(',', ', ')}, {result.sequences} sequences "
            f"({result.identity['sequences'][:12]}); {result.draws} draws, seed {result.seed}"
        )
        console().print(caption, highlight=False)
        for text in result.notes:
            note(f"{name}: {text}")
    for side, own, other in (("A", scores_a, scores_b), ("B", scores_b, scores_a)):
        for name in sorted(set(own) - set(other)):
            note(f"source {name} is in {side} only: not compared")
    note(f"of 20 such intervals about one leaves 0 out by chance alone ({COVERAGE:.0f} %)")


def _load(place: str, split: str, storage: str) -> tuple[str, dict[str, Scores]]:
    """Where scores were read from, and they themselves by source."""
    from motip.evaluate.score_files import best_of, epoch_of, load_scores, read_scores
    from motip.storage.paths import location

    if not _RUN_ID.fullmatch(place) or location(place).exists():
        return load_scores(place, split)
    from motip.cli.lineage import recorded

    found = recorded(storage).scores(place)
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
    wanted = common if named is None else [name.strip() for name in named.split(",") if name.strip()]
    missing = [name for name in wanted if name not in common]
    if missing or not wanted:
        raise MotipError(
            f"A and B do not both have scores of {missing[0]!r}" if missing else "A and B have no source in common",
            where="A, B" if named is None else "--sources",
            found=f"A: {', '.join(a)}; B: {', '.join(b)}",
            fix="evaluate both on the same sources",
        )
    return wanted


def _metrics(named: str) -> tuple[str, ...]:
    from motip.evaluate.scores import COUNTS, PERCENTAGES

    known = [name for name in (*PERCENTAGES, *COUNTS) if name not in ("GT", "TP")]
    wanted = tuple(name.strip() for name in named.split(",") if name.strip())
    for name in wanted:
        if name not in known:
            raise MotipError("unknown metric", where="--metrics", found=name, expected="some of " + ", ".join(known))
    return wanted
