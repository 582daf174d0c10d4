"""Local folders of a run on one node, none of which outlives the run's next attempt there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path


class Scratch:
    """Temporary folders below one folder that belongs to the run.

    Args:
        run: names the run; the same on every attempt.
    """

    def __init__(self, run: str) -> None:
        digest = hashlib.sha256(run.encode()).hexdigest()[:16]
        self.parent = Path(tempfile.gettempdir()) / f"motip_{os.getuid()}_{digest}"
        self._own: list[Path] = []

    def sweep(self) -> None:
        """Remove what killed workers left; to be called when no worker of the run uses any of it."""
        shutil.rmtree(self.parent, ignore_errors=True)

    def new(self, name: str, given_away: bool = False) -> Path:
        """An empty folder, which `clear` removes unless it was given away to somebody who does."""
        self.parent.mkdir(mode=0o700, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=f"{name}_", dir=self.parent))
        if not given_away:
            self._own.append(path)
        return path

    def clear(self) -> None:
        """Remove the folders made here; those of other ranks on the node stay."""
        for path in self._own:
            shutil.rmtree(path, ignore_errors=True)
        self._own.clear()
        # Another rank of the node may still have one there, or was faster.
        with contextlib.suppress(OSError):
            self.parent.rmdir()
