"""What is written down of a sweep's trials, so that the same command goes on where it was killed."""

from __future__ import annotations

from typing import Any

from motip.storage.paths import Location, files_under, read_json, write_json
from motip.tune.searcher import Ask, Told

HAND_SET = "000"
"""Key of the trial that has the configuration's own values."""


def trial_key(number: int) -> str:
    return f"{number:03d}"


def repeat_key(key: str, seed: int) -> str:
    return f"{key}-seed{seed}"


def record_path(folder: Location, key: str) -> Location:
    return folder / "trials" / f"{key}.json"


def write_trial(folder: Location, told: Told, **facts: Any) -> None:
    """Write a trial's record, keeping facts that it has already (run_id, seconds, …)."""
    path = record_path(folder, told.ask.key)
    earlier = read_json(path) if path.is_file() else {}
    record = {
        **earlier,
        **facts,
        "key": told.ask.key,
        "values": told.ask.values,
        "seed": told.ask.seed,
        "status": told.status,
        "history": {str(epoch): value for epoch, value in told.history.items()},
        "message": told.message,
    }
    write_json(path, record)


def read_trial(folder: Location, key: str) -> dict[str, Any]:
    """A trial's record; empty where it has none."""
    path = record_path(folder, key)
    return dict(read_json(path)) if path.is_file() else {}


def read_trials(folder: Location) -> list[Told]:
    """All trials of a sweep's folder, by key; `running` are those that were cut off."""
    paths = [path for path in files_under(folder) if path.name.endswith(".json") and path.parent.name == "trials"]
    records = [read_json(path) for path in paths if path.parent == folder / "trials"]
    return sorted((_told(record) for record in records), key=lambda told: told.ask.key)


def _told(record: dict[str, Any]) -> Told:
    history = {int(epoch): float(value) for epoch, value in record["history"].items()}
    ask = Ask(record["key"], record["values"], record["seed"])
    return Told(ask, record["status"], history, record["message"])
