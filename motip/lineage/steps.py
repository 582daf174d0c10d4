"""One step of a chain of weights, as it is read back from runs and from the records beside weights files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from motip.lineage.provenance import provenance
from motip.lineage.tags import Tag

HEADLINES = ("HOTA", "DetA", "AssA", "MOTA", "IDF1", "IDSW")
"""Scores that a record beside weights keeps; the run has them all."""

_PLACE = re.compile(r"^(/|~|[A-Za-z]:\\|[A-Za-z][A-Za-z0-9+.\-]*://)")


@dataclass(frozen=True, slots=True)
class DataUsed:
    """A data set that went into a stage.

    Attributes:
        name: such as ``bdd100k/train``.
        sha256: full hex digest over its content.
        context: what it was used for (training, validation).
        source: where it came from, JSON-able.
        profile: counts worth showing (videos, frames, boxes), JSON-able.
    """

    name: str
    sha256: str
    context: str = "training"
    source: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)


class CheckpointPlace(NamedTuple):
    """Where a checkpoint is: absolute path or URI, the same relative to the storage (or empty), sha256."""

    path: str
    relative: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class LineageStep:
    """One step in a chain.

    Attributes:
        kind: ``stage`` (a recorded run), ``initialised`` (fresh weights drawn from a seed), ``export`` (written in
            another form), ``checkpoint`` (trained, but its run is not known any more) or ``weights`` (a file that
            nothing is known of).
        config: parameters, values as text; empty where unknown.
        config_changes: parameter to (value in the step before, value here), None where it is absent.
        scores: the ``best_`` metrics, without the prefix.
        domains: domain to HOTA (or the metric the curriculum names) of the stage's best checkpoint.
        came_from / checkpoint: path, path relative to the storage, sha256; empty where unknown.
        record: file that told of this step; empty where its run did. Places are then names without folders.
        note: what must stand beside it.
    """

    kind: str
    stage: str
    run_id: str = ""
    status: str = ""
    started: int = 0
    data_digest: str = ""
    data: tuple[DataUsed, ...] = ()
    came_from: CheckpointPlace | None = None
    checkpoint: CheckpointPlace | None = None
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


def here() -> dict[str, Any]:
    """The fields of a step that say which code on which machine: those of this process."""
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
    """Parameters that differ; nothing where one side is not known."""
    if not before or not after:
        return {}
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return {key: (before.get(key), after.get(key)) for key in keys}


def to_json(step: LineageStep, *, with_config: bool) -> dict[str, Any]:
    """Plain values to hand on: files by name and digest, since their folders are this machine's business.

    Args:
        with_config: the configuration too; the newest step needs it, for what comes after it to be compared with.
    """
    values: dict[str, Any] = {
        "kind": step.kind,
        "stage": step.stage,
        "run_id": step.run_id,
        "status": step.status,
        "started": step.started,
        "data_digest": step.data_digest,
        "data": [
            {"name": used.name, "sha256": used.sha256, "context": used.context, "profile": dict(used.profile)}
            for used in step.data
        ],
        "came_from": _named(step.came_from),
        "checkpoint": _named(step.checkpoint),
        "config": {key: _nameless(value) for key, value in step.config.items()} if with_config else {},
        "config_changes": {
            key: [None if value is None else _nameless(value) for value in pair]
            for key, pair in step.config_changes.items()
        },
        "seed": step.seed,
        "git_commit": step.git_commit,
        "git_dirty": step.git_dirty,
        "python": step.python,
        "versions": dict(step.versions),
        "hardware": dict(step.hardware),
        "scores": {name: step.scores[name] for name in HEADLINES if name in step.scores},
        "domains": dict(step.domains),
        "interrupted": step.interrupted,
        "note": step.note,
    }
    return {key: value for key, value in values.items() if value not in ("", 0, None, [], {})}


def from_json(values: Mapping[str, Any], record: str) -> LineageStep:
    """Inverse of ``to_json``; ``record`` is the file it was read from."""
    known = dict(values)
    for key in ("came_from", "checkpoint"):
        if key in known:
            known[key] = CheckpointPlace(known[key]["name"], "", known[key]["sha256"])
    known["data"] = tuple(DataUsed(**each) for each in known.get("data", ()))
    known["config_changes"] = {key: (pair[0], pair[1]) for key, pair in known.get("config_changes", {}).items()}
    return LineageStep(**known, record=record)


def _named(place: CheckpointPlace | None) -> dict[str, str] | None:
    return None if place is None else {"name": _last(place.path), "sha256": place.sha256}


def _nameless(value: str) -> str:
    return _last(value) if _PLACE.match(value) else value


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def provenance_tags() -> dict[str, str]:
    """What a run tells of this process, in MLflow's tags."""
    facts = here()
    tags = {
        Tag.PYTHON: facts["python"],
        Tag.VERSIONS: json.dumps(facts["versions"], sort_keys=True),
        Tag.HARDWARE: json.dumps(facts["hardware"], sort_keys=True),
        Tag.GIT_COMMIT: facts["git_commit"],
        Tag.GIT_DIRTY: facts["git_dirty"],
    }
    if facts["git_commit"]:
        # MLflow's own name for it, which its UI shows as the version.
        tags["mlflow.source.git.commit"] = facts["git_commit"]
    return tags
