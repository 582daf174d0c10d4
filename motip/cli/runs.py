"""Runs named on the command line: by their folder, or by their MLflow id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from motip.errors import MotipError
from motip.lineage import Lineage
from motip.lineage.store import local_storage
from motip.stage_folder import STAGE, StageFolder, scores_file, stage_folders
from motip.storage.paths import Location, location


def is_run_id(named: str) -> bool:
    """Whether ``named`` is an MLflow run id and no file or folder."""
    return re.fullmatch(r"[0-9a-f]{32}", named) is not None and not location(named).exists()


def open_lineage(storage: str) -> Lineage:
    """The lineage of existing runs; raises MotipError without a database, so that reading does not create one."""
    database = local_storage(storage) / "mlflow" / "mlflow.db"
    if not os.environ.get("MLFLOW_TRACKING_URI") and not database.is_file():
        raise MotipError(
            "no runs were recorded here",
            where="--storage",
            found=storage,
            expected=f"{database}, or MLFLOW_TRACKING_URI in the environment",
            fix="name the storage that the curriculum ran with",
        )
    return Lineage(storage=storage)


def curriculum_folder(named: str, storage: str) -> Location:
    """A curriculum's folder from its path, or from the MLflow id of its run or of a stage's run.

    Raises:
        MotipError: no such run, or no runs in this storage.
    """
    if not is_run_id(named):
        return location(named)
    return location(storage) / "curricula" / open_lineage(storage).curriculum_of(named)


def run_folder(named: str, storage: str, split: str) -> Location:
    """The folder of an evaluation with scores of the split, or else of a stage; see :func:`stage_folder`."""
    path = location(named)
    if path.is_dir() and not StageFolder(path).exists() and (path / scores_file(split)).is_file():
        return path
    return stage_folder(named, storage)


def stage_folder(named: str, storage: str) -> Location:
    """A stage's folder from its path, from its parent folder, or from the MLflow id of its run.

    Raises:
        MotipError: there is none, or several.
    """
    # A folder: the stage's own, or one with a single stage folder in it.
    path = location(named)
    if path.is_dir():
        if StageFolder(path).exists():
            return path
        inner = sorted((each for each in path.iterdir() if StageFolder(each).exists()), key=str)
        if len(inner) == 1:
            return inner[0]
        raise MotipError(
            "this folder does not identify one run",
            where=named,
            found=", ".join(str(each) for each in inner) or f"neither {STAGE} nor scores",
            expected="a stage's folder (curricula/<name>/<stage>/<inputs>) or that of `motip evaluate` (evaluations/…)",
            fix="name one of them" if inner else None,
        )
    if not is_run_id(named):
        raise MotipError(
            "there is no such run",
            where="RUN",
            found=named,
            expected="an existing folder of a stage or an evaluation, or the MLflow id of a stage's run",
        )
    # A run id: the folder of its checkpoint, for an unfinished run the stage record with the id.
    step = open_lineage(storage).chain(named)[-1]
    base = location(storage)
    folders: list[Location] = []
    if step.checkpoint is not None:
        folders = [location(step.checkpoint.path).parent]
        if step.checkpoint.relative:
            folders.append((base / step.checkpoint.relative).parent)
    elif isinstance(base, Path):
        folders = [each.path for each in stage_folders(base / "curricula") if each.run_id() == step.run_id]
    for folder in folders:
        if StageFolder(folder).exists():
            return folder
    raise MotipError(
        "the folder of this run was not found",
        where=f"run {step.run_id} ({step.stage})",
        found=", ".join(map(str, folders)) or f"no folder under --storage with a {STAGE} of this run",
        fix="pass the folder itself, or the --storage that contains it",
    )
