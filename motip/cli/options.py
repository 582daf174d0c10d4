"""Options and arguments that several verbs share; an option of a single verb is declared in the verb's signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from motip.errors import MotipError

# ---- data and storage ---------------------------------------------------------------------------------------------

CurriculumFile = Annotated[
    str, typer.Option("--config", help="Curriculum file: the sources with their classes, and the stages.")
]
StageFile = Annotated[str, typer.Option("--config", help="Configuration of a stage, or a curriculum file.")]
Storage = Annotated[
    str,
    typer.Option(
        "--storage",
        help="Folder or s3:// URI of shards, checkpoints, evaluations and runs (MLFLOW_TRACKING_URI takes precedence "
        "for runs).",
    ),
]
DataRoot = Annotated[str, typer.Option("--data-root", help="Folder or s3:// URI with raw datasets and base weights.")]
StageDataRoot = Annotated[
    str | None,
    typer.Option(
        "--data-root",
        help="Folder or s3:// URI with the raw datasets (default: root_path of a stage's configuration, else .).",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="[STAGE:]KEY=VALUE",
        help="Override a configuration key, with STAGE only that of one stage of a curriculum file; repeatable.",
    ),
]
Stage = Annotated[str | None, typer.Option("--stage", help="Stage of the curriculum file.")]
Split = Annotated[str, typer.Option("--split", help="Split of the videos: val or test.")]
Sources = Annotated[str | None, typer.Option("--sources", help="Sources to include, comma-separated (default: all).")]

# ---- jobs ---------------------------------------------------------------------------------------------------------

Workers = Annotated[
    str,
    typer.Option(
        "--workers",
        metavar="N|MIN:MAX",
        help="Training workers; MIN:MAX follows the resources of the cluster; 0 trains in this process.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Stop the conversion at an undecodable image or a near-duplicate of a val video."),
]
Videos = Annotated[
    int | None,
    typer.Option("--videos", help="Training videos of each dataset, for a stage's configuration (default: all)."),
]
Trials = Annotated[int | None, typer.Option("--trials", metavar="N", help="Trials of a sweep (default: sweep file).")]
WorkersPerTrial = Annotated[
    int, typer.Option("--workers-per-trial", metavar="N", help="Training workers of each trial.")
]
Device = Annotated[str, typer.Option("--device", help="Device that tracks: auto, cpu, cuda or cuda:N.")]

# ---- runs and output ----------------------------------------------------------------------------------------------

Run = Annotated[str, typer.Argument(metavar="RUN", help="MLflow id of a stage's or a curriculum's run.")]
RunOrFolder = Annotated[
    str, typer.Argument(metavar="RUN", help="Folder of a stage or an evaluation, or MLflow id of a stage's run.")
]
CurriculumRun = Annotated[
    str,
    typer.Argument(
        metavar="CURRICULUM",
        help="Folder of a curriculum (curricula/NAME in the storage), or MLflow id of its run or a stage's.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


AS_JOB = "job"
"""`Context.obj` of a verb that runs as a Ray job."""


def is_job(context: typer.Context) -> bool:
    """Whether the verb was started by a script in ray_jobs/, so that it joins a cluster by default."""
    return context.obj == AS_JOB


def names_in(text: str) -> list[str]:
    """The comma-separated names in the value of an option."""
    return [name.strip() for name in text.split(",") if name.strip()]


def check_known(
    what: str, where: str, named: str | Sequence[str], valid: Sequence[str], *, fix: str | None = None
) -> None:
    """Raise MotipError for a name, or the first of several, that is not among the valid ones.

    Args:
        where: the option that was given.
    """
    expected = "one of " if isinstance(named, str) else "some of "
    for name in [named] if isinstance(named, str) else named:
        if name not in valid:
            raise MotipError(what, where=where, found=name, expected=expected + ", ".join(valid), fix=fix)
