"""Which checkpoints a stage's folder holds, which of them are whole, and which stay."""

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
    """What stays of a stage's checkpoints.

    Attributes:
        steps: checkpoints inside the epoch under way, the newest ones.
        epochs: finished epochs besides the newest, the best ones; None keeps all.
        best: the stage's metric that says which are best.
    """

    steps: int = 2
    epochs: int | None = None
    best: str = "HOTA"


@dataclass(frozen=True)
class Finished:
    """A finished epoch: what it scored, and its weights while they are kept."""

    epoch: int
    step: int
    metrics: dict[str, float]
    weights: Location | None


@dataclass(frozen=True)
class Held:
    """What lies in a stage's folder, from one look at it; half-written files are not among it."""

    epochs: list[Finished]
    """By epoch."""
    steps: dict[int, Location]
    """Weights of the positions inside epochs by optimiser step, in order."""

    def latest(self) -> Location | None:
        """The newest whole checkpoint. At the same step a finished epoch is further than a position inside it."""
        found = [(step, 0, path) for step, path in self.steps.items()]
        found += [(each.step, 1, each.weights) for each in self.epochs if each.weights is not None]
        return max(found, key=lambda each: each[:2])[2] if found else None


def held(folder: Location) -> Held:
    """Look at a stage's folder.

    A finished epoch has a metrics.json, which is written after its weights; without it the weights count for nothing.
    """
    files = _checkpoint_files(folder)
    epochs = []
    for (parent, name), path in files.items():
        if parent.startswith("epoch_") and name == "metrics.json":
            stored = read_json(path)
            number = int(stored["epoch"])
            weights = files.get((parent, f"checkpoint_{number}.pth"))
            epochs.append(Finished(number, int(stored["step"]), stored["metrics"], weights))
    return Held(sorted(epochs, key=lambda each: each.epoch), _steps(files))


def best_first(epochs: Mapping[int, Mapping[str, float]], metric: str) -> list[int]:
    """The epochs that have the metric, the highest value first and the earliest of equals; none that is not finite."""
    values = {epoch: metrics.get(metric, math.nan) for epoch, metrics in epochs.items()}
    scored = [epoch for epoch, value in values.items() if math.isfinite(value)]
    return sorted(scored, key=lambda epoch: (-values[epoch], epoch))


def drop_steps(folder: Location, kept: int) -> None:
    """Remove the checkpoints inside epochs but for the last ``kept``.

    Their empty folders stay: Ray Train's own list of checkpoints names them, and is refused where one is missing.
    """

    def superfluous() -> list[Location]:
        weights = list(_steps(_checkpoint_files(folder)).values())
        return weights[: max(0, len(weights) - kept)]

    _remove(folder, superfluous)


def drop_epochs(folder: Location, retention: Retention) -> None:
    """Remove the weights of finished epochs that are neither the newest nor among the best.

    What they scored stays, so the stage's history is whole. An epoch without the metric can only be the newest.
    """
    if retention.epochs is None:
        return

    def superfluous() -> list[Location]:
        whole = {each.epoch: each for each in held(folder).epochs if each.weights is not None}
        best = best_first({epoch: each.metrics for epoch, each in whole.items()}, retention.best)
        stay = {*best[: retention.epochs], max(whole, default=-1)}
        return [each.weights for epoch, each in whole.items() if epoch not in stay and each.weights is not None]

    _remove(folder, superfluous)


def _checkpoint_files(folder: Location) -> dict[tuple[str, str], Location]:
    """(folder, name) of every file one level down; one listing."""
    return {(path.parent.name, path.name): path for path in files_under(folder) if path.parent.parent == folder}


def _steps(files: dict[tuple[str, str], Location]) -> dict[int, Location]:
    found: dict[int, Location] = {}
    for (parent, name), path in files.items():
        step = re.fullmatch(r"step_(\d+)", parent)
        if step and name == f"checkpoint_step_{int(step[1])}.pth":
            found[int(step[1])] = path
    return dict(sorted(found.items()))


def _remove(folder: Location, superfluous: Callable[[], list[Location]]) -> None:
    """Too many checkpoints are no reason to stop training: what cannot be removed is tried again next time."""
    place = folder
    try:
        for place in superfluous():
            place.unlink(missing_ok=True)
    except (MotipError, OSError) as error:
        _log.warning("%s: checkpoints that are not needed any more stay for now: %s", place, str(error).splitlines()[0])
