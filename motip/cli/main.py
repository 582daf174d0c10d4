"""The `motip` command: verbs that run on one machine. Cluster jobs are in ray_jobs/."""

from __future__ import annotations

import typer

from motip.cli import compare, evaluate, job, lineage, report, results, shards, track, train, weights
from motip.errors import exit_on_error
from motip.version import __version__

app = typer.Typer(
    name="motip",
    help="MOTIP Curriculum: track videos, evaluate and compare checkpoints, inspect weights and shards, show the "
    "lineage of a checkpoint.\n\nTraining is a Ray job: python ray_jobs/curriculum.py --help",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # The published MOTIP spells flags with underscores, most tools with hyphens: both work for every verb.
        "token_normalize_func": lambda token: token.replace("-", "_"),
    },
)
app.command("track")(track.track)
app.command("convert")(shards.convert)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.add_typer(train.app, name="train")
app.add_typer(job.app, name="job")
app.add_typer(weights.app, name="weights")
app.add_typer(shards.app, name="shards")
app.add_typer(results.app, name="results")
app.add_typer(lineage.app, name="lineage")
app.add_typer(report.app, name="report")


def _show_version(requested: bool) -> None:
    if requested:
        print(f"motip {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    return


def main() -> None:
    """Entry point of the console script."""
    with exit_on_error():
        app()
