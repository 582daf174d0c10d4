"""Metrics history of a stage: per epoch and per logged step, stored as ``history.json`` in the stage's folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from motip.errors import MotipError
from motip.storage.paths import Location, read_json, write_json
from motip.train.retention import best_first, list_checkpoints

FILE = "history.json"
STEP_NAMES = ("loss", "detr_grad_norm", "other_grad_norm")
"""Step metrics that are stored, in addition to the learning rates."""
STEPS_KEPT = 2000
"""Maximum number of step records; beyond it every second one is dropped."""

Step = dict[str, float]


@dataclass
class History:
    """The metrics of one stage.

    Attributes:
        stage: its name.
        planned: configured number of epochs.
        best: metric that chooses the best checkpoint.
        finished: whether the stage's record has the status "finished".
        epochs: 0-based epoch -> metrics, of every completed epoch.
        steps: `[epoch, fraction of it done in (0, 1], values]` of logged steps, in order.
    """

    stage: str
    planned: int
    best: str = "HOTA"
    finished: bool = False
    epochs: dict[int, dict[str, float]] = field(default_factory=dict)
    steps: list[tuple[int, float, Step]] = field(default_factory=list)

    @property
    def last(self) -> int:
        """The last epoch with metrics, -1 if there is none."""
        return max(self.epochs, default=-1)

    def failed(self) -> list[int]:
        """Epochs up to the last one without metrics or without a finite loss."""
        return [
            epoch
            for epoch in range(self.last + 1)
            if not math.isfinite(self.epochs.get(epoch, {}).get("train/loss", math.nan))
        ]

    def best_epoch(self) -> int | None:
        """The scored epoch with the highest value of the metric ``best``; None if no epoch was scored."""
        return next(iter(best_first(self.epochs, self.best)), None)

    def classes(self) -> list[str]:
        """Scored classes in alphabetical order."""
        found = {name.removeprefix("HOTA/") for metrics in self.epochs.values() for name in metrics if _of_class(name)}
        return sorted(found)

    def add_step(self, epoch: int, done: float, metrics: Mapping[str, float]) -> None:
        """Add a step record; records of an earlier, interrupted attempt from that position on are dropped.

        Args:
            done: fraction of the epoch that is done, above 0 and at most 1.
            metrics: with the prefix `step/`.
        """
        values = {name.removeprefix("step/"): float(value) for name, value in metrics.items()}
        kept = {name: value for name, value in values.items() if name in STEP_NAMES or name.startswith("lr/")}
        while self.steps and self.steps[-1][:2] >= (epoch, done):
            self.steps.pop()
        self.steps.append((epoch, done, kept))
        if len(self.steps) > STEPS_KEPT:
            self.steps = self.steps[1::2]

    def add_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.epochs[epoch] = dict(metrics)

    def save(self, folder: Location) -> None:
        """Write ``history.json``; raises MotipError if the folder cannot be written."""
        epochs = {str(epoch): metrics for epoch, metrics in self.epochs.items()}
        write_json(folder / FILE, {"epochs": epochs, "steps": self.steps})

    @classmethod
    def load(cls, folder: Location) -> History:
        """Read a stage's folder: its records, the metrics of its finished epochs, and ``history.json``.

        Raises:
            MotipError: not a stage's folder.
        """
        if not (folder / "stage.json").is_file():
            raise MotipError(
                "this is not a stage's folder",
                where=folder,
                expected="a folder with stage.json: curricula/<name>/<stage>/<inputs>/ under the storage",
            )
        record = read_json(folder / "stage.json")
        config, job, stored = (_read(folder / name) for name in ("config.json", "job.json", FILE))
        finished = list_checkpoints(folder).epochs
        history = cls(
            stage=str(record.get("stage") or job.get("stage") or folder.parent.name),
            planned=int(config.get("EPOCHS") or record.get("epochs") or len(finished)),
            best=str(job.get("best", "HOTA")),
            finished=record.get("status") == "finished",
        )
        history.epochs = {int(epoch): metrics for epoch, metrics in stored.get("epochs", {}).items()}
        history.epochs |= {each.epoch: each.metrics for each in finished}
        history.steps = [(int(epoch), float(done), values) for epoch, done, values in stored.get("steps", [])]
        return history


def epochs_synced(folder: Location) -> set[int]:
    """Epochs in the stored history; after a kill a finished epoch can be missing."""
    return {int(epoch) for epoch in _read(folder / FILE).get("epochs", {})}


def _read(path: Location) -> dict[str, Any]:
    """Content of a JSON file; empty if there is no such file, as in folders of older versions."""
    values: dict[str, Any] = read_json(path) if path.is_file() else {}
    return values


def _of_class(name: str) -> bool:
    return name.startswith("HOTA/") and "/" not in name.removeprefix("HOTA/")
