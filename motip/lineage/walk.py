"""Read the lineage back: the chain of stages behind a run, and whether its files are still the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from motip.errors import MotipError
from motip.files import sha256_file
from motip.lineage.tags import Tag, join_params

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from motip.lineage.store import Store


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


@dataclass(frozen=True, slots=True)
class LineageStep:
    """One stage in a chain; ``kind`` is ``weights`` for a start that no recorded run made.

    Attributes:
        config_changes: parameter to (value in the stage before, value here), None where it is absent.
        scores: the ``best_`` metrics, without the prefix.
        came_from / checkpoint: path, path relative to the storage, sha256; empty where unknown.
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
    config_changes: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    seed: str = ""
    git_commit: str = ""
    git_dirty: str = ""
    python: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    interrupted: str = ""


@dataclass(frozen=True, slots=True)
class FileCheck:
    """A checkpoint of a chain against its recorded digest; ``state`` is same, changed or missing."""

    stage: str
    path: str
    expected: str
    found: str
    state: str


class CheckpointPlace(NamedTuple):
    """Where a checkpoint is: absolute path or URI, the same relative to the storage (or empty), sha256."""

    path: str
    relative: str
    sha256: str = ""


def checkpoint_place(checkpoint: Path | str, storage: Path) -> CheckpointPlace:
    """The address to record: also relative to the storage, so that the whole storage can be moved."""
    if "://" in str(checkpoint):
        return CheckpointPlace(str(checkpoint), "")
    path = Path(checkpoint).expanduser().resolve()
    return CheckpointPlace(str(path), str(path.relative_to(storage)) if path.is_relative_to(storage) else "")


def walk(store: Store, run_id: str) -> list[LineageStep]:
    """The chain of stages that led to ``run_id``, oldest first, from tags, parameters and inputs alone.

    Args:
        run_id: a stage, or a curriculum (which stands for its last stage).

    Raises:
        MotipError: no such run, a curriculum without stages, a chain that bites its tail.
    """
    client = store.client()
    run: Run | None = stage_run(store, client, run_id)
    steps: list[LineageStep] = []
    seen: set[str] = set()
    while run is not None:
        if run.info.run_id in seen:
            raise MotipError(
                "the lineage runs in a circle", where=f"run {run.info.run_id}", fix="the tags of this run were changed"
            )
        seen.add(run.info.run_id)
        before = _run_before(store, client, run)
        steps.append(_step(run, before))
        place = steps[-1].came_from
        if before is None and place is not None:
            steps.append(LineageStep("weights", Path(place.path).stem, checkpoint=place))
        run = before
    return steps[::-1]


def verify(steps: SequenceOf[LineageStep], storage: Path) -> list[FileCheck]:
    """Each checkpoint of the chain with its digest computed anew, oldest first."""
    checks = []
    for step in steps:
        place = step.checkpoint
        if place is None or not place.sha256:
            continue
        path, found = _digest_of(place, storage)
        state = "missing" if not found else "same" if found == place.sha256 else "changed"
        checks.append(FileCheck(step.stage, path, place.sha256, found, state))
    return checks


def curriculum_of(store: Store, run_id: str) -> str:
    """Name of the curriculum that a run is, or is a stage of; MotipError where it is neither."""
    client = store.client()
    run = stage_run(store, client, run_id)
    parent = client.get_run(run.data.tags[Tag.PARENT_RUN]) if Tag.PARENT_RUN in run.data.tags else run
    name = parent.data.tags.get(Tag.CURRICULUM)
    if name is None:
        raise MotipError(
            "this run belongs to no curriculum",
            where=store.shown_uri,
            found=run_id,
            expected="the id of a curriculum's run or of one of its stages'",
        )
    return name


def stage_run(store: Store, client: MlflowClient, run_id: str) -> Run:
    """The run itself, or the last stage of a curriculum; MotipError where there is none."""
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if getattr(error, "error_code", None) not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise MotipError(
            "no such run",
            where=store.shown_uri,
            found=run_id,
            expected="the id of a stage's or a curriculum's run (32 hexadecimal digits)",
            fix="look it up in the MLflow UI, or in the table at the end of the main job",
        ) from error
    if run.data.tags.get(Tag.KIND) != "curriculum":
        return run
    children = client.search_runs(
        [run.info.experiment_id],
        f"tags.`{Tag.PARENT_RUN}` = '{run_id}' and tags.`{Tag.KIND}` = 'stage'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    if not children:
        raise MotipError(
            "this curriculum has no stage yet", where=f"run {run_id}", fix="wait until its first stage has started"
        )
    return children[0]


def _run_before(store: Store, client: MlflowClient, run: Run) -> Run | None:
    """The run that made the weights this one started from: by its id, else by the digest of the weights."""
    tags = run.data.tags
    if tags.get(Tag.FROM_RUN):
        try:
            return client.get_run(tags[Tag.FROM_RUN])
        except Exception as error:
            # Removed for good from the database: the digest may still find the run in a copy of it.
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise
    if not re.fullmatch(r"[0-9a-f]{64}", tags.get(Tag.FROM_SHA256, "")):
        return None
    makers = client.search_runs(
        [run.info.experiment_id],
        f"tags.`{Tag.CHECKPOINT_SHA256}` = '{tags[Tag.FROM_SHA256]}'",
        order_by=["attributes.start_time ASC"],
    )
    return next((maker for maker in makers if maker.info.run_id != run.info.run_id), None)


def _step(run: Run, before: Run | None) -> LineageStep:
    tags = run.data.tags
    scores = {name.removeprefix("best_"): value for name, value in run.data.metrics.items() if name.startswith("best_")}
    return LineageStep(
        kind=tags.get(Tag.KIND, "run"),
        stage=tags.get(Tag.STAGE, run.info.run_name),
        run_id=run.info.run_id,
        status=run.info.status,
        started=run.info.start_time,
        data_digest=tags.get(Tag.DATA_SHA256, ""),
        data=_data(run),
        came_from=_place(tags, Tag.FROM_PATH, Tag.FROM_RELATIVE, Tag.FROM_SHA256),
        checkpoint=_place(tags, Tag.CHECKPOINT_PATH, Tag.CHECKPOINT_RELATIVE, Tag.CHECKPOINT_SHA256),
        config_changes=_changes(before.data.params, run.data.params) if before is not None else {},
        seed=tags.get(Tag.SEED, ""),
        git_commit=tags.get(Tag.GIT_COMMIT, ""),
        git_dirty=tags.get(Tag.GIT_DIRTY, ""),
        python=tags.get(Tag.PYTHON, ""),
        versions=json.loads(tags.get(Tag.VERSIONS, "{}")),
        hardware=json.loads(tags.get(Tag.HARDWARE, "{}")),
        scores=dict(sorted(scores.items())),
        interrupted=tags.get(Tag.INTERRUPTED, ""),
    )


def _data(run: Run) -> tuple[DataUsed, ...]:
    used = []
    for each in run.inputs.dataset_inputs if run.inputs else ():
        context = next((tag.value for tag in each.tags if tag.key == "mlflow.data.context"), "")
        source, profile = json.loads(each.dataset.source or "{}"), json.loads(each.dataset.profile or "{}")
        sha256 = str(source.pop("sha256", each.dataset.digest))
        profile.pop("sha256", None)
        used.append(DataUsed(each.dataset.name, sha256, context, source, profile))
    return tuple(sorted(used, key=lambda data: (data.context, data.name)))


def _place(tags: Mapping[str, str], path: str, relative: str, sha256: str) -> CheckpointPlace | None:
    if not tags.get(path):
        return None
    return CheckpointPlace(tags[path], tags.get(relative, ""), tags.get(sha256, ""))


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    old, new = join_params(before), join_params(after)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: (old.get(key), new.get(key)) for key in keys}


def _digest_of(place: CheckpointPlace, storage: Path) -> tuple[str, str]:
    """Where the file is now and its sha256; an empty digest if it is nowhere."""
    if "://" in place.path:
        return place.path, _remote_digest(place.path)
    for path in (Path(place.path), *([storage / place.relative] if place.relative else [])):
        if path.is_file():
            return str(path), sha256_file(path)
    return place.path, ""


def _remote_digest(uri: str) -> str:
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(uri)
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return ""
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
