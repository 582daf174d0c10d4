"""Local and S3 paths behind one interface: read, write, list, lock.

Local paths are plain :class:`pathlib.Path`. :class:`RemotePath` has the same methods for S3, so code that only lists,
reads and joins works with both. Endpoint, region and credentials of S3 come from the environment
(``AWS_ENDPOINT_URL``, ``AWS_REGION``, ``AWS_ACCESS_KEY_ID``, …), never from a file of this project. With neither
endpoint nor region in the environment, the region is resolved from the bucket name.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import posixpath
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from motip.errors import MotipError
from motip.storage.atomic import atomic_write, sha256_file
from motip.storage.retries import with_retries

_log = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20
CUSTOM_ENDPOINT_REGION = "us-east-1"
"""Region sent to a custom endpoint when the environment sets none."""
STREAM_TRIES = 6
"""Attempts of the S3 client per request of an open stream; the layer above cannot repeat those."""

Result = TypeVar("Result")


@functools.cache
def s3(bucket: str, tries: int = 3) -> pafs.S3FileSystem:
    """S3 client for the endpoint, region and credentials in the environment.

    Args:
        bucket: its region is used when the environment sets neither endpoint nor region.
        tries: attempts of the S3 client per request, not logged; 3 take about a second.

    Raises:
        MotipError: the environment sets no region and the bucket's region cannot be resolved.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    scheme, _, host = endpoint.rpartition("://")
    return pafs.S3FileSystem(
        endpoint_override=host or None,
        scheme=scheme or "https",
        region=_configured_region() or (CUSTOM_ENDPOINT_REGION if endpoint else _bucket_region(bucket)),
        # Per attempt, so that a wrong endpoint ends as an error once these and the `with_retries` attempts are used up.
        connect_timeout=10,
        request_timeout=60,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=tries),
    )


def _configured_region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""


@functools.cache
def _bucket_region(bucket: str) -> str:
    """AWS region of a bucket; resolving it needs no read permission."""
    try:
        return str(pafs.resolve_s3_region(bucket))
    except (OSError, pa.ArrowException) as error:
        raise MotipError(
            f"cannot resolve the region of the bucket {bucket}: {error}",
            where=f"s3://{bucket}",
            expected="an existing bucket and a network route to S3",
            fix="check the name, or set AWS_REGION to the bucket's region in the environment of this process (for "
            "another store than AWS, AWS_ENDPOINT_URL)",
        ) from error


@contextlib.contextmanager
def _s3_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise MotipError(
            "no such object in S3", where=uri, fix="check bucket and key, and that the job's role may read them"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise MotipError(
            f"S3 request failed: {error}",
            where=uri,
            expected="a reachable endpoint, a bucket that exists and credentials that may use it",
            fix="check AWS_ENDPOINT_URL, AWS_REGION and the credentials in the environment of this process",
        ) from error


def _request(uri: str, verb: str, action: Callable[[], Result]) -> Result:
    """Run ``action``; transient failures are logged and retried, others are raised as MotipError."""
    with _s3_errors(uri):
        return with_retries(action, f"{verb} {uri}")


class FileStatus(NamedTuple):
    """What :meth:`RemotePath.stat` returns of :class:`os.stat_result`."""

    st_size: int
    st_mtime: float

    @classmethod
    def of(cls, info: pafs.FileInfo) -> FileStatus:
        return cls(int(info.size or 0), info.mtime.timestamp() if info.mtime else 0.0)


@dataclass(frozen=True, order=True)
class RemotePath:
    """An ``s3://bucket/key`` address with the methods of :class:`pathlib.Path` that this package uses."""

    uri: str

    @property
    def key(self) -> str:
        return self.uri.removeprefix("s3://").rstrip("/")

    @property
    def name(self) -> str:
        return posixpath.basename(self.key)

    def _store(self, tries: int = 3) -> pafs.S3FileSystem:
        return s3(self.key.partition("/")[0], tries)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def parent(self) -> RemotePath:
        return RemotePath("s3://" + posixpath.dirname(self.key))

    def __truediv__(self, name: str | os.PathLike[str]) -> RemotePath:
        return RemotePath("s3://" + posixpath.join(self.key, os.fspath(name)))

    def __str__(self) -> str:
        return "s3://" + self.key

    def _info(self) -> pafs.FileInfo:
        return _request(self.uri, "inspecting", lambda: self._store().get_file_info(self.key))

    def exists(self) -> bool:
        return self._info().type != pafs.FileType.NotFound

    def is_file(self) -> bool:
        return self._info().type == pafs.FileType.File

    def is_dir(self) -> bool:
        return self._info().type == pafs.FileType.Directory

    def stat(self) -> FileStatus:
        return FileStatus.of(self._info())

    def is_absolute(self) -> bool:
        return True

    def resolve(self) -> RemotePath:
        return self

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """No-op: an object store has no folders."""

    def _listing(self, recursive: bool = False) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(self.key, recursive=recursive, allow_not_found=recursive)
        return _request(self.uri, "listing", lambda: self._store().get_file_info(selector))

    def iterdir(self) -> Iterator[RemotePath]:
        return iter([RemotePath("s3://" + info.path) for info in self._listing()])

    def files(self, recursive: bool = False) -> dict[RemotePath, FileStatus]:
        """The files directly under this prefix, or all below it (empty if there is none), from one listing."""
        found = self._listing(recursive)
        return {RemotePath("s3://" + info.path): FileStatus.of(info) for info in found if info.is_file}

    def read_bytes(self) -> bytes:
        def read() -> bytes:
            with self._store().open_input_file(self.key) as stream:
                return bytes(stream.read())

        return _request(self.uri, "reading", read)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes | pa.Buffer) -> None:
        # S3 publishes an object when its stream closes, so this is atomic without a temporary name. One call writes
        # everything: an exception between two calls would close the stream and publish half an object.
        def write() -> None:
            with self._store().open_output_stream(self.key) as stream:
                stream.write(data)

        _request(self.uri, "writing", write)

    def open_input(self) -> pa.NativeFile:
        return _request(self.uri, "opening", lambda: self._store(STREAM_TRIES).open_input_file(self.key))

    def chunks(self) -> Iterator[bytes]:
        """Content in chunks of at most CHUNK_BYTES; a failed chunk is retried by itself."""
        with self.open_input() as stream:
            for begin in range(0, stream.size(), CHUNK_BYTES):
                yield _request(self.uri, "reading", functools.partial(stream.read_at, CHUNK_BYTES, begin))

    def upload(self, source: Path) -> None:
        """Copy a complete local file here, atomically."""
        if source.stat().st_size == 0:
            self.write_bytes(b"")
            return
        with pa.memory_map(str(source)) as mapped:
            self.write_bytes(mapped.read_buffer())

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file; a folder left empty stays, as on a disk."""
        try:
            _request(self.uri, "removing", lambda: self._store().delete_file(self.key))
        except MotipError as error:
            # Also raised when a first attempt removed it and the response was lost.
            if not (missing_ok and isinstance(error.__cause__, FileNotFoundError)):
                raise


Location = Path | RemotePath


def location(address: str | os.PathLike[str] | RemotePath) -> Location:
    """A local path (``~`` expanded, ``file://`` accepted) or an S3 address.

    Raises:
        MotipError: the address has a scheme that is neither ``file`` nor ``s3``.
    """
    if isinstance(address, RemotePath):
        return address
    text = os.fspath(address)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text).expanduser()
    if scheme == "file":
        return Path(rest)
    if scheme == "s3" and rest.strip("/"):
        return RemotePath("s3://" + rest.strip("/"))
    raise MotipError(
        "unsupported storage address",
        where=text,
        expected="a local folder, file:///folder or s3://bucket/prefix",
        fix="mount other storage as a folder, or copy it to S3",
    )


def absolute(address: str | os.PathLike[str] | RemotePath) -> Location:
    """:func:`location`, with a local path resolved against the working directory (workers have another one)."""
    return location(address).resolve()


def create_folder(folder: Location) -> None:
    """Create a folder and its parents; no-op on S3.

    Raises:
        MotipError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MotipError(
            f"cannot create the folder: {error.strerror}",
            where=folder,
            expected="a folder this user can write to",
            fix="choose another --storage",
        ) from error


def write_bytes(path: Location, data: bytes) -> None:
    """Write ``data`` atomically: readers see the old file or the complete new one."""
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Location, value: Any) -> None:
    """Write ``value`` as JSON with sorted keys, atomically."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Location) -> Any:
    """Parse a JSON file; raises MotipError if it is absent or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MotipError("no such file", where=path, fix="run the conversion first, or check --storage") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise MotipError(
            f"not a JSON file: {error}", where=path, fix="delete it and run the conversion again"
        ) from error


@contextlib.contextmanager
def exclusive_lock(lock: Location, what: str) -> Iterator[None]:
    """Hold an exclusive ``flock`` on the file ``lock``; other processes log once and wait.

    Object stores have no locks and some network mounts do not support them (logged): the caller must then re-read
    what it is about to replace.

    Args:
        what: name of the lock holder, for the log line of a waiting process.
    """
    if isinstance(lock, RemotePath):
        yield
        return
    with contextlib.ExitStack() as opened:
        try:
            stream = opened.enter_context(lock.open("a"))
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.warning(f"waiting for {what} ({lock} is locked)")
                fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            _log.warning(f"continuing without a lock: {lock} cannot be locked ({error.strerror})")
        yield


@contextlib.contextmanager
def atomic_output(path: Location) -> Iterator[Path]:
    """Yield a local path to write to; on success its content replaces ``path`` atomically, on error it is discarded."""
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="motip-") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            path.upload(temporary)
    else:
        with atomic_write(path) as temporary:
            yield temporary


def open_parquet(path: Location) -> pq.ParquetFile:
    """Open a Parquet file for partial reads; only the footer is read here.

    Raises:
        MotipError: absent, truncated or not a Parquet file.
    """
    try:
        if isinstance(path, RemotePath):
            return pq.ParquetFile(path.open_input(), pre_buffer=True)
        # Not memory-mapped: every page read would stay in the resident set, up to the size of the dataset.
        return pq.ParquetFile(path, memory_map=False, pre_buffer=False)
    except FileNotFoundError as error:
        raise MotipError(
            "the shard is missing", where=path, fix="run the conversion again: it adds what is missing"
        ) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise MotipError(
            f"not a readable Parquet file: {error}", where=path, fix="delete it and run the conversion again"
        ) from error


def size_and_time(path: Location) -> tuple[int, float]:
    """Bytes and modification time (seconds since 1970)."""
    status = path.stat()
    return status.st_size, status.st_mtime


def sizes_and_times(folder: Location) -> dict[str, tuple[int, float]]:
    """Bytes and modification time of the files directly in ``folder`` by name (one listing, also on S3)."""
    if isinstance(folder, RemotePath):
        return {path.name: status for path, status in folder.files().items()}
    with os.scandir(folder) as entries:
        return {entry.name: (entry.stat().st_size, entry.stat().st_mtime) for entry in entries if entry.is_file()}


def sha256(path: Location) -> str:
    """Hex sha256 of a file's bytes."""
    if not isinstance(path, RemotePath):
        return sha256_file(path)
    total = hashlib.sha256()
    for chunk in path.chunks():
        total.update(chunk)
    return total.hexdigest()


def remove_stale_files(folder: Location, older_than_s: float = 3600.0) -> int:
    """Remove temporary files that killed processes left under ``folder``; returns their number.

    Younger files may belong to a process that is still writing. S3 has none: its writes are atomic.
    """
    if isinstance(folder, RemotePath) or not folder.is_dir():
        return 0
    stale = [path for path in folder.rglob(".*.tmp.*") if time.time() - path.stat().st_mtime > older_than_s]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def download(path: Location, target: Path) -> Path:
    """Copy a file to a local ``target``, atomically, and return ``target``."""
    with atomic_write(target) as temporary:
        if isinstance(path, RemotePath):
            with temporary.open("wb") as output:
                output.writelines(path.chunks())
        else:
            shutil.copyfile(path, temporary)
    return target


def upload(source: Path, target: Location) -> None:
    """Copy a local file into the storage, atomically."""
    if isinstance(target, RemotePath):
        target.upload(source)
        return
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())


def recorded_file(recorded: str, folder: Location) -> Location:
    """A file that a record in `folder` names by its absolute path; in a moved storage it lies beside the record."""
    path = location(recorded)
    beside = folder / path.name
    return beside if beside.is_file() else path


def files_under(folder: Location) -> list[Location]:
    """All files below ``folder`` (one listing on S3), unordered; empty if there is no such folder."""
    if isinstance(folder, RemotePath):
        return list(folder.files(recursive=True))
    return [path for path in folder.rglob("*") if path.is_file()]


def local_copy(path: Location) -> Path:
    """A local path as it is; for S3 a copy in the user's cache, downloaded once per content."""
    if isinstance(path, Path):
        return path
    target = Path("~/.cache/motip").expanduser() / sha256(path)[:16] / path.name
    return target if target.is_file() else download(path, target)
