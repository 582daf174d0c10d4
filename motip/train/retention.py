"""Checkpoints in a stage's folder: which are complete, and which are kept."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from motip.errors import MotipError
from motip.storage.paths import Location, files_under, read_json

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


@dataclass(frozen=True)
class EpochCheckpoint:
    """A finished epoch: its metrics, and its weights while they are kept."""

    epoch: int
    step: int
    metrics: dict[str, float]
    weights: Location | None


@dataclass(frozen=True)
class CheckpointIndex:
    """Complete checkpoints in a stage's folder at the time of one listing."""

    epochs: list[EpochCheckpoint]
    """In order of the epoch."""
    steps: dict[int, Location]
    """Weights of the positions inside epochs by optimiser step, in order."""

    def latest(self) -> Location | None:
        """The newest complete checkpoint. At the same step a finished epoch precedes a position inside it."""
        found = [(step, 0, path) for step, path in self.steps.items()]
        found += [(each.step, 1, each.weights) for each in self.epochs if each.weights is not None]
        return max(found, key=lambda each: each[:2])[2] if found else None


def list_checkpoints(folder: Location) -> CheckpointIndex:
    """List the complete checkpoints in a stage's folder.

    The metrics.json of an epoch is written after its weights; weights without it are incomplete and not listed.
    """
    files = _checkpoint_files(folder)
    epochs = []
    for (parent, name), path in files.items():
        if parent.startswith("epoch_") and name == "metrics.json":
            stored = read_json(path)
            number = int(stored["epoch"])
            weights = files.get((parent, f"checkpoint_{number}.pth"))
            epochs.append(EpochCheckpoint(number, int(stored["step"]), stored["metrics"], weights))
    return CheckpointIndex(sorted(epochs, key=lambda each: each.epoch), _steps(files))


def best_first(epochs: Mapping[int, Mapping[str, float]], metric: str) -> list[int]:
    """Epochs sorted by the metric, highest first, the earliest of equals first; epochs without a finite value are
    omitted."""
    values = {epoch: metrics.get(metric, math.nan) for epoch, metrics in epochs.items()}
    scored = [epoch for epoch, value in values.items() if math.isfinite(value)]
    return sorted(scored, key=lambda epoch: (-values[epoch], epoch))


def drop_steps(folder: Location, kept: int) -> None:
    """Remove the checkpoints inside epochs except the last ``kept``.

    Their empty folders stay: Ray Train rejects its list of checkpoints if a folder in it is missing.
    """

    def superfluous() -> list[Location]:
        weights = list(_steps(_checkpoint_files(folder)).values())
        return weights[: max(0, len(weights) - kept)]

    _remove(folder, superfluous)


def drop_epochs(folder: Location, retention: Retention) -> None:
    """Remove the weights of finished epochs that are neither the newest nor among the best.

    Their metrics stay, so the stage's history is complete. An epoch without the metric is kept only as the newest.
    """
    if retention.epochs is None:
        return

    def superfluous() -> list[Location]:
        complete = {each.epoch: each for each in list_checkpoints(folder).epochs if each.weights is not None}
        best = best_first({epoch: each.metrics for epoch, each in complete.items()}, retention.best)
        stay = {*best[: retention.epochs], max(complete, default=-1)}
        return [each.weights for epoch, each in complete.items() if epoch not in stay and each.weights is not None]

    _remove(folder, superfluous)


def _checkpoint_files(folder: Location) -> dict[tuple[str, str], Location]:
    """(folder, name) -> path of every file one level down, from one listing."""
    return {(path.parent.name, path.name): path for path in files_under(folder) if path.parent.parent == folder}


def _steps(files: dict[tuple[str, str], Location]) -> dict[int, Location]:
    found: dict[int, Location] = {}
    for (parent, name), path in files.items():
        step = re.fullmatch(r"step_(\d+)", parent)
        if step and name == f"checkpoint_step_{int(step[1])}.pth":
            found[int(step[1])] = path
    return dict(sorted(found.items()))


def _remove(folder: Location, superfluous: Callable[[], list[Location]]) -> None:
    """Remove files; a failure is logged and retried after the next checkpoint, since training can continue."""
    path = folder
    try:
        for path in superfluous():
            path.unlink(missing_ok=True)
    except (MotipError, OSError) as error:
        _log.warning("%s: superfluous checkpoints are not removed for now: %s", path, str(error).splitlines()[0])
