"""Artifact locations of a storage that was moved, copied, or is mounted at two paths; its database has absolute paths.

Reading and writing artifacts resolves recorded locations to the storage in use (``artifact_path``). Starting a run also
rewrites the locations in the database (``rewrite_locations``), for access by MLflow itself.
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


def previous_location(recorded: str, artifacts: Path) -> Path | None:
    """The artifact folder recorded in a database, if it differs from the current one.

    Args:
        recorded: artifact location of the experiment as recorded in the database.
        artifacts: ``storage/mlflow/artifacts``, absolute.

    Returns:
        The recorded folder; None if it is the same folder (also through links and mounts) or not that of a storage.
    """
    before = _path(recorded)
    if not before.is_absolute() or before.parts[-2:] != artifacts.parts[-2:] or _same(before, artifacts):
        return None
    return before


def artifact_path(location: str, artifacts: Path) -> Path | None:
    """Current folder of artifacts: in this storage, or the recorded one if they exist only there.

    Args:
        location: recorded artifact location of a run or a model, a path or a file URI.
        artifacts: ``storage/mlflow/artifacts``, absolute.

    Returns:
        The folder, which may not exist yet; None for a location outside any storage's artifacts.
    """
    recorded = _path(location)
    parts, name = recorded.parts, artifacts.parts[-2:]
    # Searched from the end: the storage itself may be inside a folder of that name.
    end = next((end for end in range(len(parts) - 1, 1, -1) if parts[end - 2 : end] == name), 0)
    if not recorded.is_absolute() or not end:
        return None
    current = artifacts.joinpath(*parts[end:])
    return recorded if os.path.exists(recorded) and not os.path.exists(current) else current


def relocating_client(address: str, resolve: Callable[[str], Path | None]) -> MlflowClient:
    """A client that reads and writes artifacts in the folder that ``resolve`` returns for a recorded location.

    The recorded location is read each time, since another process may rewrite it.

    Args:
        resolve: recorded location -> folder; None leaves the location to MLflow.
    """
    from mlflow import MlflowClient
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def repository(location: str) -> LocalArtifactRepository | None:
        path = resolve(location)
        return None if path is None else LocalArtifactRepository(path.as_uri())

    class RelocatingClient(MlflowClient):
        def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
            files = repository(self.get_run(run_id).info.artifact_uri)
            if files is None:
                super().log_artifact(run_id, local_path, artifact_path)
            else:
                files.log_artifact(local_path, artifact_path)

        def log_model_artifacts(self, model_id: str, local_dir: str, artifact_path: str | None = None) -> None:
            files = repository(self.get_logged_model(model_id).artifact_location)
            if files is None:
                super().log_model_artifacts(model_id, local_dir, artifact_path)
            else:
                files.log_artifacts(local_dir, artifact_path)

        def list_artifacts(self, run_id: str, path: str | None = None) -> list[Any]:
            files = repository(self.get_run(run_id).info.artifact_uri)
            return list(super().list_artifacts(run_id, path) if files is None else files.list_artifacts(path))

        def download_artifacts(self, run_id: str, path: str, dst_path: str | None = None) -> str:
            files = repository(self.get_run(run_id).info.artifact_uri)
            if files is None:
                return str(super().download_artifacts(run_id, path, dst_path))
            return str(files.download_artifacts(path, dst_path))

    # Without a registry address MLflow would use its global setting.
    return RelocatingClient(tracking_uri=address, registry_uri=address)


def rewrite_locations(database: Path, recorded: str, artifacts: Path) -> None:
    """Rewrite the artifact locations in a database to ``artifacts``, for access by MLflow itself.

    A run whose artifacts exist only at the old location is left unchanged. Active runs, also on machines with another
    mount point, are not affected: their processes use ``artifact_path``.

    Args:
        database: SQLite file in the same folder as ``artifacts``.
        recorded, artifacts: see ``previous_location``.

    Raises:
        MotipError: the database cannot be changed.
    """
    before = previous_location(recorded, artifacts)
    if before is None:
        return
    try:
        # One transaction: a concurrent start waits for it.
        with contextlib.closing(sqlite3.connect(database, timeout=60, isolation_level=None)) as opened:
            opened.execute("begin immediate")
            changed = sum(_rewrite(opened, table, column, before, artifacts) for table, column in _COLUMNS)
            opened.execute("commit")
    except sqlite3.Error as error:
        raise MotipError(
            f"the storage was moved and its database cannot be updated: {error}",
            where=database,
            found=f"artifacts recorded at {before}",
            expected=f"artifacts at {artifacts}",
            fix="make the database writable, or move the storage back",
        ) from error
    if changed:
        logger.warning(
            "the storage was moved from %s to %s: %d artifact locations in its database were updated",
            before.parents[1],
            artifacts.parents[1],
            changed,
        )


def _rewrite(opened: sqlite3.Connection, table: str, column: str, before: Path, artifacts: Path) -> int:
    changed = 0
    rows = opened.execute(f"select distinct {column} from {table} where {column} like '%/mlflow/artifacts%'")
    for (text,) in rows.fetchall():
        old = _path(text)
        if not old.is_relative_to(before):
            continue
        new = artifacts / old.relative_to(before)
        # os.path.exists is False for folders of other users that cannot be read; those are rewritten.
        if table != "experiments" and os.path.exists(old) and not os.path.exists(new):
            continue
        changed += opened.execute(f"update {table} set {column} = ? where {column} = ?", (new.as_uri(), text)).rowcount
    return changed


def _same(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError, RuntimeError):
        # Compare the parent folders: the artifact folder is created with the first artifact.
        return one.resolve() == other.resolve() or os.path.samefile(one.parent, other.parent)
    return False


def _path(location: str) -> Path:
    """The path of a location that is a path or a file URI."""
    return Path(urllib.parse.unquote(location.removeprefix("file://")) if location.startswith("file://") else location)
