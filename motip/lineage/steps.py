"""Steps of a chain of weights, as read back from MLflow runs and from lineage records."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from motip.lineage.provenance import provenance
from motip.lineage.tags import Tag

_HEADLINES = ("HOTA", "DetA", "AssA", "MOTA", "IDF1", "IDSW")
"""Scores stored in a lineage record; the MLflow run has all."""

_PATH_OR_URI = re.compile(r"^(/|~|[A-Za-z]:\\|[A-Za-z][A-Za-z0-9+.\-]*://)")


@dataclass(frozen=True, slots=True)
class DataUsed:
    """A dataset used by a stage.

    Attributes:
        name: ``<source>/<split>``, such as ``bdd100k/train``.
        sha256: full hex digest over its content.
        context: use of the dataset (training, validation).
        source: origin, JSON-able.
        profile: counts for display (videos, frames, boxes), JSON-able.
    """

    name: str
    sha256: str
    context: str = "training"
    source: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)


class CheckpointLocation(NamedTuple):
    """Location of a checkpoint: absolute path or URI, path relative to the storage (or ""), sha256."""

    path: str
    relative: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class LineageStep:
    """One step in a chain.

    Attributes:
        kind: ``stage`` (a recorded run), ``initialised`` (fresh weights from a seed), ``export`` (exported weights),
            ``checkpoint`` (trained, but its run was not found) or ``weights`` (a file without a record).
        config: parameters, values as text; empty if unknown.
        config_changes: parameter -> (value in the step before, value here), None where it is absent.
        scores: ``best_`` metrics without the prefix.
        domains: domain -> HOTA (or the curriculum's metric) of the stage's best checkpoint.
        came_from / checkpoint: weights that the step started from / wrote; None if unknown.
        record: lineage record that this step was read from, "" if read from a run. Its locations are bare file names.
        note: remark to show with the step.
    """

    kind: str
    stage: str
    run_id: str = ""
    status: str = ""
    started: int = 0
    data_digest: str = ""
    data: tuple[DataUsed, ...] = ()
    came_from: CheckpointLocation | None = None
    checkpoint: CheckpointLocation | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    config_changes: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    seed: str = ""
    git_commit: str = ""
    git_dirty: str = ""
    python: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    domains: Mapping[str, float] = field(default_factory=dict)
    interrupted: str = ""
    record: str = ""
    note: str = ""


def current_environment() -> dict[str, Any]:
    """The fields of a step about code and machine, for this process."""
    facts = provenance()
    git = facts["git"]
    return {
        "git_commit": git["commit"] or "",
        "git_dirty": "" if git["dirty"] is None else str(git["dirty"]).lower(),
        "python": facts["python"],
        "versions": facts["versions"],
        "hardware": facts["hardware"],
    }


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """Parameters that differ; empty if one side is unknown."""
    if not before or not after:
        return {}
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return {key: (before.get(key), after.get(key)) for key in keys}


_STEP = TypeAdapter(LineageStep)


def to_json(step: LineageStep, *, with_config: bool) -> dict[str, Any]:
    """JSON-able values of a step; files by name and digest, without the folders of this machine.

    Args:
        with_config: include the configuration; needed for the newest step, which the next step is compared with.
    """
    values = {
        **{each.name: getattr(step, each.name) for each in fields(step) if each.name != "record"},
        "data": [
            {"name": used.name, "sha256": used.sha256, "context": used.context, "profile": dict(used.profile)}
            for used in step.data
        ],
        "came_from": _named(step.came_from),
        "checkpoint": _named(step.checkpoint),
        "config": {key: _without_folders(value) for key, value in step.config.items()} if with_config else {},
        "config_changes": {
            key: [None if value is None else _without_folders(value) for value in pair]
            for key, pair in step.config_changes.items()
        },
        "scores": {name: step.scores[name] for name in _HEADLINES if name in step.scores},
    }
    return {key: value for key, value in values.items() if value not in ("", 0, None, [], {})}


def from_json(values: Mapping[str, Any], record: str) -> LineageStep:
    """Inverse of ``to_json``; ``record`` is the name of the file it was read from.

    Raises:
        ValidationError, KeyError, TypeError: these are not the values of a step.
    """
    files = {
        key: CheckpointLocation(values[key]["name"], "", values[key]["sha256"])
        for key in ("came_from", "checkpoint")
        if key in values
    }
    return _STEP.validate_python({**values, **files, "record": record})


def _named(location: CheckpointLocation | None) -> dict[str, str] | None:
    return None if location is None else {"name": _last(location.path), "sha256": location.sha256}


def _without_folders(value: str) -> str:
    return _last(value) if _PATH_OR_URI.match(value) else value


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def provenance_tags() -> dict[str, str]:
    """MLflow tags with code and machine of this process."""
    facts = current_environment()
    tags = {
        Tag.PYTHON: facts["python"],
        Tag.VERSIONS: json.dumps(facts["versions"], sort_keys=True),
        Tag.HARDWARE: json.dumps(facts["hardware"], sort_keys=True),
        Tag.GIT_COMMIT: facts["git_commit"],
        Tag.GIT_DIRTY: facts["git_dirty"],
    }
    if facts["git_commit"]:
        # The tag that MLflow's UI shows as the version.
        tags["mlflow.source.git.commit"] = facts["git_commit"]
    return tags
