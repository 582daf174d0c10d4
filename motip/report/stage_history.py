"""Metrics history of a stage, per epoch and per logged step, read from its event log."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from motip.errors import MotipError
from motip.events import EpochDone, Event, StepLogged
from motip.stage_folder import STAGE, StageFolder, best_first
from motip.storage.paths import Location

_STEP_NAMES = ("loss", "detr_grad_norm", "other_grad_norm")
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

    def read(self, event: Event) -> None:
        """Add an event; steps of an earlier, interrupted attempt from its position on are dropped."""
        if isinstance(event, EpochDone):
            self.epochs[event.epoch] = event.metrics
        elif isinstance(event, StepLogged):
            values = {name.removeprefix("step/"): float(value) for name, value in event.metrics.items()}
            kept = {name: value for name, value in values.items() if name in _STEP_NAMES or name.startswith("lr/")}
            while self.steps and self.steps[-1][:2] >= (event.epoch, event.done):
                self.steps.pop()
            self.steps.append((event.epoch, event.done, kept))
            if len(self.steps) > STEPS_KEPT:
                self.steps = self.steps[1::2]

    @classmethod
    def begin(cls, stage: StageFolder) -> History:
        """An empty history of a stage's folder.

        Raises:
            MotipError: not a stage's folder.
        """
        if not stage.exists():
            raise MotipError(
                "this is not a stage's folder",
                where=stage.path,
                expected=f"a folder with {STAGE}: curricula/<name>/<stage>/<inputs>/ under the storage",
            )
        state, config, facts = stage.state(), stage.config(), stage.facts()
        return cls(
            stage=str(state.get("stage") or facts.stage or stage.path.parent.name),
            planned=int(config.get("EPOCHS") or state.get("epochs") or 0),
            best=facts.best,
            finished=state.get("status") == "finished",
        )

    @classmethod
    def load(cls, folder: Location) -> History:
        """The history of a stage's folder, from its events and the metrics of its finished epochs.

        Raises:
            MotipError: not a stage's folder.
        """
        stage = StageFolder(folder)
        history = cls.begin(stage)
        for event in stage.events():
            history.read(event)
        history.epochs |= {each.epoch: each.metrics for each in stage.checkpoints().epochs}
        history.planned = history.planned or len(history.epochs)
        return history


def _of_class(name: str) -> bool:
    return name.startswith("HOTA/") and "/" not in name.removeprefix("HOTA/")
