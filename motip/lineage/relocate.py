"""A storage folder that was moved or copied, or is mounted at two places: its database holds absolute places.

Whoever reads or writes artifacts finds them in its own storage, whatever the database says (``present``). The database
is made to follow by what starts runs (``follow``), for those who open it with MLflow itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motip.errors import MotipError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

logger = logging.getLogger(__name__)

_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def moved_from(recorded: str, artifacts: Path) -> Path | None:
    """Where a database says that its artifacts are, if that is not where they are now.

    Args:
        recorded: place of the experiment's artifacts as it stands in the database.
        artifacts: ``storage/mlflow/artifacts``, absolute.

    Returns:
        The recorded place; None where it is the same folder, over links and mounts too, or none of a storage.
    """
    before = _path(recorded)
    if not before.is_absolute() or before.parts[-2:] != artifacts.parts[-2:] or _same(before, artifacts):
        return None
    return before


def present(place: str, artifacts: Path) -> Path | None:
    """Where artifacts are read and written: in this storage, or at the recorded place if they lie only there.

    Args:
        place: recorded place of the artifacts of a run or a model, a path or a file URI.
        artifacts: ``storage/mlflow/artifacts``, absolute.

    Returns:
        The folder, which may not be there yet; None for a place that is in no storage's artifacts.
    """
    recorded = _path(place)
    parts, name = recorded.parts, artifacts.parts[-2:]
    # From the end: the storage itself may lie under a folder of that name.
    end = next((end for end in range(len(parts) - 1, 1, -1) if parts[end - 2 : end] == name), 0)
    if not recorded.is_absolute() or not end:
        return None
    here = artifacts.joinpath(*parts[end:])
    return recorded if os.path.exists(recorded) and not os.path.exists(here) else here


def resolving_client(address: str, where: Callable[[str], Path | None]) -> MlflowClient:
    """A client whose artifacts are read and written at the place that ``where`` tells for a recorded one.

    It asks the database each time: another process may change the places while this one lives.

    Args:
        where: None for a place that MLflow is to deal with.
    """
    from mlflow import MlflowClient
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def at(place: str) -> LocalArtifactRepository | None:
        path = where(place)
        return None if path is None else LocalArtifactRepository(path.as_uri())

    class Resolving(MlflowClient):
        def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
            files = at(self.get_run(run_id).info.artifact_uri)
            if files is None:
                super().log_artifact(run_id, local_path, artifact_path)
            else:
                files.log_artifact(local_path, artifact_path)

        def log_model_artifacts(self, model_id: str, local_dir: str, artifact_path: str | None = None) -> None:
            files = at(self.get_logged_model(model_id).artifact_location)
            if files is None:
                super().log_model_artifacts(model_id, local_dir, artifact_path)
            else:
                files.log_artifacts(local_dir, artifact_path)

        def list_artifacts(self, run_id: str, path: str | None = None) -> list[Any]:
            files = at(self.get_run(run_id).info.artifact_uri)
            return list(super().list_artifacts(run_id, path) if files is None else files.list_artifacts(path))

        def download_artifacts(self, run_id: str, path: str, dst_path: str | None = None) -> str:
            files = at(self.get_run(run_id).info.artifact_uri)
            if files is None:
                return str(super().download_artifacts(run_id, path, dst_path))
            return str(files.download_artifacts(path, dst_path))

    # The registry gets the same address, or MLflow would look for it in its global settings.
    return Resolving(tracking_uri=address, registry_uri=address)


def follow(database: Path, recorded: str, artifacts: Path) -> None:
    """Make the places of artifacts in a database those under ``artifacts``, for who opens it with MLflow itself.

    A run whose artifacts lie in the old place, and not in the new one, is left alone. Runs under way, here or on a
    machine where the storage is mounted elsewhere, are not disturbed: their processes use ``present``.

    Args:
        database: SQLite file in the same folder as ``artifacts``.
        recorded, artifacts: see ``moved_from``.

    Raises:
        MotipError: the database cannot be changed.
    """
    before = moved_from(recorded, artifacts)
    if before is None:
        return
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=60, isolation_level=None)) as opened:
            opened.execute("begin immediate")
            changed = sum(_rewrite(opened, table, column, before, artifacts) for table, column in _COLUMNS)
            opened.execute("commit")
    except sqlite3.Error as error:
        raise MotipError(
            f"the storage was moved, and its database cannot be brought up to date: {error}",
            where=database,
            found=f"artifacts recorded at {before}",
            expected=f"artifacts at {artifacts}",
            fix="make the database writable, or move the storage back",
        ) from error
    if changed:
        logger.warning(
            "the storage was moved from %s to %s: %d places of artifacts in its database are the new ones now",
            *(before.parents[1], artifacts.parents[1], changed),
        )


def _rewrite(opened: sqlite3.Connection, table: str, column: str, before: Path, artifacts: Path) -> int:
    changed = 0
    rows = opened.execute(f"select distinct {column} from {table} where {column} like '%/mlflow/artifacts%'")
    for (text,) in rows.fetchall():
        old = _path(text)
        if not old.is_relative_to(before):
            continue
        new = artifacts / old.relative_to(before)
        # os.path.exists takes a folder of somebody else, which must not be looked into, for one that is not there.
        if table != "experiments" and os.path.exists(old) and not os.path.exists(new):
            continue
        changed += opened.execute(f"update {table} set {column} = ? where {column} = ?", (new.as_uri(), text)).rowcount
    return changed


def _same(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError, RuntimeError):
        # The folders around them, because artifacts are made with the first one.
        return one.resolve() == other.resolve() or os.path.samefile(one.parent, other.parent)
    return False


def _path(place: str) -> Path:
    """The path of a place that is one, or a file URI."""
    return Path(urllib.parse.unquote(place.removeprefix("file://")) if place.startswith("file://") else place)
