"""`motip lineage`: the chain of weights behind a run, and whether its files are still what they were."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.lineage import Lineage, LineageStep


class _ShowByDefault(typer.core.TyperGroup):
    """`motip lineage RUN` is `motip lineage show RUN`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            args = ["show", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    no_args_is_help=True,
    cls=_ShowByDefault,
    help="Where a run's weights came from. `motip lineage RUN` is short for `motip lineage show RUN`.",
)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="MLflow id of a stage's or a curriculum's run.")]
StorageOption = Annotated[str, typer.Option(help="Storage of the runs (MLFLOW_TRACKING_URI goes before it).")]


@app.command("show")
def show(
    run: RunArgument,
    storage: StorageOption = "~/motip",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Configuration changes and versions too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Print the chain of stages that led to a run, oldest first.

    Example: motip lineage show 4f6c0d2a9b7e4e0f8a51c1d0e2b3a495
    """
    from dataclasses import asdict

    from motip.commands.show import as_json, table

    steps = recorded(storage).walk(run)
    if json:
        as_json([asdict(step) for step in steps])
        return
    header = ["stage", "status", "data", "weights from", "checkpoint sha256", "HOTA", "changed keys", "seed", "code"]
    table(header, [_row(step) for step in steps], title=f"Lineage of {run}")
    if verbose:
        for step in steps:
            _details(step)
    last = steps[-1].checkpoint
    print(f"{len(steps)} steps; the last wrote {last.path if last else 'no checkpoint yet'}")


@app.command("verify")
def verify(run: RunArgument, storage: StorageOption = "~/motip") -> None:
    """Compute the digest of every checkpoint of the chain anew; fail if one has changed or is gone.

    Example: motip lineage verify 4f6c0d2a9b7e4e0f8a51c1d0e2b3a495
    """
    from motip.commands.show import table

    checks = recorded(storage).verify(run)
    rows = [[check.stage, check.state, check.expected[:12], check.found[:12] or "-", check.path] for check in checks]
    table(["stage", "state", "recorded", "now", "file"], rows, title=f"Files of {run}")
    wrong = [check for check in checks if check.state != "same"]
    if wrong:
        raise MotipError(
            f"{len(wrong)} of {len(checks)} checkpoints are not what the runs recorded",
            where=wrong[0].path,
            found=wrong[0].state,
            expected=f"sha256 {wrong[0].expected}",
            fix="restore the file from a backup, or run the stage again",
        )
    print(f"{len(checks)} checkpoints, all as recorded")


def recorded(storage: str) -> Lineage:
    """Raises MotipError where nothing was ever recorded: asking must not create an empty database."""
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


def _row(step: LineageStep) -> list[str]:
    hota = step.scores.get("HOTA")
    code = step.git_commit[:8] + (" with changes" if step.git_dirty == "true" else "")
    return [
        step.stage,
        f"interrupted {step.interrupted}" if step.interrupted else step.status.lower() or step.kind,
        "\n".join(_data(used) for used in step.data) or step.data_digest[:12] or "-",
        step.came_from.sha256[:12] if step.came_from else "-",
        step.checkpoint.sha256[:12] if step.checkpoint else "-",
        "-" if hota is None else f"{hota:.1f}",
        str(len(step.config_changes)) if step.config_changes else "-",
        step.seed or "-",
        code or "-",
    ]


def _data(used: Any) -> str:
    videos = used.profile.get("videos")
    return f"{used.name} {used.sha256[:12]}" + (f" ({videos} videos)" if videos else "")


def _details(step: LineageStep) -> None:
    started = datetime.fromtimestamp(step.started / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC") if step.started else "-"
    print(f"\n{step.stage}: {step.run_id or step.kind}, started {started}")
    if step.checkpoint:
        print(f"  checkpoint {step.checkpoint.path} sha256 {step.checkpoint.sha256}")
    for key, (before, after) in step.config_changes.items():
        print(f"  {key}: {before} -> {after}")
    for name, version in step.versions.items():
        print(f"  {name} {version}")
    for name, value in step.hardware.items():
        print(f"  {name} {value}")
