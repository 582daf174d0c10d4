"""Temporary directories of a run on one node, removed at the latest by the run's next attempt there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path


class TempDirs:
    """Temporary directories below one directory that belongs to the run.

    Args:
        run: identifies the run; the same for every attempt.
    """

    def __init__(self, run: str) -> None:
        digest = hashlib.sha256(run.encode()).hexdigest()[:16]
        self.parent = Path(tempfile.gettempdir()) / f"motip_{os.getuid()}_{digest}"
        self._own: list[Path] = []

    def remove_stale(self) -> None:
        """Remove what killed workers left; to be called while no worker of the run uses any of the directories."""
        shutil.rmtree(self.parent, ignore_errors=True)

    def new(self, name: str, keep: bool = False) -> Path:
        """An empty directory; `clear` removes it unless ``keep`` (the caller's consumer removes it)."""
        self.parent.mkdir(mode=0o700, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=f"{name}_", dir=self.parent))
        if not keep:
            self._own.append(path)
        return path

    def clear(self) -> None:
        """Remove the directories made by this object; those of other ranks on the node stay."""
        for path in self._own:
            shutil.rmtree(path, ignore_errors=True)
        self._own.clear()
        # Fails if another rank of the node has a directory there, or has removed it already.
        with contextlib.suppress(OSError):
            self.parent.rmdir()
