"""Spool of undelivered entries: one ordered queue file per run, shared by all processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_log = logging.getLogger(__name__)

Entry = dict[str, Any]


class Spool:
    """Queues ``<run id>.jsonl`` under ``folder``; files that entries refer to are under ``files/``.

    Entries that the server refuses permanently (deleted run, invalid value) move to ``<run id>.rejected.jsonl``: they
    neither block the others nor get lost.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._warned = False

    def has_entries(self, run_id: str) -> bool:
        """Whether a run has undelivered entries."""
        try:
            return self._queue(run_id).stat().st_size > 0
        except (FileNotFoundError, NotADirectoryError):  # nothing queued, or delivered by another process
            return False

    def runs(self) -> list[str]:
        """Ids of runs with undelivered entries."""
        names = [path.stem for path in sorted(self.folder.glob("*.jsonl")) if not path.stem.endswith(".rejected")]
        return [name for name in names if self.has_entries(name)]

    def count(self, run_id: str) -> int:
        """Number of undelivered entries of a run."""
        with self._locked(run_id):
            return len(self._read(run_id))

    def rejected(self, run_id: str) -> Path:
        """File of a run's refused entries, each with the reason."""
        return self._queue(f"{run_id}.rejected")

    def append(self, run_id: str, entry: Entry) -> None:
        """Queue an entry; it is synced to disk on return."""
        with self._locked(run_id), self._queue(run_id).open("ab+") as stream:
            self._truncate_partial_line(stream)
            stream.write(json.dumps(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def keep_file(self, path: Path) -> str:
        """Copy a file into the spool, where it stays until its entry is delivered.

        Returns:
            Path of the copy relative to the spool folder, so that the folder can be moved.
        """
        kept = Path("files") / uuid.uuid4().hex / path.name
        (self.folder / kept).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, self.folder / kept)
        return str(kept)

    def file_of(self, entry: Entry) -> Path | None:
        """Current path of an entry's file; None if it is missing."""
        recorded = Path(entry["path"])
        # Older spools recorded absolute paths with the same last two parts.
        candidates = [self.folder / "files" / recorded.parent.name / recorded.name]
        candidates += [recorded] if recorded.is_absolute() else []
        return next((path for path in candidates if path.is_file()), None)

    def replay(self, run_id: str, deliver: Callable[[list[Entry]], int], refused: Callable[[Entry], str]) -> int:
        """Deliver queued entries, oldest first, with the queue locked against other processes.

        Args:
            deliver: delivers entries from the front and returns how many; 0 if the first cannot be delivered now.
            refused: for a first entry that was not delivered: the reason if it is refused permanently, else "".

        Returns:
            The number of entries still queued.
        """
        delivered: list[Entry] = []
        with self._locked(run_id):
            entries = self._read(run_id)
            while entries:
                done = deliver(entries)
                if done:
                    delivered += entries[:done]
                    entries = entries[done:]
                    continue
                reason = refused(entries[0])
                if not reason:
                    break
                with self.rejected(run_id).open("a") as stream:
                    stream.write(json.dumps({**entries[0], "reason": reason}) + "\n")
                entries = entries[1:]
            self._write(run_id, entries)
            # After the queue is written: an entry that is still queued after a crash needs its file.
            for entry in delivered:
                self._drop_file(entry)
            return len(entries)

    def withdraw(self, run_id: str, kind: str) -> None:
        """Remove queued entries of one kind; the others keep their order."""
        with self._locked(run_id):
            entries = self._read(run_id)
            kept = [entry for entry in entries if entry["kind"] != kind]
            if len(kept) < len(entries):
                self._write(run_id, kept)

    def _drop_file(self, entry: Entry) -> None:
        path = self.file_of(entry) if entry.get("kept") else None
        if path is not None and path.is_relative_to(self.folder):
            shutil.rmtree(path.parent, ignore_errors=True)

    def _queue(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    @contextlib.contextmanager
    def _locked(self, run_id: str) -> Iterator[None]:
        """Lock a queue against other processes. On mounts without locks it is used unlocked, with a warning."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{run_id}.lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    _log.warning("continuing without a lock: %s cannot be locked (%s)", self.folder, error.strerror)
            yield

    def _read(self, run_id: str) -> list[Entry]:
        queue = self._queue(run_id)
        if not queue.exists():
            return []
        with queue.open("rb+") as stream:
            self._truncate_partial_line(stream)
            stream.seek(0)
            return [_entry(line) for line in stream.read().splitlines()]

    @staticmethod
    def _truncate_partial_line(stream: BinaryIO) -> None:
        """Remove an incomplete last line, left by a process that was killed while writing it."""
        if stream.seek(0, os.SEEK_END) == 0:
            return
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) != b"\n":  # the queue, which may be long, is read only then
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)
            stream.seek(0, os.SEEK_END)

    def _write(self, run_id: str, entries: list[Entry]) -> None:
        queue = self._queue(run_id)
        temporary = queue.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        os.replace(temporary, queue)
        if not entries:
            queue.unlink()


def _entry(line: bytes) -> Entry:
    """The entry in a line of a queue; a damaged line becomes an entry of kind "damaged", which is set aside."""
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    known = isinstance(entry, dict) and "kind" in entry
    return entry if known else {"kind": "damaged", "line": line.decode(errors="replace")}
