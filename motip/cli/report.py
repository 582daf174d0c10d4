"""`motip report`: dashboard, failure pictures and report page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motip.cli import options
from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.storage.paths import Location

app = typer.Typer(no_args_is_help=True, help="Dashboard, failure pictures and report page of a run.")


@app.command("errors")
def errors(
    run: options.RunOrFolder,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder for the pictures (default: failures_SPLIT in RUN's folder)."),
    ] = None,
    clips: Annotated[
        int, typer.Option(min=0, help="Number of videos of the worst segments; 0 = only the contact sheet.")
    ] = 6,
    split: options.Split = "val",
    sources: options.Sources = None,
    config: Annotated[
        str | None, typer.Option(help="Curriculum file with the class maps, for runs of older versions.")
    ] = None,
    storage: options.Storage = "~/motip",
    device: options.Device = "auto",
) -> None:
    """Show where a tracker fails: labels against predictions, the worst sequences and segments first.

    Green: tracked; dashed blue: missed; orange: identity switch (ids before and after); red: false positive; grey:
    ignored. Writes contact_sheet.png, errors.json and the worst segments as H.264 videos. Stored tracks in
    evaluations/ are used; videos without them are tracked first.

    Example: motip report errors ~/motip/curricula/motip-aerial/Vis-Specialist --clips 8
    """
    from motip.cli.console import line, note, table
    from motip.cli.runs import run_folder
    from motip.report.failures import write_failures
    from motip.report.tracked_run import RunOptions, load_tracked_run, prepared_folder

    named = None if sources is None else options.names_in(sources)
    shown = RunOptions(split, named, config, device, log=line)
    tracked = load_tracked_run(run_folder(run, storage, split), shown)
    folder = prepared_folder(tracked.folder / f"failures_{split}" if out is None else Path(out).expanduser())
    for text in tracked.notes:
        note(text)
    found = write_failures(tracked.videos(), folder, tracked.title, clips)
    table(*found.table(), title=f"{tracked.title}: the worst sequences first")
    if not found.sequences:
        note("no sequence has an error: there are no pictures")
    line(f"{len(found.files)} files are in {folder}: {', '.join(found.files)}")


@app.command("dashboard")
def dashboard(
    run: options.RunOrFolder,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="The PNG to write (default: dashboard.png in RUN's folder).")
    ] = None,
    storage: options.Storage = "~/motip",
) -> None:
    """Redraw the dashboard of a stage: losses, scores, gradients, learning rates, throughput, memory, skipped clips.

    Training writes it after every epoch; this command writes a copy elsewhere, or one for a run of an older version.

    Example: motip report dashboard ~/motip/curricula/motip-aerial/Vis-Specialist --out dashboard.png
    """
    from motip.cli.console import line
    from motip.cli.runs import stage_folder
    from motip.report.dashboard import draw_dashboard

    folder = stage_folder(run, storage)
    target = folder / "dashboard.png" if out is None else _picture(out)
    history = draw_dashboard(folder, target)
    line(f"{history.stage}, {len(history.epochs)} epochs: {target}")


@app.command("page")
def page(
    curriculum: options.CurriculumRun,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for the page (default: the curriculum's folder).")
    ] = None,
    storage: options.Storage = "~/motip",
    stored_only: Annotated[
        bool, typer.Option("--stored-only", help="Use stored tracks only; videos without them are not tracked.")
    ] = False,
    sheets: Annotated[
        bool, typer.Option("--sheets", help="First draw the failure sheets of stages that have none.")
    ] = False,
    device: options.Device = "auto",
) -> None:
    """Write the report page of a curriculum: report.html, and its videos in report_files/.

    Sections: stages with scores and changes, the stage-by-domain heat map, the chain of weights, dashboards, one
    sequence per domain as tracked by each stage, failure sheets. Training writes the page at its end; this command is
    for a stopped run, a run of an older version, or new sheets by `motip report errors`.

    Example: motip report page outputs/demo/curricula/demo
    """
    from motip.cli.console import line, note
    from motip.cli.runs import curriculum_folder
    from motip.report.page import write_page
    from motip.report.stage_tracks import TrackingOptions
    from motip.report.tracked_run import RunOptions, draw_missing_sheets
    from motip.storage.paths import location
    from motip.tracking.loading import resolve_device

    tracking = TrackingOptions(track=not stored_only, device=str(resolve_device(device)))
    target = None if out is None else location(out)
    folder = curriculum_folder(curriculum, storage)
    if sheets:
        draw_missing_sheets(folder, RunOptions(device=device, log=line), stored_only=stored_only)
    written = write_page(folder, target, tracking=tracking, log=note)
    for text in written.missing:
        note(f"not on the page: {text}")
    line(f"report page: {written.path}")


@app.command("open")
def open_page(curriculum: options.CurriculumRun, storage: options.Storage = "~/motip") -> None:
    """Print the path of a curriculum's report page, and open it in a browser if there is a display.

    Example: motip report open outputs/demo/curricula/demo
    """
    from motip.cli.console import line
    from motip.cli.runs import curriculum_folder
    from motip.report.page import PAGE, open_in_browser

    path = curriculum_folder(curriculum, storage) / PAGE
    if not path.is_file():
        raise MotipError(
            "this curriculum has no report page", where=path, fix=f"write it: motip report page {path.parent}"
        )
    open_in_browser(path)
    line(f"report page: {path}")


def _picture(out: str) -> Location:
    """The path of a picture; its folder is created."""
    from motip.report.tracked_run import prepared_folder

    target = Path(out).expanduser()
    if target.suffix.lower() != ".png" or target.is_dir():
        raise MotipError("the dashboard is a PNG", where="--out", found=out, expected="a path that ends in .png")
    prepared_folder(target.parent)
    return target
