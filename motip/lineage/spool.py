"""What could not be delivered yet, in files: one queue per run, kept in order, shared by all processes."""

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
    """Queues under ``folder``: ``<run id>.jsonl``, files that entries refer to under ``files/``.

    What the server refuses for good (its run was deleted, a value it does not take) goes to
    ``<run id>.rejected.jsonl`` so that it neither blocks the rest nor vanishes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._said = False

    def waiting(self, run_id: str) -> bool:
        """Whether something of this run has not been delivered."""
        try:
            return self._queue(run_id).stat().st_size > 0
        except (FileNotFoundError, NotADirectoryError):  # nothing was kept, or another process has delivered it
            return False

    def runs(self) -> list[str]:
        """Runs that have something waiting."""
        names = [path.stem for path in sorted(self.folder.glob("*.jsonl")) if not path.stem.endswith(".rejected")]
        return [name for name in names if self.waiting(name)]

    def count(self, run_id: str) -> int:
        """Entries waiting for this run."""
        with self._locked(run_id):
            return len(self._read(run_id))

    def rejected(self, run_id: str) -> Path:
        """Where that goes which never can be delivered, each entry with its reason."""
        return self._queue(f"{run_id}.rejected")

    def append(self, run_id: str, entry: Entry) -> None:
        """Queue an entry; it is on disk when this returns."""
        with self._locked(run_id), self._queue(run_id).open("ab+") as stream:
            self._cut_loose_end(stream)
            stream.write(json.dumps(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def keep_file(self, path: Path) -> str:
        """A copy of ``path``, under the same name, that lasts until the entry with it is delivered.

        Returns:
            Its place relative to the folder, so that the folder can be moved.
        """
        kept = Path("files") / uuid.uuid4().hex / path.name
        (self.folder / kept).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, self.folder / kept)
        return str(kept)

    def file_of(self, entry: Entry) -> Path | None:
        """Where the kept file of an entry is now; None where it is missing."""
        told = Path(entry["path"])
        # Spools once held absolute paths, which end alike.
        places = [self.folder / "files" / told.parent.name / told.name, *([told] if told.is_absolute() else [])]
        return next((place for place in places if place.is_file()), None)

    def replay(self, run_id: str, deliver: Callable[[list[Entry]], int], refused: Callable[[Entry], str]) -> int:
        """Deliver what waits, oldest first, while no other process touches the queue.

        Args:
            deliver: takes the entries, delivers from the front, returns how many it delivered; fewer than one means
                that the front cannot be delivered now.
            refused: for the front entry that was not delivered: the reason if it never can be, else "".

        Returns:
            The number of entries still waiting.
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
            # Not before the queue is written: an entry that is found there again finds its file too.
            for entry in delivered:
                self._drop_file(entry)
            return len(entries)

    def withdraw(self, run_id: str, kind: str) -> None:
        """Take back what waits of one kind; all else keeps its order."""
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
        """Keep other processes out of a queue. Some mounts have no locks (logged): what they hold is used without."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{run_id}.lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError as error:
                if not self._said:
                    self._said = True
                    _log.warning("going on without a lock: %s cannot be locked (%s)", self.folder, error.strerror)
            yield

    def _read(self, run_id: str) -> list[Entry]:
        queue = self._queue(run_id)
        if not queue.exists():
            return []
        with queue.open("rb+") as stream:
            self._cut_loose_end(stream)
            stream.seek(0)
            return [_entry(line) for line in stream.read().splitlines()]

    @staticmethod
    def _cut_loose_end(stream: BinaryIO) -> None:
        """Remove a last line without its end: a process was killed while writing it, and nobody relies on it."""
        if stream.seek(0, os.SEEK_END) == 0:
            return
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) != b"\n":  # only then is a queue, which may be long, read
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
    """What a line of a queue says; a damaged one becomes an entry that is refused, and so set aside."""
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    known = isinstance(entry, dict) and "kind" in entry
    return entry if known else {"kind": "damaged", "line": line.decode(errors="replace")}
