"""Stage list (``stages.json``) of a curriculum's folder: its stages in order and the folder of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motip.errors import MotipError
from motip.stage_folder import STAGE, stage_folders
from motip.storage.paths import Location, location, read_json, size_and_time, write_json

NAME = "stages.json"


@dataclass(frozen=True)
class StageList:
    """The stages of a curriculum.

    Attributes:
        name: of the curriculum.
        folders: stage -> its folder; None if it is not trained yet.
        run_id: of the curriculum in MLflow; empty if unknown.
    """

    name: str
    folders: Mapping[str, Location | None]
    run_id: str = ""


def write_stage_list(folder: Location, stages: StageList) -> None:
    """Write ``stages.json``. Folders under the storage are stored as relative paths, so that the storage can move."""
    storage = f"{folder.parent.parent}/"
    rows = [
        {"stage": name, "folder": None if own is None else str(own).removeprefix(storage)}
        for name, own in stages.folders.items()
    ]
    write_json(folder / NAME, {"name": stages.name, "run_id": stages.run_id, "stages": rows})


def read_stage_list(folder: Location) -> StageList:
    """Read ``stages.json``; without it, find the newest finished stage and its ancestors by digest.

    Raises:
        MotipError: not a curriculum's folder, or the list is damaged.
    """
    if not folder.is_dir():
        raise MotipError(
            "there is no such folder",
            where=folder,
            expected="the folder of a curriculum: curricula/NAME in the storage",
        )
    if not (folder / NAME).is_file():
        return _by_digest(folder)
    stored = read_json(folder / NAME)
    try:
        storage = folder.parent.parent
        folders = {str(each["stage"]): _stage_folder(each["folder"], storage) for each in stored["stages"]}
        return StageList(str(stored["name"]), folders, str(stored["run_id"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise MotipError(
            f"not a valid list of stages: {error!r}",
            where=folder / NAME,
            fix="run the curriculum again: the list is rewritten, and finished stages are not trained again",
        ) from error


def _stage_folder(stored: str | None, storage: Location) -> Location | None:
    if stored is None:
        return None
    folder = location(stored)
    return storage / stored if isinstance(folder, Path) and not folder.is_absolute() else folder


def _by_digest(folder: Location) -> StageList:
    """The newest finished stage and its ancestors: each parent is the stage whose checkpoint has the parent digest."""
    finished = [
        (size_and_time(stage.state_path)[1], stage.path, stored)
        for stage in stage_folders(folder)
        if (stored := stage.state()).get("status") == "finished"
    ]
    if not finished:
        raise MotipError(
            "no finished stage is in this folder",
            where=folder,
            expected=f"{NAME}, or STAGE/INPUTS/{STAGE} of a finished stage",
            fix="name the folder of a curriculum (curricula/NAME in the storage), or wait for its first stage",
        )
    finished.sort(key=lambda each: each[0])
    made: dict[str, tuple[Location, Mapping[str, Any]]] = {each["sha256"]: (at, each) for _, at, each in finished}
    chain: list[tuple[str, Location]] = []
    sha256: Any = finished[-1][2]["sha256"]
    while sha256 in made:
        own, record = made.pop(sha256)
        chain.append((record["stage"], own))
        sha256 = record.get("parent_sha256")
    return StageList(folder.name, dict(reversed(chain)))


def listed(name: str, order: Iterable[str], folders: Mapping[str, Location], run_id: str) -> StageList:
    """The list of all stages in order; a stage without a folder is not trained yet."""
    return StageList(name, {stage: folders.get(stage) for stage in order}, run_id)
