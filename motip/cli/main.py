"""The `motip` command. The scripts in ray_jobs/ start its verbs convert, curriculum, train, tune and evaluate."""

from __future__ import annotations

import sys
from typing import Any

import typer

from motip.cli import compare, evaluate, job, lineage, options, report, results, shards, track, training, weights
from motip.errors import exit_on_error
from motip.version import __version__

_CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    # The published MOTIP spells flags with underscores, most tools with hyphens: both work for every verb.
    "token_normalize_func": lambda token: token.replace("-", "_"),
}

app = typer.Typer(
    name="motip",
    help="MOTIP Curriculum: convert data, train the stages of a curriculum, tune, evaluate and compare checkpoints, "
    "track videos, inspect weights and shards, show the lineage of a checkpoint.\n\nOn a cluster: "
    "ray job submit --working-dir . -- python ray_jobs/curriculum.py ...",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
)
app.command("track")(track.track)
app.command("convert")(shards.convert)
app.command("curriculum")(training.curriculum)
app.add_typer(training.train_app, name="train")
app.command("tune")(training.tune)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
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


def run_job(verb: str) -> None:
    """Entry point of ray_jobs/VERB.py: the verb with the arguments of the script, on a cluster by default."""
    group: Any = typer.main.get_command(app)
    with exit_on_error():
        group.commands[verb].main(sys.argv[1:], f"python ray_jobs/{verb}.py", obj=options.AS_JOB, **_CONTEXT)
