"""`motip report`: pictures that people judge a run by."""

from __future__ import annotations

from typing import Annotated

import typer

from motip.cli import report_page

app = typer.Typer(no_args_is_help=True, help="Pictures of a run: its dashboard, and where its tracker fails.")
app.command("page")(report_page.page)
app.command("open")(report_page.open_page)

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Folder of a stage or an evaluation, or MLflow id of a stage's run.")
]
StorageOption = Annotated[
    str, typer.Option(help="Storage of the runs, where RUN is an MLflow id (MLFLOW_TRACKING_URI goes before it).")
]


@app.command("errors")
def errors(
    run: RunArgument,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for the pictures (default: failures_SPLIT in RUN's).")
    ] = None,
    clips: Annotated[int, typer.Option(min=0, help="Videos of the worst moments; 0 = only the contact sheet.")] = 6,
    split: Annotated[str, typer.Option(help="Which videos: val or test.")] = "val",
    sources: Annotated[str | None, typer.Option(help="Only these, comma-separated (default: all of RUN).")] = None,
    config: Annotated[
        str | None, typer.Option(help="Curriculum file that says which raw categories are which class, for older runs.")
    ] = None,
    storage: StorageOption = "~/motip",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, where videos are still to be tracked.")] = "auto",
) -> None:
    """Show where a model fails: ground truth against prediction, the worst sequences and moments first.

    Green is tracked, blue dashed missed, orange an identity switch (id before and after), red a false positive, grey
    ignored. Writes contact_sheet.png, errors.json and the worst moments as H.264 videos. Tracks that lie in
    evaluations/ are used; otherwise the videos are tracked first.

    Example: motip report errors ~/motip/curricula/motip-aerial/Vis-Specialist --clips 8
    """
    from motip.cli.console import console, note, table
    from motip.cli.report_run import judged, place_for
    from motip.report.failures import write_failures

    subject = judged(run, split, _names(sources), config, storage, device)
    folder = place_for(out, subject.folder, f"failures_{split}")
    for text in subject.notes:
        note(text)
    found = write_failures(subject.videos(), folder, subject.title, clips)
    header, rows = found.table()
    table(header, rows, title=f"{subject.title}: the worst sequences first")
    if not found.moments:
        note("there is not one error, so there is nothing to show")
    console().print(
        f"{len(found.files)} files are in {folder}: {', '.join(found.files)}", highlight=False, soft_wrap=True
    )


@app.command("dashboard")
def dashboard(
    run: RunArgument,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where to write the picture (default: dashboard.png in RUN's).")
    ] = None,
    storage: StorageOption = "~/motip",
) -> None:
    """Draw the dashboard of a stage again: losses, scores, gradients, rates, speed, memory, skipped clips.

    A training draws it after every epoch; this is for a copy elsewhere, or for a run of an older version.

    Example: motip report dashboard ~/motip/curricula/motip-aerial/Vis-Specialist --out dashboard.png
    """
    from motip.cli.console import console
    from motip.cli.report_run import picture_place, stage_folder_of
    from motip.report.dashboard import draw_dashboard

    folder = stage_folder_of(run, storage)
    target = picture_place(out, folder, "dashboard.png")
    history = draw_dashboard(folder, target)
    console().print(f"{history.stage}, {len(history.epochs)} epochs: {target}", highlight=False, soft_wrap=True)


def _names(named: str | None) -> list[str] | None:
    return None if named is None else [name.strip() for name in named.split(",") if name.strip()]
