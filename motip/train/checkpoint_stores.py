"""Checkpoint store of a training without Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from motip.stage_folder import StageFolder
from motip.train.retention import Retention, drop_epochs, drop_steps


class FolderStore:
    """Store of a training without Ray: checkpoints are written to the stage's folder directly."""

    def __init__(self, stage: StageFolder, retention: Retention | None = None) -> None:
        self._stage = stage
        self._retention = retention or Retention()

    @contextlib.contextmanager
    def newest(self) -> Iterator[Path | None]:
        """The newest complete checkpoint, of an epoch or of a position inside one."""
        found = self._stage.checkpoints().latest()
        yield found if isinstance(found, Path) else None

    def folder(self, name: str) -> Path:
        path = Path(str(self._stage)) / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def step_done(self, step: int, folder: Path | None, wait: bool) -> None:
        if folder is not None:
            drop_steps(self._stage, self._retention.steps)

    def epoch_done(self, epoch: int, metrics: dict[str, float], folder: Path | None) -> None:
        if folder is not None:
            drop_steps(self._stage, 0)
            drop_epochs(self._stage, self._retention)

    def preemption(self) -> str:
        return ""
