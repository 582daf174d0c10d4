"""Spool of version 0.1: queued entries of runs, converted to event logs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from motip import events
from motip.events import Event, EventLog
from motip.storage.atomic import write_json_atomic


def import_spool(folder: Path) -> None:
    """Convert the queues ``spool/<run>.jsonl`` under ``storage/mlflow``; each is then renamed to ``….imported``."""
    for queue in sorted((folder / "spool").glob("*.jsonl")):
        run_id = queue.stem
        if run_id.endswith(".rejected"):
            continue
        log = EventLog(folder / "logs" / run_id)
        for line in queue.read_text().splitlines():
            for event in _events(line, folder / "spool"):
                log.send(event)
        log.close()
        state = folder / "readers" / f"{run_id}.json"
        if not state.is_file():
            write_json_atomic(state, {"folder": f"mlflow/logs/{run_id}", "file": "", "position": 0})
        os.replace(queue, queue.with_suffix(".imported"))


def _events(line: str, spool: Path) -> Iterator[Event]:
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return  # half a line of a killed process
    match entry.get("kind"):
        case "metrics":
            for name, value, milliseconds, step in entry["points"]:
                yield events.MetricsLogged({name: value}, step, time=milliseconds / 1000)
        case "tags":
            yield events.TagsSet(entry["tags"])
        case "artifact":
            recorded = Path(entry["path"])
            kept = spool / "files" / recorded.parent.name / recorded.name
            prefix = f"{entry['folder']}/" if entry["folder"] else ""
            yield events.ArtifactWritten(str(kept if kept.is_file() else recorded), prefix + recorded.name)
        case "model":
            yield events.CheckpointChosen(entry["uri"], entry["sha256"], entry["step"])
        case "status":
            yield events.Ended(entry["status"], time=entry["time"] / 1000)
