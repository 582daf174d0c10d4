"""`motip lineage`: the chain of weights behind a run, and verification of its files by digest."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from motip.cli import options
from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.lineage import DataUsed, LineageStep


_HEADER = ["step", "what", "data", "weights from", "weights", "HOTA by domain", "seed", "code"]
KINDS = {
    "initialised": "initialised from the seed",
    "export": "exported",
    "checkpoint": "trained, unknown run",
    "weights": "given, no record",
}


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


@app.command("show")
def show(
    run: options.Run,
    storage: options.Storage = "~/motip",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also print the names of the videos.")] = False,
    json: options.Json = False,
) -> None:
    """Print the chain of steps that led to a run, oldest first, from base weights to the run.

    Example: motip lineage show 4f6c0d2a9b7e4e0f8a51c1d0e2b3a495
    """
    from dataclasses import asdict

    from motip.cli.console import as_json, table
    from motip.cli.runs import open_lineage

    steps = open_lineage(storage).chain(run)
    if json:
        as_json([asdict(step) for step in steps])
        return
    table(_HEADER, [_row(step) for step in steps], title=f"Lineage of {run}")
    for line in [*_details(steps, verbose), *_environments(steps)]:
        print(line)
    last = steps[-1].checkpoint
    print(f"{len(steps)} steps; the last wrote {last.path if last else 'no checkpoint yet'}")


@app.command("relocate")
def relocate(
    old: Annotated[Path, typer.Argument(help="Where the storage was.")],
    new: Annotated[Path, typer.Argument(help="Where it is now.")],
) -> None:
    """Make the artifacts of a moved storage visible in MLflow's own pages: link its old place to the new one.

    MLflow records absolute paths. The other commands find the artifacts without this.

    Example: motip lineage relocate /data/motip /mnt/big/motip
    """
    from motip.lineage.relocate import link_previous

    link = link_previous(old.expanduser().absolute(), new.expanduser().resolve())
    print(f"MLflow finds the artifacts of {new} through {link}")


@app.command("verify")
def verify(
    run: options.Run,
    storage: options.Storage = "~/motip",
    data: Annotated[bool, typer.Option(help="Also verify the shards, which reads all data.")] = True,
) -> None:
    """Recompute the digests of all weights and data of the chain; fail if a file has changed or is missing.

    Example: motip lineage verify 4f6c0d2a9b7e4e0f8a51c1d0e2b3a495
    """
    from motip.cli.console import table
    from motip.cli.runs import open_lineage

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


def _details(steps: Sequence[LineageStep], verbose: bool) -> list[str]:
    """Lines on each step: its run, its files with full digests, and the changes from the step before.

    Args:
        verbose: also the names of the videos.
    """
    lines = []
    for step in steps:
        where = f"run {step.run_id}" if step.run_id else KINDS.get(step.kind, step.kind)
        started = f", started {_time(step.started)}" if step.run_id else ""
        source = f", from the record {step.record}" if step.record else ""
        lines += ["", f"{step.stage}: {where}{started}{source}"]
        if step.came_from:
            lines.append(f"  from     {step.came_from.path} sha256 {step.came_from.sha256}")
        if step.checkpoint:
            lines.append(f"  weights  {step.checkpoint.path} sha256 {step.checkpoint.sha256}")
        for used in step.data:
            lines.append(f"  data     {used.context}: {used.name}, {_amount(used)}, sha256 {used.sha256}")
            if verbose and used.source.get("videos"):
                lines.append(f"           {', '.join(map(str, used.source['videos']))}")
        lines += [
            f"  changed  {key}: {_value(old)} -> {_value(new)}" for key, (old, new) in step.config_changes.items()
        ]
        if step.note:
            lines.append(f"  note     {step.note}")
    return lines


def _environments(steps: Sequence[LineageStep]) -> list[str]:
    """Code, packages and hardware of the steps; steps with the same environment are grouped."""
    shared: dict[str, list[str]] = {}
    for step in steps:
        if step.python or step.versions or step.hardware:
            shared.setdefault(_environment(step), []).append(step.stage)
    lines = [""]
    for text, names in shared.items():
        scope = "all steps" if len(shared) == 1 and len(names) == len(steps) else ", ".join(names)
        lines.append(f"run with ({scope}):\n{text}")
    return lines


def _environment(step: LineageStep) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in step.versions.items())
    facts = dict(step.hardware)
    gpus = facts.pop("gpus", [])
    machine = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    code = step.git_commit or "not in a checkout"
    dirty = {"true": " with uncommitted changes", "false": ", clean"}.get(step.git_dirty, "")
    return (
        f"  git      {code}{dirty if step.git_commit else ''}\n  packages python {step.python}, {packages}\n"
        f"  machine  {machine}, {'GPUs ' + '; '.join(gpus) if gpus else 'no GPU'}"
    )


def _row(step: LineageStep) -> list[str]:
    what = KINDS.get(step.kind, step.status.lower() or step.kind)
    data = [f"{used.name} {used.sha256[:12]} ({_amount(used)})" for used in step.data]
    code = step.git_commit[:8] + (" dirty" if step.git_dirty == "true" else "")
    return [
        step.stage,
        f"interrupted {step.interrupted}" if step.interrupted and step.status != "FINISHED" else what,
        "\n".join(data) or step.data_digest[:12] or "-",
        step.came_from.sha256[:12] if step.came_from else "-",
        step.checkpoint.sha256[:12] if step.checkpoint else "-",
        _hota(step),
        step.seed or "-",
        code or "-",
    ]


def _hota(step: LineageStep) -> str:
    """Best HOTA on the stage's own val videos, then HOTA of each domain that the stage was scored in."""
    own = [f"own val {step.scores['HOTA']:.1f}"] if "HOTA" in step.scores else []
    return "\n".join([*own, *(f"{domain} {value:.1f}" for domain, value in step.domains.items())]) or "-"


def _amount(used: DataUsed) -> str:
    videos = used.profile.get("videos")
    return f"{videos} videos" if videos else "videos not counted"


def _time(milliseconds: int) -> str:
    if not milliseconds:
        return "at an unknown time"
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _value(value: Any) -> str:
    return "not set" if value is None else str(value)
