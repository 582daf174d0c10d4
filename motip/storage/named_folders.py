"""Folders that the user names: the data root and the storage, checked before anything is started."""

from __future__ import annotations

from pathlib import Path

from motip.errors import MotipError
from motip.storage.paths import location


def checked_data_root(named: str) -> str:
    """The absolute data root; raises MotipError if a local one is not a folder."""
    path = location(named)
    if not isinstance(path, Path):
        return named
    _check_absolute_in_a_job("--data-root", path)
    if not path.is_dir():
        raise MotipError(
            "the data root does not exist",
            where="--data-root",
            found=named,
            expected="a folder with the raw datasets (see sources: in the curriculum file)",
            fix="create it or name another folder",
        )
    return str(path.resolve())


def checked_storage(named: str) -> str:
    """The absolute storage, created if needed and checked to be writable.

    Raises:
        MotipError: the folder cannot be created or written, or is relative in a submitted job.
    """
    path = location(named)
    if not isinstance(path, Path):
        return named
    _check_absolute_in_a_job("--storage", path)
    path = path.resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MotipError(
            f"the storage cannot be written: {error.strerror}",
            where="--storage",
            found=path,
            expected="a folder this user can write to",
            fix="name another folder",
        ) from error
    return str(path)


def _check_absolute_in_a_job(flag: str, path: Path) -> None:
    """Raise MotipError for a relative path in a submitted job: Ray deletes the job's copy of the working directory."""
    if not path.is_absolute() and "working_dir_files" in Path.cwd().parts:
        raise MotipError(
            "a submitted job needs absolute paths: it runs in a temporary copy of the folder",
            where=flag,
            found=path,
            expected="an absolute path, the same on every node, or an s3:// URI",
            fix=f"give {flag} an absolute path",
        )
