"""`motip report page` and `motip report open`: write or open the report page of a curriculum."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.storage.paths import Location

CurriculumArgument = Annotated[
    str,
    typer.Argument(
        metavar="CURRICULUM",
        help="Folder of a curriculum (curricula/NAME in the storage), or MLflow id of its run or a stage's.",
    ),
]
StorageOption = Annotated[
    str,
    typer.Option(help="Storage of the runs, if CURRICULUM is an MLflow id (MLFLOW_TRACKING_URI takes precedence)."),
]


def page(
    curriculum: CurriculumArgument,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for the page (default: the curriculum's folder).")
    ] = None,
    storage: StorageOption = "~/motip",
    stored_only: Annotated[
        bool, typer.Option("--stored-only", help="Use stored tracks only; videos without them are not tracked.")
    ] = False,
    sheets: Annotated[
        bool, typer.Option("--sheets", help="First draw the failure sheets of stages that have none.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, for tracking videos without stored tracks.")] = "auto",
) -> None:
    """Write the report page of a curriculum: report.html, and its videos in report_files/.

    Sections: stages with scores and changes, the stage-by-domain heat map, the chain of weights, dashboards, one
    sequence per domain as tracked by each stage, failure sheets. Training writes the page at its end; this command is
    for a stopped run, a run of an older version, or new sheets by `motip report errors`.

    Example: motip report page outputs/demo/curricula/demo
    """
    from motip.cli.console import console, note
    from motip.report.page import write_page
    from motip.report.stage_tracks import TrackingOptions
    from motip.storage.paths import location
    from motip.tracking.loading import resolve_device

    tracking = TrackingOptions(track=not stored_only, device=str(resolve_device(device)))
    target = None if out is None else location(out)
    folder = resolve_curriculum_folder(curriculum, storage)
    if sheets:
        draw_sheets(folder, device, stored_only=stored_only)
    written = write_page(folder, target, tracking=tracking, log=note)
    for text in written.missing:
        note(f"not on the page: {text}")
    console().print(f"report page: {written.path}", highlight=False, soft_wrap=True)


def open_page(curriculum: CurriculumArgument, storage: StorageOption = "~/motip") -> None:
    """Print the path of a curriculum's report page, and open it in a browser if there is a display.

    Example: motip report open outputs/demo/curricula/demo
    """
    from motip.cli.console import console
    from motip.report.page import PAGE, open_in_browser

    path = resolve_curriculum_folder(curriculum, storage) / PAGE
    if not path.is_file():
        raise MotipError(
            "this curriculum has no report page", where=path, fix=f"write it: motip report page {path.parent}"
        )
    open_in_browser(path)
    console().print(f"report page: {path}", highlight=False, soft_wrap=True)


def draw_sheets(folder: Location, device: str = "auto", *, stored_only: bool = True) -> None:
    """Draw the contact sheet of every finished stage without failure pictures; a failure prints a note.

    Args:
        folder: of a curriculum.
        stored_only: use only videos with stored tracks; otherwise the others are tracked first, in this process.
    """
    from motip.cli.console import note
    from motip.cli.report_run import load_stored_run, load_tracked_run, output_folder
    from motip.report.failures import write_failures
    from motip.report.page_facts import sheets_in
    from motip.report.stage_list import read_stage_list

    for stage, own in read_stage_list(folder).folders.items():
        if own is None or sheets_in(own):
            continue
        try:
            if stored_only:
                tracked = load_stored_run(own)
            else:
                tracked = load_tracked_run(str(own), "val", None, None, str(folder.parent.parent), device)
            target = output_folder(None, tracked.folder, "failures_val")
            write_failures(tracked.videos(), target, tracked.title, clips=0)
        except MotipError as error:
            note(f"{stage}: no failure sheet: {error.what}")


def resolve_curriculum_folder(named: str, storage: str) -> Location:
    """A curriculum's folder from its path, or from the MLflow id of its run or of a stage's run.

    Raises:
        MotipError: no such run, or no runs in this storage.
    """
    from motip.cli.lineage import open_lineage
    from motip.storage.paths import location

    path = location(named)
    if not re.fullmatch(r"[0-9a-f]{32}", named) or path.exists():
        return path
    return location(storage) / "curricula" / open_lineage(storage).curriculum_of(named)
