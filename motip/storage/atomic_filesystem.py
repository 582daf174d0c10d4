"""A pyarrow file system for others to write through: passing failures are waited out, files appear whole.

Ray Train keeps its own list of checkpoints beside them. Given this file system, that list survives an object store
that stumbles and a disk that fills up: it is the old one or the new one, never half of it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from motip.storage.atomic import atomic_write
from motip.storage.paths import s3
from motip.storage.retries import retried

Answer = TypeVar("Answer")


class WholeFiles(pafs.FileSystemHandler):
    """The local disk or S3, as plain values: it travels to other processes, which connect by their own environment.

    Args:
        remote: S3 instead of the local disk.
    """

    def __init__(self, remote: bool) -> None:
        self._remote = remote

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WholeFiles) and other._remote == self._remote

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((type(self), self._remote))

    def _inner(self, path: str) -> pafs.FileSystem:
        return s3(path.partition("/")[0]) if self._remote else pafs.LocalFileSystem()

    def _ask(self, verb: str, path: str, action: Callable[[pafs.FileSystem], Answer]) -> Answer:
        return retried(lambda: action(self._inner(path)), f"{verb} {'s3://' if self._remote else ''}{path}")

    def get_type_name(self) -> str:
        return "s3" if self._remote else "local"

    def normalize_path(self, path: str) -> str:
        return str(self._inner(path).normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return self._ask("looking at", ", ".join(paths), lambda files: files.get_file_info(paths))

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return self._ask("listing", selector.base_dir, lambda files: files.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self._ask("making", path, lambda files: files.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._ask("removing", path, lambda files: files.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._ask("emptying", path, lambda files: files.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise io.UnsupportedOperation("the root of a storage is never emptied")

    def delete_file(self, path: str) -> None:
        self._ask("removing", path, lambda files: files.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        self._ask("moving", src, lambda files: files.move(src, dest))

    def copy_file(self, src: str, dest: str) -> None:
        self._ask("copying", src, lambda files: files.copy_file(src, dest))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self._ask("opening", path, lambda files: files.open_input_stream(path))

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self._ask("opening", path, lambda files: files.open_input_file(path))

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise io.UnsupportedOperation("files of a storage are written whole, never added to")

    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        return pa.PythonFile(_WholeOnClose(lambda data: self._write(path, data)), mode="w")

    def _write(self, path: str, data: bytes) -> None:
        if not self._remote:
            with atomic_write(Path(path)) as temporary:
                temporary.write_bytes(data)
            return

        def put(files: pafs.FileSystem) -> None:
            with files.open_output_stream(path) as stream:
                stream.write(data)

        self._ask("writing", path, put)


class _WholeOnClose(io.BytesIO):
    """Gathers what is written, for small files, and hands it over when it is closed.

    Not where an exception that was raised since it was opened closes it: that write broke off, and half a file would
    take the place of a whole one.
    """

    def __init__(self, hand_over: Callable[[bytes], None]) -> None:
        super().__init__()
        self._hand_over = hand_over
        self._handled = sys.exception()

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            # pyarrow closes in the same way at the end of a `with` block and on the way out of it: it has no other word
            # for giving up. What is being handled tells the two apart.
            if sys.exception() is self._handled:
                self._hand_over(data)


def whole_files(remote: bool) -> pafs.PyFileSystem:
    """The file system as pyarrow and Ray take it; paths are plain, without ``s3://``."""
    return pafs.PyFileSystem(WholeFiles(remote))
