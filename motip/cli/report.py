"""`motip report`: dashboard, failure pictures and report page of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from motip.cli import report_page

app = typer.Typer(no_args_is_help=True, help="Dashboard, failure pictures and report page of a run.")
app.command("page")(report_page.page)
app.command("open")(report_page.open_page)

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Folder of a stage or an evaluation, or MLflow id of a stage's run.")
]
StorageOption = Annotated[
    str, typer.Option(help="Storage of the runs, if RUN is an MLflow id (MLFLOW_TRACKING_URI takes precedence).")
]


@app.command("errors")
def errors(
    run: RunArgument,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder for the pictures (default: failures_SPLIT in RUN's folder)."),
    ] = None,
    clips: Annotated[
        int, typer.Option(min=0, help="Number of videos of the worst segments; 0 = only the contact sheet.")
    ] = 6,
    split: Annotated[str, typer.Option(help="Split of the videos: val or test.")] = "val",
    sources: Annotated[str | None, typer.Option(help="Sources to show, comma-separated (default: all of RUN).")] = None,
    config: Annotated[
        str | None, typer.Option(help="Curriculum file with the class maps, for runs of older versions.")
    ] = None,
    storage: StorageOption = "~/motip",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, for tracking videos without stored tracks.")] = "auto",
) -> None:
    """Show where a tracker fails: labels against predictions, the worst sequences and segments first.

    Green: tracked; dashed blue: missed; orange: identity switch (ids before and after); red: false positive; grey:
    ignored. Writes contact_sheet.png, errors.json and the worst segments as H.264 videos. Stored tracks in
    evaluations/ are used; videos without them are tracked first.

    Example: motip report errors ~/motip/curricula/motip-aerial/Vis-Specialist --clips 8
    """
    from motip.cli.console import console, note, table
    from motip.cli.report_run import load_tracked_run, output_folder
    from motip.report.failures import write_failures

    tracked = load_tracked_run(run, split, _names(sources), config, storage, device)
    folder = output_folder(out, tracked.folder, f"failures_{split}")
    for text in tracked.notes:
        note(text)
    found = write_failures(tracked.videos(), folder, tracked.title, clips)
    header, rows = found.table()
    table(header, rows, title=f"{tracked.title}: the worst sequences first")
    if not found.sequences:
        note("no sequence has an error: there are no pictures")
    console().print(
        f"{len(found.files)} files are in {folder}: {', '.join(found.files)}", highlight=False, soft_wrap=True
    )


@app.command("dashboard")
def dashboard(
    run: RunArgument,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="The PNG to write (default: dashboard.png in RUN's folder).")
    ] = None,
    storage: StorageOption = "~/motip",
) -> None:
    """Redraw the dashboard of a stage: losses, scores, gradients, learning rates, throughput, memory, skipped clips.

    Training writes it after every epoch; this command writes a copy elsewhere, or one for a run of an older version.

    Example: motip report dashboard ~/motip/curricula/motip-aerial/Vis-Specialist --out dashboard.png
    """
    from motip.cli.console import console
    from motip.cli.report_run import output_picture, resolve_stage_folder
    from motip.report.dashboard import draw_dashboard

    folder = resolve_stage_folder(run, storage)
    target = output_picture(out, folder, "dashboard.png")
    history = draw_dashboard(folder, target)
    console().print(f"{history.stage}, {len(history.epochs)} epochs: {target}", highlight=False, soft_wrap=True)


def _names(named: str | None) -> list[str] | None:
    return None if named is None else [name.strip() for name in named.split(",") if name.strip()]
