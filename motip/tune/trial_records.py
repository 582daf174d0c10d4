"""Trials of a sweep, and their records: one JSON file per trial, from which an interrupted sweep resumes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from motip.stage_folder import StageFolder, SweepFolder
from motip.storage.paths import read_json, write_json

BASELINE = "000"
"""Key of the baseline trial, which has the configuration's own values."""


@dataclass(frozen=True)
class TrialSpec:
    """A training to be run.

    Attributes:
        key: name within the sweep, such as `003`, or `003-seed30` for a repetition.
        values: configuration keys that differ from the baseline; empty for the baseline itself.
        seed: SEED of the training; None for the configuration's own.
    """

    key: str
    values: dict[str, Any]
    seed: int | None = None

    @property
    def setting(self) -> str:
        """Key of the trial with the same values and the configuration's own seed."""
        return self.key.partition("-seed")[0]

    def repeated(self, seed: int) -> TrialSpec:
        """The repetition with another seed."""
        return TrialSpec(f"{self.key}-seed{seed}", self.values, seed)


@dataclass
class TrialResult:
    """State and scores of a trial.

    Attributes:
        history: number of epochs trained, to the value that is maximised; of validated epochs.
        status: `running`, `finished`, `pruned` (stopped early by ASHA) or `failed`.
        message: of a failure.
    """

    spec: TrialSpec
    status: str = "running"
    history: dict[int, float] = field(default_factory=dict)
    message: str = ""

    @property
    def value(self) -> float | None:
        """The best epoch's value, as a stage keeps the checkpoint of its best epoch; None without a finite value."""
        return max(self.best_so_far().values(), default=None)

    def best_so_far(self) -> dict[int, float]:
        """Epochs trained, to the best value up to then."""
        best, rising = -math.inf, {}
        for epoch, value in sorted(self.history.items()):
            best = max(best, value) if math.isfinite(value) else best
            if math.isfinite(best):
                rising[epoch] = best
        return rising


def write_trial(sweep: SweepFolder, result: TrialResult, **extra: Any) -> None:
    """Write a trial's record; `extra` values written earlier (run_id, inputs, seconds) are kept."""
    record = {
        **read_record(sweep, result.spec.key),
        **extra,
        **vars(result.spec),
        "status": result.status,
        "history": {str(epoch): value for epoch, value in result.history.items()},
        "message": result.message,
    }
    write_json(sweep.trial_record(result.spec.key), record)


def read_record(sweep: SweepFolder, key: str) -> dict[str, Any]:
    """All values of a trial's record; empty if there is none."""
    path = sweep.trial_record(key)
    return dict(read_json(path)) if path.is_file() else {}


def read_trial(sweep: SweepFolder, spec: TrialSpec) -> TrialResult:
    """State of a trial; `running` without epochs if it has no record."""
    record = read_record(sweep, spec.key)
    return _result(record) if record else TrialResult(spec)


def read_trials(sweep: SweepFolder) -> list[TrialResult]:
    """All trials of a sweep, by key; interrupted ones are `running`."""
    return sorted((_result(read_json(path)) for path in sweep.trial_records()), key=lambda trial: trial.spec.key)


def trial_folder(sweep: SweepFolder, key: str) -> StageFolder | None:
    """The folder that a trial trains in; None before its first attempt."""
    inputs = read_record(sweep, key).get("inputs")
    return None if inputs is None else sweep.trial(key, inputs)


def _result(record: dict[str, Any]) -> TrialResult:
    history = {int(epoch): float(value) for epoch, value in record["history"].items()}
    spec = TrialSpec(record["key"], record["values"], record["seed"])
    return TrialResult(spec, record["status"], history, record["message"])
