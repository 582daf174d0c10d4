"""`motip lineage`: the chain of weights behind a run, and verification of its files by digest."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.lineage import Lineage


class _ShowByDefault(typer.core.TyperGroup):
    """Makes `motip lineage RUN` short for `motip lineage show RUN`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            args = ["show", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    no_args_is_help=True,
    cls=_ShowByDefault,
    help="Show and verify the chain of weights behind a run. `motip lineage RUN --storage DIR` is short for "
    "`motip lineage show RUN --storage DIR`.",
)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="MLflow id of a stage's or a curriculum's run.")]
StorageOption = Annotated[str, typer.Option(help="Storage of the runs (MLFLOW_TRACKING_URI takes precedence).")]


@app.command("show")
def show(
    run: RunArgument,
    storage: StorageOption = "~/motip",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also print the names of the videos.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the chain as JSON.")] = False,
) -> None:
    """Print the chain of steps that led to a run, oldest first, from base weights to the run.

    Example: motip lineage show 4f6c0d2a9b7e4e0f8a51c1d0e2b3a495
    """
    from dataclasses import asdict

    from motip.cli.console import as_json, table
    from motip.cli.lineage_text import details, environments, overview

    steps = open_lineage(storage).chain(run)
    if json:
        as_json([asdict(step) for step in steps])
        return
    table(*overview(steps), title=f"Lineage of {run}")
    for line in [*details(steps, verbose=verbose), *environments(steps)]:
        print(line)
    last = steps[-1].checkpoint
    print(f"{len(steps)} steps; the last wrote {last.path if last else 'no checkpoint yet'}")


@app.command("verify")
def verify(
    run: RunArgument,
    storage: StorageOption = "~/motip",
    data: Annotated[bool, typer.Option(help="Also verify the shards, which reads all data.")] = True,
) -> None:
    """Recompute the digests of all weights and data of the chain; fail if a file has changed or is missing.

    Example: motip lineage verify 4f6c0d2a9b7e4e0f8a51c1d0e2b3a495
    """
    from motip.cli.console import table

    checks = open_lineage(storage).verify(run, data=data)
    rows = [
        [check.stage, check.what, check.state, check.expected[:12], check.found[:12] or "-", check.path]
        for check in checks
    ]
    table(["stage", "what", "state", "recorded", "now", "file"], rows, title=f"Files of {run}")
    wrong = [check for check in checks if check.state != "same"]
    if wrong:
        raise MotipError(
            f"{len(wrong)} of {len(checks)} files and data sets differ from what the runs recorded",
            where=wrong[0].path,
            found=wrong[0].state + (f", sha256 {wrong[0].found}" if wrong[0].found else ""),
            expected=f"sha256 {wrong[0].expected}",
            fix="restore the file from a backup, or run the stage again",
        )
    counts = {what: sum(check.what == what for check in checks) for what in ("weights", "data")}
    print(f"{counts['weights']} weights files and {counts['data']} data sets, all as recorded")


def open_lineage(storage: str) -> Lineage:
    """The lineage of existing runs; raises MotipError without a database, so that reading does not create one."""
    from motip.lineage import Lineage
    from motip.lineage.store import local_storage

    database = local_storage(storage) / "mlflow" / "mlflow.db"
    if not os.environ.get("MLFLOW_TRACKING_URI") and not database.is_file():
        raise MotipError(
            "no runs were recorded here",
            where="--storage",
            found=storage,
            expected=f"{database}, or MLFLOW_TRACKING_URI in the environment",
            fix="name the storage that the curriculum ran with",
        )
    return Lineage(storage=storage)
