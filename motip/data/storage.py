"""Where shards and raw data live: a local folder or an ``s3://`` address, used through one small set of verbs.

Local places are plain :class:`pathlib.Path`. :class:`RemotePath` offers the same verbs for S3, so code that only
lists, reads and joins does not ask which of the two it has. Endpoint, region and credentials of S3 come from the
environment (``AWS_ENDPOINT_URL``, ``AWS_REGION``, ``AWS_ACCESS_KEY_ID``, …), never from a file of ours.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import posixpath
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from motip.errors import MotipError
from motip.files import atomic_write

CHUNK_BYTES = 8 << 20


@functools.cache
def _s3() -> pafs.S3FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    scheme, _, host = endpoint.rpartition("://")
    return pafs.S3FileSystem(
        endpoint_override=host or None,
        scheme=scheme or "https",
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        # A wrong endpoint should be an error within a minute, not a hang.
        connect_timeout=10,
        request_timeout=60,
    )


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
            f"S3 answered with an error: {error}",
            where=uri,
            expected="a reachable endpoint, a bucket that exists and credentials that may use it",
            fix="check AWS_ENDPOINT_URL, AWS_REGION and the credentials in the environment of this process",
        ) from error


@dataclass(frozen=True, order=True)
class RemotePath:
    """An ``s3://bucket/key`` address with the verbs of :class:`pathlib.Path` that this package uses."""

    uri: str

    @property
    def key(self) -> str:
        return self.uri.removeprefix("s3://").rstrip("/")

    @property
    def name(self) -> str:
        return posixpath.basename(self.key)

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
        with _s3_errors(self.uri):
            return _s3().get_file_info(self.key)

    def exists(self) -> bool:
        return self._info().type != pafs.FileType.NotFound

    def is_file(self) -> bool:
        return self._info().type == pafs.FileType.File

    def is_dir(self) -> bool:
        return self._info().type == pafs.FileType.Directory

    def size_and_time(self) -> tuple[int, float]:
        info = self._info()
        return int(info.size or 0), info.mtime.timestamp() if info.mtime else 0.0

    def iterdir(self) -> Iterator[RemotePath]:
        with _s3_errors(self.uri):
            infos = _s3().get_file_info(pafs.FileSelector(self.key))
        return iter([RemotePath("s3://" + info.path) for info in infos])

    def sizes_and_times(self) -> dict[str, tuple[int, float]]:
        """Size and modification time of every file directly here, in one listing."""
        with _s3_errors(self.uri):
            infos = _s3().get_file_info(pafs.FileSelector(self.key))
        return {
            info.base_name: (int(info.size), info.mtime.timestamp())
            for info in infos
            if info.type == pafs.FileType.File
        }

    def read_bytes(self) -> bytes:
        with _s3_errors(self.uri), _s3().open_input_file(self.key) as stream:
            return stream.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        # An S3 object appears whole or not at all, so this is atomic without a temporary name.
        with _s3_errors(self.uri), _s3().open_output_stream(self.key) as stream:
            stream.write(data)

    def open_input(self) -> pa.NativeFile:
        with _s3_errors(self.uri):
            return _s3().open_input_file(self.key)

    def upload(self, source: Path) -> None:
        """Copy a finished local file here."""
        with _s3_errors(self.uri), _s3().open_output_stream(self.key) as target, source.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                target.write(chunk)


Location = Path | RemotePath


def location(place: str | os.PathLike[str] | RemotePath) -> Location:
    """A local path (``~`` expanded, ``file://`` accepted) or an S3 address.

    Raises:
        MotipError: the address has a scheme that is neither ``file`` nor ``s3``.
    """
    if isinstance(place, RemotePath):
        return place
    text = os.fspath(place)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text).expanduser()
    if scheme == "file":
        return Path(rest)
    if scheme == "s3" and rest.strip("/"):
        return RemotePath("s3://" + rest.strip("/"))
    raise MotipError(
        "this address cannot be used",
        where=text,
        expected="a local folder, file:///folder or s3://bucket/prefix",
        fix="mount other storage as a folder, or copy it to S3",
    )


def require_folder(folder: Location) -> None:
    """Make a folder to write in; raises MotipError where that cannot be. S3 needs no folders."""
    if isinstance(folder, RemotePath):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MotipError(
            f"the folder cannot be made: {error.strerror}",
            where=folder,
            expected="a place this user can write to",
            fix="name another --storage",
        ) from error


def write_bytes(path: Location, data: bytes) -> None:
    """Write ``data`` so that readers see the old file or the whole new one."""
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Location, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Location) -> Any:
    """Raises MotipError where the file is absent or is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MotipError("no such file", where=path, fix="run the conversion first, or check --storage") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise MotipError(
            f"not a JSON file: {error}", where=path, fix="delete it and run the conversion again"
        ) from error


@contextlib.contextmanager
def whole_file(path: Location) -> Iterator[Path]:
    """Yield a local path to write to; on success its content appears at ``path`` in one go, on error not at all."""
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="motip-") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            path.upload(temporary)
    else:
        with atomic_write(path) as temporary:
            yield temporary


def open_parquet(path: Location) -> pq.ParquetFile:
    """Open a Parquet file for reading parts of it; only the footer is read here.

    Raises:
        MotipError: absent, or not a (whole) Parquet file.
    """
    try:
        if isinstance(path, RemotePath):
            return pq.ParquetFile(path.open_input(), pre_buffer=True)
        # Not mapped into memory: every page that was ever read would stay in the process, up to the whole data set.
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
    if isinstance(path, RemotePath):
        return path.size_and_time()
    status = path.stat()
    return status.st_size, status.st_mtime


def sizes_and_times(folder: Location) -> dict[str, tuple[int, float]]:
    """Bytes and modification time of the files directly in ``folder`` by name (one listing, also on S3)."""
    if isinstance(folder, RemotePath):
        return folder.sizes_and_times()
    with os.scandir(folder) as entries:
        return {entry.name: (entry.stat().st_size, entry.stat().st_mtime) for entry in entries if entry.is_file()}


def sha256(path: Location) -> str:
    """Hex sha256 of a file's bytes."""
    if not isinstance(path, RemotePath):
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    total = hashlib.sha256()
    with path.open_input() as stream:
        while chunk := stream.read(CHUNK_BYTES):
            total.update(chunk)
    return total.hexdigest()


def remove_leftovers(folder: Location, older_than_s: float = 3600.0) -> int:
    """Remove temporary files under ``folder`` that a killed process left; returns how many there were.

    Young ones may belong to a process that is still writing. S3 has none: objects appear whole there.
    """
    if isinstance(folder, RemotePath) or not folder.is_dir():
        return 0
    stale = [path for path in folder.rglob(".*.tmp.*") if time.time() - path.stat().st_mtime > older_than_s]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def fetch(path: Location, target: Path) -> Path:
    """Copy a file to a local ``target`` (whole or not at all) and return it."""
    with atomic_write(target) as temporary:
        if isinstance(path, RemotePath):
            with path.open_input() as stream, temporary.open("wb") as output:
                while chunk := stream.read(CHUNK_BYTES):
                    output.write(chunk)
        else:
            shutil.copyfile(path, temporary)
    return target


def local_copy(path: Location) -> Path:
    """The file itself, or a copy in the user's cache where it lies in an object store; copied once per content."""
    if isinstance(path, Path):
        return path
    target = Path("~/.cache/motip").expanduser() / sha256(path)[:16] / path.name
    return target if target.is_file() else fetch(path, target)
