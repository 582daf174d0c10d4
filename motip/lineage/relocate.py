"""Artifact locations of a storage that was moved, copied, or is mounted at two paths; its database has absolute paths.

Reading and writing artifacts resolves recorded locations to the storage in use (``artifact_path``). MLflow's own pages
need the recorded paths; ``motip lineage relocate`` makes them valid again (``link_previous``).
"""

from __future__ import annotations

import contextlib
import os
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motip.errors import MotipError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository


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

    Args:
        resolve: recorded location -> folder; None leaves the location to MLflow.
    """
    from mlflow import MlflowClient
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def local(location: str) -> LocalArtifactRepository | None:
        path = resolve(location)
        return None if path is None else LocalArtifactRepository(path.as_uri())

    class RelocatingClient(MlflowClient):
        def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
            if files := local(self.get_run(run_id).info.artifact_uri):
                return files.log_artifact(local_path, artifact_path)
            return super().log_artifact(run_id, local_path, artifact_path)

        def log_model_artifacts(self, model_id: str, local_dir: str, artifact_path: str | None = None) -> None:
            if files := local(self.get_logged_model(model_id).artifact_location):
                return files.log_artifacts(local_dir, artifact_path)
            return super().log_model_artifacts(model_id, local_dir, artifact_path)

        def list_artifacts(self, run_id: str, path: str | None = None) -> list[Any]:
            if files := local(self.get_run(run_id).info.artifact_uri):
                return files.list_artifacts(path)
            return super().list_artifacts(run_id, path)

        def download_artifacts(self, run_id: str, path: str, dst_path: str | None = None) -> str:
            if files := local(self.get_run(run_id).info.artifact_uri):
                return files.download_artifacts(path, dst_path)
            return super().download_artifacts(run_id, path, dst_path)

    # Without a registry address MLflow would use its global setting.
    return RelocatingClient(tracking_uri=address, registry_uri=address)


def link_previous(old: Path, new: Path) -> Path:
    """Make the artifact paths in the database of a moved storage valid again, by a link at its old place.

    Args:
        old: where the storage was; `new`: where it is.

    Returns:
        The link.

    Raises:
        MotipError: `new` is no storage with a database, something else is at `old`, or the link cannot be made.
    """
    if not (new / "mlflow" / "mlflow.db").is_file():
        raise MotipError("no storage with an MLflow database", where=new, expected="a folder with mlflow/mlflow.db")
    if os.path.exists(old) and os.path.samefile(old, new):
        return old
    if old.is_symlink() and not old.exists():
        old.unlink()  # of an earlier move
    try:
        old.parent.mkdir(parents=True, exist_ok=True)
        old.symlink_to(new.resolve(), target_is_directory=True)
    except OSError as error:
        raise MotipError(
            f"cannot link the old place of the storage to the new one: {error.strerror or error}",
            where=old,
            expected="a free place in a folder that this user may write to",
            fix="move what is there, or run the command as its owner; a copy needs no link as long as the original is "
            "there",
        ) from error
    return old


def _same(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError, RuntimeError):
        # Compare the parent folders: the artifact folder is created with the first artifact.
        return one.resolve() == other.resolve() or os.path.samefile(one.parent, other.parent)
    return False


def _path(location: str) -> Path:
    """The path of a location that is a path or a file URI."""
    return Path(urllib.parse.unquote(location.removeprefix("file://")) if location.startswith("file://") else location)
