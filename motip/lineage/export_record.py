"""Lineage record of exported weights, from MLflow or from the description in the checkpoint."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from motip.errors import MotipError
from motip.lineage.record_file import read_record, record_export
from motip.lineage.runs import Lineage
from motip.lineage.steps import CheckpointLocation, LineageStep
from motip.lineage.tags import split_params


def write_export_record(
    checkpoint: Path | str, written: Path, storage: str | None = None, dtype: str | None = None
) -> tuple[Path, list[LineageStep]]:
    """Write the lineage record of exported weights into their folder.

    The steps come from the checkpoint's own record, else from the run that trained it, else from the checkpoint.

    Args:
        checkpoint: the exported checkpoint, a file or an export folder.
        written: the exported file.
        storage: storage with the run's MLflow database; None: a parent folder of the checkpoint that has one.
        dtype: type that the floats were converted to, if any.

    Returns:
        Path and steps of the record.

    Raises:
        MotipError: the checkpoint's own record is of another file, or the record cannot be written.
    """
    facts = _facts(written)
    source = facts["source"]
    place = CheckpointLocation(str(source["name"]), "", str(source["sha256"]))
    file = Path(checkpoint)
    before = read_record(file / place.path if file.is_dir() else file, place.sha256)
    before = before or _from_run(file, place, facts, storage)
    return record_export(written, place, before, dtype)


def _facts(written: Path) -> dict[str, Any]:
    """The description in the header of exported weights."""
    from safetensors import safe_open

    from motip.weights.files import HEADER_KEY

    with safe_open(str(written), "pt") as opened:
        return dict(json.loads(opened.metadata()[HEADER_KEY]))


def _from_run(file: Path, place: CheckpointLocation, facts: dict[str, Any], storage: str | None) -> list[LineageStep]:
    """The chain of the run that trained the checkpoint, else one step from the checkpoint's own description."""
    run_id = str((facts.get("training") or {}).get("run_id") or "")
    found = storage or _storage_above(file)
    reason = "no run trained it" if not run_id else f"its run {run_id} was not found: no MLflow database"
    if run_id and (found or os.environ.get("MLFLOW_TRACKING_URI")):
        try:
            return _exported_epoch(Lineage(storage=found or "~/motip").chain(run_id), place, facts)
        except MotipError as error:
            reason = f"its run {run_id} cannot be read: {error.what}"
    return [_single_step(file, place, facts, run_id, reason)]


def _storage_above(file: Path) -> str | None:
    above = (folder for folder in file.resolve().parents if (folder / "mlflow" / "mlflow.db").is_file())
    return next((str(folder) for folder in above), None)


def _exported_epoch(steps: list[LineageStep], place: CheckpointLocation, facts: dict[str, Any]) -> list[LineageStep]:
    last = steps[-1]
    if last.checkpoint is not None and last.checkpoint.sha256 == place.sha256:
        return steps
    epoch = (facts.get("training") or {}).get("epoch")
    note = f"the checkpoint of epoch {epoch} (from 0), not the best one: the run's scores are not its scores"
    return [*steps[:-1], replace(last, checkpoint=place, scores={}, domains={}, note=note)]


def _single_step(file: Path, place: CheckpointLocation, facts: dict[str, Any], run_id: str, reason: str) -> LineageStep:
    parent, config = facts.get("parent") or {}, facts.get("config") or {}
    named = {key: value for key, value in config.items() if not key.startswith("_")}
    return LineageStep(
        "checkpoint" if run_id else "weights",
        file.stem if not file.is_dir() else file.name,
        run_id=run_id,
        came_from=CheckpointLocation(str(parent["path"]), "", str(parent["sha256"])) if parent.get("sha256") else None,
        checkpoint=place,
        config=split_params(named) if named else {},
        seed=str(config.get("SEED", "")),
        note=reason,
    )
