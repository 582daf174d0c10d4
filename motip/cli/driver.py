"""First steps of a driver: checks of folders and worker numbers, and the Ray cluster while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from motip.cluster import Cluster, connect, disconnect
from motip.errors import MotipError
from motip.storage.paths import location


@contextmanager
def joined_cluster(join: bool = True) -> Iterator[Cluster | None]:
    """The cluster at RAY_ADDRESS, else a Ray started on this machine, until the block ends; None without ``join``."""
    cluster = connect() if join else None
    try:
        yield cluster
    finally:
        if cluster is not None:
            disconnect()


def workers_range(text: str | int) -> tuple[int | None, int]:
    """Parse `4` to (None, 4), always four workers, and `2:4` to (2, 4), as many as the cluster has resources for.

    Raises:
        MotipError: neither a number nor a range.
    """
    least, colon, most = str(text).rpartition(":")
    numbers = [least, most] if colon else [most]
    if not all(number.isdecimal() for number in numbers) or (colon and not 1 <= int(least) <= int(most)):
        raise MotipError(
            "invalid number of workers",
            where="--workers",
            found=text,
            expected="a number such as 4, or MIN:MAX such as 2:4 with MIN at least 1",
            fix="0 trains in this process, without Ray",
        )
    return (int(least) if colon else None), int(most)


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
