"""Lineage record beside a weights file: every step that led to it, readable without a database.

``NAME.lineage.json`` belongs to ``NAME.safetensors`` or ``NAME.pth`` and contains that file's sha256.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from motip.errors import MotipError
from motip.lineage.steps import CheckpointLocation, LineageStep, current_environment, from_json, to_json
from motip.storage.atomic import sha256_file
from motip.storage.paths import Location, location, read_json, write_json

FORMAT = 1
SUFFIX = ".lineage.json"


def record_path_of(weights: Location | str) -> Location:
    """Path of the record of a weights file, whether it exists or not."""
    path = location(weights)
    return path.parent / f"{path.stem}{SUFFIX}"


def record_json(steps: SequenceOf[LineageStep]) -> dict[str, Any]:
    """Content of a record: the steps, oldest first, and the sha256 of the file written by the last one."""
    last = steps[-1].checkpoint
    assert last is not None
    newest = max((number for number, step in enumerate(steps) if step.config), default=-1)
    return {
        "format": FORMAT,
        "weights_sha256": last.sha256,
        "steps": [to_json(step, with_config=number == newest) for number, step in enumerate(steps)],
    }


def write_record(weights: Location | str, steps: SequenceOf[LineageStep]) -> Location:
    """Write the record of a weights file whose last step is ``steps[-1]``; returns its path."""
    path = record_path_of(weights)
    write_json(path, record_json(steps))
    return path


def read_record(weights: Location | str, sha256: str) -> list[LineageStep]:
    """The steps that led to a weights file, oldest first; empty if it has no record.

    Args:
        sha256: digest of the weights file.

    Raises:
        MotipError: the record is invalid, or belongs to another file.
    """
    path = record_path_of(weights)
    return parse_record(read_json(path), sha256, path) if path.is_file() else []


def parse_record(stored: Any, sha256: str, where: Location | str) -> list[LineageStep]:
    """The steps in the content of a record; see :func:`read_record`."""
    name = Path(str(where)).name
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or not stored.get("steps"):
        raise MotipError(
            "invalid lineage record",
            where=where,
            found=f"format {stored.get('format')!r}" if isinstance(stored, dict) else type(stored).__name__,
            expected=f"what motip weights export writes, format {FORMAT}",
            fix="export the weights again, or remove the record: the chain then starts with the weights",
        )
    if stored.get("weights_sha256") != sha256:
        raise MotipError(
            "the lineage record beside the weights belongs to another file",
            where=where,
            found=f"weights with sha256 {sha256}",
            expected=f"sha256 {stored.get('weights_sha256')}",
            fix="export the weights again (motip weights export writes both), or copy both files of one export",
        )
    try:
        return [from_json(step, name) for step in stored["steps"]]
    except (ValidationError, TypeError, KeyError) as error:
        raise MotipError(
            "the lineage record is damaged",
            where=where,
            found=str(error).splitlines()[0],
            fix="export the weights again",
        ) from error


def record_fresh(weights: Location, sha256: str, seed: int) -> None:
    """Write the record of freshly initialised weights, the start of a chain."""
    checkpoint = CheckpointLocation(weights.name, "", sha256)
    step = LineageStep("initialised", weights.stem, checkpoint=checkpoint, seed=str(seed), **current_environment())
    write_record(weights, [step])


def record_export(
    written: Path, source: CheckpointLocation, before: SequenceOf[LineageStep], dtype: str | None = None
) -> tuple[Path, list[LineageStep]]:
    """Write the record of newly exported weights; returns its path and all its steps.

    Args:
        source: the exported checkpoint.
        before: the steps that led to the checkpoint.
        dtype: dtype that floats were converted to, None if unchanged.
    """
    step = LineageStep(
        "export",
        written.stem,
        came_from=source,
        checkpoint=CheckpointLocation(written.name, "", sha256_file(written)),
        config_changes={} if dtype is None else {"dtype": ("as trained", dtype)},
        **current_environment(),
    )
    steps = [*before, step]
    return Path(str(write_record(written, steps))), steps
