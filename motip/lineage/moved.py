"""A storage folder that was moved, or is mounted at two places: its database holds the places of artifacts absolute.

Whoever reads finds them without changing anything (``present``). The database itself is made to follow by what starts
runs (``follow``), and not while somebody else is writing to it.
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
from motip.lineage.driver import driver_lives, on_another_host, this_driver
from motip.lineage.tags import Tag

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


def present(place: str, before: Path, artifacts: Path) -> Path:
    """Where the artifacts recorded at ``place`` are: there, or at the same place of this storage.

    Those that are nowhere yet belong to the recorded place, if its storage is here and can be written to.

    Args:
        before: see ``moved_from``.
    """
    recorded = _path(place)
    if not recorded.is_relative_to(before) or os.path.exists(recorded):
        return recorded
    here = artifacts / recorded.relative_to(before)
    if os.path.exists(here):
        return here
    # No storage is made up where none is: on a machine without that mount it would be a folder that nobody finds.
    base = before if os.path.isdir(before) else before.parent
    return recorded if os.path.isdir(base) and os.access(base, os.W_OK | os.X_OK) else here


def resolving_client(address: str, where: Callable[[str], Path | None]) -> MlflowClient:
    """A client whose artifacts are read and written at the place that ``where`` tells for a recorded one.

    MLflow's own client remembers the places of artifacts for as long as the process lives.

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


def follow(database: Path, recorded: str, artifacts: Path, *, inputs: str = "") -> str:
    """Make the places of artifacts in a database those under ``artifacts``, where the storage was moved.

    A run whose artifacts still lie in the old place, and not in the new one, is left alone. Nothing is changed while
    a run is under way whose process lives on this machine, or is on another one, which cannot be asked: the storage
    may be mounted at the recorded place there.

    Args:
        database: SQLite file in the same folder as ``artifacts``.
        recorded, artifacts: see ``moved_from``.
        inputs: digest of what is about to start. A run of the same, and those under it, that a process of another
            host had begun are gone on with, so they do not hinder.

    Returns:
        The process because of which nothing was changed; empty where there is none.

    Raises:
        MotipError: the database cannot be changed.
    """
    before = moved_from(recorded, artifacts)
    if before is None:
        return ""
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=60, isolation_level=None)) as opened:
            # From here on nobody else begins a run.
            opened.execute("begin immediate")
            hindrance = _at_work(opened, inputs)
            if hindrance:
                return hindrance
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
    return ""


def _at_work(opened: sqlite3.Connection, inputs: str) -> str:
    """The driver of a run under way that the database must stay as it is for, or an empty string."""
    told = opened.execute("select run_uuid from tags where key = ? and value = ?", (Tag.INPUTS, inputs))
    own = {run_id for (run_id,) in told.fetchall()} if inputs else set()
    running = opened.execute(
        "select runs.run_uuid, driver.value, parent.value from runs "
        "join tags as driver on driver.run_uuid = runs.run_uuid and driver.key = ? "
        "left join tags as parent on parent.run_uuid = runs.run_uuid and parent.key = ? "
        "where runs.status = 'RUNNING' and runs.lifecycle_stage = 'active'",
        (Tag.DRIVER, Tag.PARENT_RUN),
    )
    for run_id, driver, parent in running.fetchall():
        if driver == this_driver():
            continue
        if driver_lives(driver) or (on_another_host(driver) and run_id not in own and parent not in own):
            return str(driver)
    return ""


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
