"""Trials of a sweep: one JSON file per trial, from which an interrupted sweep resumes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from motip.stage_folder import StageFolder, SweepFolder
from motip.storage.paths import read_json, write_json

BASELINE = "000"
"""Key of the baseline trial, which has the configuration's own values."""


@dataclass
class Trial:
    """A training of a sweep, and the content of its record.

    Attributes:
        key: name within the sweep, such as `003`, or `003-seed30` for a repetition.
        values: configuration keys that differ from the baseline; empty for the baseline itself.
        seed: SEED of the training; None for the configuration's own.
        status: `running`, also if it was interrupted, `finished`, `pruned` (stopped early by ASHA) or `failed`.
        history: number of epochs trained, to the value that is maximised; of validated epochs.
        message: of a failure.
        run_id: MLflow run; empty before the first attempt.
        inputs: digest of the stage's inputs with these values; empty before the first attempt.
        seconds: of all attempts.
    """

    key: str
    values: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    status: str = "running"
    history: dict[int, float] = field(default_factory=dict)
    message: str = ""
    run_id: str = ""
    inputs: str = ""
    seconds: float = 0.0

    @property
    def setting(self) -> str:
        """Key of the trial with the same values and the configuration's own seed."""
        return self.key.partition("-seed")[0]

    @property
    def value(self) -> float | None:
        """The best epoch's value, as a stage keeps the checkpoint of its best epoch; None without a finite value."""
        return max(self.best_so_far().values(), default=None)

    @property
    def epochs(self) -> int:
        """Epochs up to the last validated one."""
        return max(self.history, default=0)

    def best_so_far(self) -> dict[int, float]:
        """Epochs trained, to the best value up to then."""
        best, rising = -math.inf, {}
        for epoch, value in sorted(self.history.items()):
            best = max(best, value) if math.isfinite(value) else best
            if math.isfinite(best):
                rising[epoch] = best
        return rising

    def repetition(self, seed: int) -> Trial:
        """The same setting with another seed."""
        return Trial(f"{self.key}-seed{seed}", self.values, seed)

    def folder(self, sweep: SweepFolder) -> StageFolder:
        """The folder it trains in."""
        return sweep.trial(self.key, self.inputs)


_RECORD = TypeAdapter(Trial)


def write_trial(sweep: SweepFolder, trial: Trial) -> None:
    write_json(sweep.trial_record(trial.key), asdict(trial))


def read_trial(sweep: SweepFolder, key: str) -> Trial:
    return _RECORD.validate_python(read_json(sweep.trial_record(key)))


def read_trials(sweep: SweepFolder) -> list[Trial]:
    """All trials of a sweep, by key."""
    return sorted((read_trial(sweep, path.stem) for path in sweep.trial_records()), key=lambda trial: trial.key)
