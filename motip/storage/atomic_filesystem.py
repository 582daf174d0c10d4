"""A pyarrow file system with atomic writes and retries, for Ray Train.

Ray Train stores its own index of checkpoints. Through this file system the index survives transient object-store
errors and a full disk: readers see the old or the new index, never a truncated one.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from motip.storage.paths import RemotePath, s3, write_bytes
from motip.storage.retries import with_retries

Result = TypeVar("Result")


class AtomicFilesystem(pafs.FileSystemHandler):
    """The local disk or S3; picklable, each process connects with the settings of its own environment.

    Args:
        remote: S3 instead of the local disk.
    """

    def __init__(self, remote: bool) -> None:
        self._remote = remote

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AtomicFilesystem) and other._remote == self._remote

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((type(self), self._remote))

    def _inner(self, path: str) -> pafs.FileSystem:
        return s3(path.partition("/")[0]) if self._remote else pafs.LocalFileSystem()

    def _request(self, verb: str, path: str, action: Callable[[pafs.FileSystem], Result]) -> Result:
        return with_retries(lambda: action(self._inner(path)), f"{verb} {'s3://' if self._remote else ''}{path}")

    def get_type_name(self) -> str:
        return "s3" if self._remote else "local"

    def normalize_path(self, path: str) -> str:
        return str(self._inner(path).normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return self._request("inspecting", ", ".join(paths), lambda files: files.get_file_info(paths))

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return self._request("listing", selector.base_dir, lambda files: files.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self._request("creating", path, lambda files: files.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._request("removing", path, lambda files: files.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._request("emptying", path, lambda files: files.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise io.UnsupportedOperation("the root of a storage cannot be emptied")

    def delete_file(self, path: str) -> None:
        self._request("removing", path, lambda files: files.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        self._request("moving", src, lambda files: files.move(src, dest))

    def copy_file(self, src: str, dest: str) -> None:
        self._request("copying", src, lambda files: files.copy_file(src, dest))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self._request("opening", path, lambda files: files.open_input_stream(path))

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self._request("opening", path, lambda files: files.open_input_file(path))

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise io.UnsupportedOperation("files of a storage are written atomically and cannot be appended to")

    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        return pa.PythonFile(_WriteOnClose(lambda data: self._write(path, data)), mode="w")

    def _write(self, path: str, data: bytes) -> None:
        write_bytes(RemotePath("s3://" + path) if self._remote else Path(path), data)


class _WriteOnClose(io.BytesIO):
    """Buffers a small file in memory and passes its content to ``write`` on close.

    A close caused by an exception raised since the open discards the buffer: an incomplete file would replace a
    complete one.
    """

    def __init__(self, write: Callable[[bytes], None]) -> None:
        super().__init__()
        self._write = write
        self._exception_at_open = sys.exception()

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            # pyarrow calls close() both on success and on an exception; the current exception distinguishes the two.
            if sys.exception() is self._exception_at_open:
                self._write(data)


def atomic_filesystem(remote: bool) -> pafs.PyFileSystem:
    """The file system wrapped for pyarrow and Ray; paths come without ``s3://``."""
    return pafs.PyFileSystem(AtomicFilesystem(remote))
