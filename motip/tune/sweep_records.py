"""Trial records of a sweep: one JSON file per trial, from which an interrupted sweep resumes."""

from __future__ import annotations

from typing import Any

from motip.storage.paths import Location, files_under, read_json, write_json
from motip.tune.searcher import TrialResult, TrialSpec

BASELINE = "000"
"""Key of the baseline trial, which has the configuration's own values."""


def trial_key(number: int) -> str:
    return f"{number:03d}"


def repeat_key(key: str, seed: int) -> str:
    return f"{key}-seed{seed}"


def record_path(folder: Location, key: str) -> Location:
    return folder / "trials" / f"{key}.json"


def write_trial(folder: Location, result: TrialResult, **extra: Any) -> None:
    """Write a trial's record; `extra` values written earlier (run_id, seconds, …) are kept."""
    path = record_path(folder, result.spec.key)
    earlier = read_json(path) if path.is_file() else {}
    record = {
        **earlier,
        **extra,
        "key": result.spec.key,
        "values": result.spec.values,
        "seed": result.spec.seed,
        "status": result.status,
        "history": {str(epoch): value for epoch, value in result.history.items()},
        "message": result.message,
    }
    write_json(path, record)


def read_trial(folder: Location, key: str) -> dict[str, Any]:
    """A trial's record; empty if there is none."""
    path = record_path(folder, key)
    return dict(read_json(path)) if path.is_file() else {}


def read_trials(folder: Location) -> list[TrialResult]:
    """All trials of a sweep's folder, sorted by key; interrupted ones are `running`."""
    paths = [path for path in files_under(folder) if path.name.endswith(".json") and path.parent.name == "trials"]
    records = [read_json(path) for path in paths if path.parent == folder / "trials"]
    return sorted((_result(record) for record in records), key=lambda result: result.spec.key)


def _result(record: dict[str, Any]) -> TrialResult:
    history = {int(epoch): float(value) for epoch, value in record["history"].items()}
    spec = TrialSpec(record["key"], record["values"], record["seed"])
    return TrialResult(spec, record["status"], history, record["message"])
