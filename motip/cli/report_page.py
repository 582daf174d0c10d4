"""`motip report page` and `open`: the report page of a curriculum, made again or shown."""

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
    str, typer.Option(help="Storage of the runs, where an MLflow id is given (MLFLOW_TRACKING_URI goes before it).")
]


def page(
    curriculum: CurriculumArgument,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Where to write it (default: the folder).")] = None,
    storage: StorageOption = "~/motip",
    stored_only: Annotated[
        bool, typer.Option("--stored-only", help="Videos from stored tracks alone; nothing is tracked for them.")
    ] = False,
    sheets: Annotated[
        bool, typer.Option("--sheets", help="Draw the failure sheets of stages that have none first.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, where videos are still to be tracked.")] = "auto",
) -> None:
    """Write the report page of a curriculum: report.html and the videos beside it, in report_files/.

    Stages with scores and changes, the stage by domain heat map, the chain of weights, dashboards, the same sequence by
    each stage's tracker, failure sheets. A training makes it at its end; this is for one that was stopped, for one of
    an older version, or after `motip report errors` has drawn new sheets.

    Example: motip report page outputs/demo/curricula/demo
    """
    from motip.cli.console import console, note
    from motip.report.page import write_page
    from motip.report.stage_tracks import Means
    from motip.storage.paths import location
    from motip.track.loading import pick_device

    means = Means(track=not stored_only, device=str(pick_device(device)))
    target = None if out is None else location(out)
    folder = curriculum_folder(curriculum, storage)
    if sheets:
        draw_sheets(folder, device, stored_only=stored_only)
    made = write_page(folder, target, means=means, say=note)
    for text in made.missing:
        note(f"not on the page: {text}")
    console().print(f"report page: {made.path}", highlight=False, soft_wrap=True)


def open_page(curriculum: CurriculumArgument, storage: StorageOption = "~/motip") -> None:
    """Say where a curriculum's report page is, and show it in a browser where there is a display.

    Example: motip report open outputs/demo/curricula/demo
    """
    from motip.cli.console import console
    from motip.report.page import PAGE, open_in_browser

    path = curriculum_folder(curriculum, storage) / PAGE
    if not path.is_file():
        raise MotipError(
            "this curriculum has no report page", where=path, fix=f"make it: motip report page {path.parent}"
        )
    open_in_browser(path)
    console().print(f"report page: {path}", highlight=False, soft_wrap=True)


def draw_sheets(folder: Location, device: str = "auto", *, stored_only: bool = True) -> None:
    """The contact sheet of every finished stage without failure pictures; one that cannot be drawn is said.

    Args:
        folder: of a curriculum.
        stored_only: of the videos alone whose tracks are stored; else those without are tracked first, in this process.
    """
    from motip.cli.console import note
    from motip.cli.report_run import judged, judged_as_stored, place_for
    from motip.report.failures import write_failures
    from motip.report.page_facts import sheets_in
    from motip.report.stage_list import read_stage_list

    for stage, place in read_stage_list(folder).folders.items():
        if place is None or sheets_in(place):
            continue
        try:
            if stored_only:
                subject = judged_as_stored(place)
            else:
                subject = judged(str(place), "val", None, None, str(folder.parent.parent), device)
            write_failures(subject.videos(), place_for(None, subject.folder, "failures_val"), subject.title, clips=0)
        except MotipError as error:
            note(f"{stage}: no failure sheet: {error.what}")


def curriculum_folder(named: str, storage: str) -> Location:
    """A curriculum's folder, given itself or by a run.

    Raises:
        MotipError: no such run, or nothing was recorded in this storage.
    """
    from motip.cli.lineage import recorded
    from motip.storage.paths import location

    place = location(named)
    if not re.fullmatch(r"[0-9a-f]{32}", named) or place.exists():
        return place
    return location(storage) / "curricula" / recorded(storage).curriculum_of(named)
