"""Checkpoint store of a training: the newest checkpoint to resume from, where new ones go, which ones are kept."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from motip.errors import MotipError
from motip.stage_folder import StageFolder, best_first
from motip.storage.paths import Location

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a stage are kept.

    Attributes:
        steps: number of checkpoints inside the current epoch, the newest ones.
        epochs: number of finished epochs besides the newest, the best ones; None keeps all.
        best: the stage's metric that ranks the epochs.
    """

    steps: int = 2
    epochs: int | None = None
    best: str = "HOTA"


def drop_steps(stage: StageFolder, kept: int) -> None:
    """Remove the checkpoints inside epochs except the last ``kept``.

    Their empty folders stay: Ray Train rejects its list of checkpoints if a folder in it is missing.
    """

    def superfluous() -> list[Location]:
        weights = list(stage.checkpoints().steps.values())
        return weights[: max(0, len(weights) - kept)]

    _remove(stage, superfluous)


def drop_epochs(stage: StageFolder, retention: Retention) -> None:
    """Remove the weights of finished epochs that are neither the newest nor among the best.

    Their metrics stay, so the stage's history is complete. An epoch without the metric is kept only as the newest.
    """
    if retention.epochs is None:
        return

    def superfluous() -> list[Location]:
        complete = {each.epoch: each for each in stage.checkpoints().epochs if each.weights is not None}
        best = best_first({epoch: each.metrics for epoch, each in complete.items()}, retention.best)
        stay = {*best[: retention.epochs], max(complete, default=-1)}
        return [each.weights for epoch, each in complete.items() if epoch not in stay and each.weights is not None]

    _remove(stage, superfluous)


def _remove(stage: StageFolder, superfluous: Callable[[], list[Location]]) -> None:
    """Remove files; a failure is logged and retried after the next checkpoint, since training can continue."""
    path = stage.path
    try:
        for path in superfluous():
            path.unlink(missing_ok=True)
    except (MotipError, OSError) as error:
        _log.warning("%s: superfluous checkpoints are not removed for now: %s", path, str(error).splitlines()[0])


class CheckpointStore:
    """Store of a training without Ray, in the stage's folder.

    Args:
        stage: where the checkpoints are stored.
        retention: the checkpoints to keep.
    """

    def __init__(self, stage: StageFolder, retention: Retention | None = None) -> None:
        self._stage = stage
        self._retention = retention or Retention()

    @contextlib.contextmanager
    def newest(self) -> Iterator[Path | None]:
        """The newest complete checkpoint, of an epoch or of a position inside one; readable inside the block."""
        found = self._stage.checkpoints().latest()
        yield found if isinstance(found, Path) else None

    def folder(self, name: str) -> Path:
        """A local folder for the files of a checkpoint; called on rank 0 only."""
        path = Path(str(self._stage)) / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def step_done(self, step: int, folder: Path | None, wait: bool) -> None:
        """Store a checkpoint inside an epoch and drop the oldest; every rank calls it, rank 0 with the folder."""
        if folder is not None:
            drop_steps(self._stage, self._retention.steps)

    def epoch_done(self, epoch: int, metrics: dict[str, float], folder: Path | None) -> None:
        """Store an epoch; every rank calls it, rank 0 with the folder if a checkpoint was saved."""
        if folder is not None:
            drop_steps(self._stage, 0)
            drop_epochs(self._stage, self._retention)

    def preemption(self) -> str:
        """Why this machine will be preempted, or "". Every rank calls it equally often and gets the same answer."""
        return ""
