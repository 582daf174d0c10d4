"""The record that lies beside a weights file and tells every step that led to it, without a database.

``NAME.lineage.json`` belongs to ``NAME.safetensors`` or ``NAME.pth`` and holds that file's sha256.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path
from typing import Any

from motip.errors import MotipError
from motip.lineage.steps import CheckpointPlace, LineageStep, from_json, here, to_json
from motip.storage.atomic import sha256_file
from motip.storage.paths import Location, location, read_json, write_json

FORMAT = 1
SUFFIX = ".lineage.json"


def record_place(weights: Location | str) -> Location:
    """Where the record of a weights file lies, whether there is one or not."""
    place = location(weights)
    return place.parent / f"{place.stem}{SUFFIX}"


def record_text(steps: SequenceOf[LineageStep]) -> dict[str, Any]:
    """What a record holds: the steps oldest first, and the sha256 of the file that the last one wrote."""
    last = steps[-1].checkpoint
    assert last is not None
    newest = max((number for number, step in enumerate(steps) if step.config), default=-1)
    return {
        "format": FORMAT,
        "weights_sha256": last.sha256,
        "steps": [to_json(step, with_config=number == newest) for number, step in enumerate(steps)],
    }


def write_record(weights: Location | str, steps: SequenceOf[LineageStep]) -> Location:
    """Write the record of a weights file whose last step is ``steps[-1]``; returns its place."""
    place = record_place(weights)
    write_json(place, record_text(steps))
    return place


def read_record(weights: Location | str, sha256: str) -> list[LineageStep]:
    """The steps that led to a weights file, oldest first; empty where no record lies beside it.

    Args:
        sha256: of the weights file.

    Raises:
        MotipError: the record cannot be understood, or is of another file.
    """
    place = record_place(weights)
    return parse_record(read_json(place), sha256, place) if place.is_file() else []


def parse_record(stored: Any, sha256: str, where: Location | str) -> list[LineageStep]:
    """The steps of a record that was read already; see :func:`read_record`."""
    name = Path(str(where)).name
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or not stored.get("steps"):
        raise MotipError(
            "this is no lineage record that can be read here",
            where=where,
            found=f"format {stored.get('format')!r}" if isinstance(stored, dict) else type(stored).__name__,
            expected=f"what motip weights export writes, format {FORMAT}",
            fix="export the weights again, or remove the record: the chain then begins with the weights",
        )
    if stored.get("weights_sha256") != sha256:
        raise MotipError(
            "the lineage record beside the weights is of another file",
            where=where,
            found=f"weights with sha256 {sha256}",
            expected=f"sha256 {stored.get('weights_sha256')}",
            fix="export the weights again (motip weights export writes both), or copy both files of one export",
        )
    try:
        return [from_json(step, name) for step in stored["steps"]]
    except (TypeError, KeyError, AttributeError) as error:
        raise MotipError(
            "the lineage record is damaged", where=where, found=str(error), fix="export the weights again"
        ) from error


def record_fresh(weights: Location, sha256: str, seed: int) -> None:
    """The record of weights that were drawn from a seed: the beginning of a chain."""
    place = CheckpointPlace(weights.name, "", sha256)
    write_record(weights, [LineageStep("initialised", weights.stem, checkpoint=place, seed=str(seed), **here())])


def record_export(
    written: Path, source: CheckpointPlace, before: SequenceOf[LineageStep], dtype: str | None = None
) -> tuple[Path, list[LineageStep]]:
    """Write the record of weights that were exported just now; returns its place and all its steps.

    Args:
        source: the checkpoint they come from.
        before: the steps that led to it.
        dtype: that floats were stored in, where that was asked for.
    """
    step = LineageStep(
        "export",
        written.stem,
        came_from=source,
        checkpoint=CheckpointPlace(written.name, "", sha256_file(written)),
        config_changes={} if dtype is None else {"dtype": ("as trained", dtype)},
        **here(),
    )
    steps = [*before, step]
    return Path(str(write_record(written, steps))), steps


def at_hand(steps: SequenceOf[LineageStep], place: CheckpointPlace) -> list[LineageStep]:
    """The steps of a record, the last of them with the place where its file lies now."""
    return [*steps[:-1], replace(steps[-1], checkpoint=place)]


def as_text(steps: SequenceOf[LineageStep]) -> str:
    """A record in one line, for a tag."""
    return json.dumps(record_text(steps), sort_keys=True, separators=(",", ":"))
