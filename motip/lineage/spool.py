"""What could not be delivered yet, in files: one queue per run, kept in order, shared by all processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

Entry = dict[str, Any]


class Spool:
    """Queues under ``folder``: ``<run id>.jsonl``, files that entries refer to under ``files/``.

    What the server refuses for good (its run was deleted, a value it does not take) goes to
    ``<run id>.rejected.jsonl`` so that it neither blocks the rest nor vanishes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def waiting(self, run_id: str) -> bool:
        """Whether something of this run has not been delivered."""
        queue = self._queue(run_id)
        return queue.exists() and queue.stat().st_size > 0

    def runs(self) -> list[str]:
        """Runs that have something waiting."""
        names = [path.stem for path in sorted(self.folder.glob("*.jsonl")) if not path.stem.endswith(".rejected")]
        return [name for name in names if self.waiting(name)]

    def count(self, run_id: str) -> int:
        """Entries waiting for this run."""
        with self._locked(run_id):
            return len(self._read(run_id))

    def append(self, run_id: str, entry: Entry) -> None:
        """Queue an entry; it is on disk when this returns."""
        with self._locked(run_id), self._queue(run_id).open("ab+") as stream:
            self._cut_loose_end(stream)
            stream.write(json.dumps(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def keep_file(self, path: Path) -> Path:
        """A copy of ``path`` that lasts until ``drop_file``, under the same name."""
        kept = self.folder / "files" / uuid.uuid4().hex / path.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, kept)
        return kept

    def drop_file(self, kept: Path) -> None:
        shutil.rmtree(kept.parent, ignore_errors=True)

    def replay(self, run_id: str, deliver: Callable[[list[Entry]], int], refused: Callable[[Entry], str]) -> int:
        """Deliver what waits, oldest first, while no other process touches the queue.

        Args:
            deliver: takes the entries, delivers from the front, returns how many it delivered; fewer than one means
                that the front cannot be delivered now.
            refused: for the front entry that was not delivered: the reason if it never can be, else "".

        Returns:
            The number of entries still waiting.
        """
        with self._locked(run_id):
            entries = self._read(run_id)
            while entries:
                done = deliver(entries)
                if done:
                    entries = entries[done:]
                    continue
                reason = refused(entries[0])
                if not reason:
                    break
                with self._queue(f"{run_id}.rejected").open("a") as stream:
                    stream.write(json.dumps({**entries[0], "reason": reason}) + "\n")
                entries = entries[1:]
            self._write(run_id, entries)
            return len(entries)

    def _queue(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    @contextlib.contextmanager
    def _locked(self, run_id: str) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{run_id}.lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _read(self, run_id: str) -> list[Entry]:
        queue = self._queue(run_id)
        if not queue.exists():
            return []
        with queue.open("rb+") as stream:
            self._cut_loose_end(stream)
            stream.seek(0)
            return [json.loads(line) for line in stream.read().splitlines()]

    @staticmethod
    def _cut_loose_end(stream: BinaryIO) -> None:
        """Remove a last line without its end: a process was killed while writing it, and nobody relies on it."""
        stream.seek(0)
        content = stream.read()
        if content and not content.endswith(b"\n"):
            stream.truncate(content.rfind(b"\n") + 1)
            stream.seek(0, os.SEEK_END)

    def _write(self, run_id: str, entries: list[Entry]) -> None:
        queue = self._queue(run_id)
        temporary = queue.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        os.replace(temporary, queue)
        if not entries:
            queue.unlink()
