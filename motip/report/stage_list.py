"""``stages.json`` of a curriculum's folder: which stages there are, in order, and where each one lies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motip.errors import MotipError
from motip.storage.paths import Location, files_under, location, read_json, size_and_time, write_json

NAME = "stages.json"


@dataclass(frozen=True)
class StageList:
    """The stages of a curriculum.

    Attributes:
        name: of the curriculum.
        folders: stage -> its folder; None where it is not trained yet.
        run_id: of the curriculum in MLflow, empty where it is not known.
    """

    name: str
    folders: Mapping[str, Location | None]
    run_id: str = ""


def write_stage_list(folder: Location, stages: StageList) -> None:
    """Keep the list in the curriculum's folder. Places under the storage are kept relative, so that it can be moved."""
    storage = f"{folder.parent.parent}/"
    places = [
        {"stage": name, "folder": None if place is None else str(place).removeprefix(storage)}
        for name, place in stages.folders.items()
    ]
    write_json(folder / NAME, {"name": stages.name, "run_id": stages.run_id, "stages": places})


def read_stage_list(folder: Location) -> StageList:
    """The list of a curriculum's folder; without one, the newest finished stage there and those it descends from.

    Raises:
        MotipError: the folder is none of a curriculum, or the list is damaged.
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
        folders = {str(each["stage"]): _place(each["folder"], storage) for each in stored["stages"]}
        return StageList(str(stored["name"]), folders, str(stored["run_id"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise MotipError(
            f"this is no list of stages: {error!r}",
            where=folder / NAME,
            fix="run the curriculum again: it is written anew, and finished stages are not trained again",
        ) from error


def _place(stored: str | None, storage: Location) -> Location | None:
    if stored is None:
        return None
    place = location(stored)
    return storage / stored if isinstance(place, Path) and not place.is_absolute() else place


def _by_digest(folder: Location) -> StageList:
    """Back from the newest finished stage, each time to the one whose checkpoint the stage started from."""
    finished = []
    for path in files_under(folder):
        if path.name == "stage.json" and (stored := read_json(path)).get("status") == "finished":
            finished.append((size_and_time(path)[1], path.parent, stored))
    if not finished:
        raise MotipError(
            "no finished stage is in this folder",
            where=folder,
            expected=f"{NAME}, or STAGE/INPUTS/stage.json of a finished stage",
            fix="name the folder of a curriculum (curricula/NAME in the storage), or wait for its first stage",
        )
    finished.sort(key=lambda each: each[0])
    made: dict[str, tuple[Location, Mapping[str, Any]]] = {each["sha256"]: (at, each) for _, at, each in finished}
    chain: list[tuple[str, Location]] = []
    sha256: Any = finished[-1][2]["sha256"]
    while sha256 in made:
        place, record = made.pop(sha256)
        chain.append((record["stage"], place))
        sha256 = record.get("parent_sha256")
    return StageList(folder.name, dict(reversed(chain)))


def listed(name: str, order: Iterable[str], folders: Mapping[str, Location], run_id: str) -> StageList:
    """All stages of a curriculum in order, those without a folder as not trained yet."""
    return StageList(name, {stage: folders.get(stage) for stage in order}, run_id)
