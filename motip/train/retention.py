"""Retention of checkpoints in a stage's folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

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
