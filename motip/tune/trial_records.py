"""Trials of a sweep, and their records: one JSON file per trial, from which an interrupted sweep resumes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from motip.storage.paths import Location, files_under, read_json, write_json

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


def trial_key(number: int) -> str:
    return f"{number:03d}"


def repeat_key(key: str, seed: int) -> str:
    return f"{key}-seed{seed}"


def write_trial(folder: Location, result: TrialResult, **extra: Any) -> None:
    """Write a trial's record into its sweep's folder; `extra` values written earlier (run_id, seconds, …) are kept."""
    record = {
        **read_record(folder, result.spec.key),
        **extra,
        **vars(result.spec),
        "status": result.status,
        "history": {str(epoch): value for epoch, value in result.history.items()},
        "message": result.message,
    }
    write_json(_path(folder, result.spec.key), record)


def read_record(folder: Location, key: str) -> dict[str, Any]:
    """All values of a trial's record; empty if there is none."""
    path = _path(folder, key)
    return dict(read_json(path)) if path.is_file() else {}


def read_trial(folder: Location, spec: TrialSpec) -> TrialResult:
    """A trial in its sweep's folder; `running` without epochs if it has no record."""
    record = read_record(folder, spec.key)
    return _result(record) if record else TrialResult(spec)


def read_trials(folder: Location) -> list[TrialResult]:
    """All trials of a sweep's folder, sorted by key; interrupted ones are `running`."""
    paths = [path for path in files_under(folder / "trials") if path.name.endswith(".json")]
    records = [read_json(path) for path in paths if path.parent == folder / "trials"]
    return sorted((_result(record) for record in records), key=lambda result: result.spec.key)


def _path(folder: Location, key: str) -> Location:
    return folder / "trials" / f"{key}.json"


def _result(record: dict[str, Any]) -> TrialResult:
    history = {int(epoch): float(value) for epoch, value in record["history"].items()}
    spec = TrialSpec(record["key"], record["values"], record["seed"])
    return TrialResult(spec, record["status"], history, record["message"])
