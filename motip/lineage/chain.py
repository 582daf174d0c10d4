"""Reads runs back from MLflow: the chain of steps behind a run, and the scores of its epochs."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motip.errors import MotipError
from motip.lineage.record_file import SUFFIX, parse_record
from motip.lineage.steps import CheckpointLocation, DataUsed, LineageStep, changes
from motip.lineage.tags import Tag, join_params

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from motip.lineage.store import Store

_DOMAIN_PREFIX = "R/"
"""Prefix of a stage's scores by domain: ``R/<domain>``; a second slash begins a class."""


@dataclass(frozen=True)
class RunScores:
    """Scores recorded in a stage's run.

    Attributes:
        files: file name -> JSON of every file under ``scores/``.
        best: ``best_`` metrics without the prefix; empty while the stage runs.
    """

    stage: str
    run_id: str
    files: dict[str, Any]
    best: dict[str, float]


def checkpoint_location(checkpoint: Path | str, storage: Path) -> CheckpointLocation:
    """Location to record: absolute, and relative to the storage so that the storage can be moved."""
    if "://" in str(checkpoint):
        return CheckpointLocation(str(checkpoint), "")
    path = Path(checkpoint).expanduser().resolve()
    return CheckpointLocation(str(path), str(path.relative_to(storage)) if path.is_relative_to(storage) else "")


def read_chain(store: Store, run_id: str) -> list[LineageStep]:
    """The chain of steps that led to ``run_id``, oldest first.

    The steps before the first recorded run come from the lineage record beside its weights, as stored in that run.

    Args:
        run_id: run of a stage, or of a curriculum, which means its last stage.

    Raises:
        MotipError: no such run, a curriculum without stages, a cyclic chain.
    """
    client = store.client()
    run: Run | None = stage_run(store, client, run_id)
    steps: list[LineageStep] = []
    seen: set[str] = set()
    while run is not None:
        if run.info.run_id in seen:
            raise MotipError(
                "the lineage is cyclic", where=f"run {run.info.run_id}", fix="restore the changed tags of this run"
            )
        seen.add(run.info.run_id)
        before = _run_before(store, client, run)
        earlier = _given_weights(run) if before is None else []
        known = [step.config for step in earlier if step.config]
        config = before.data.params if before is not None else known[-1] if known else {}
        steps.append(_step(run, _own_params(config)))
        steps += earlier[::-1]
        run = before
    return steps[::-1]


def curriculum_of(store: Store, run_id: str) -> str:
    """Curriculum name recorded in a run or its parent run; MotipError if there is none."""
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
    """The run, or for a curriculum's run that of its last stage; MotipError if there is none."""
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


def read_recorded_scores(store: Store, run_id: str) -> RunScores:
    """Scores of a stage's run, or of the last stage of a curriculum's run.

    Raises:
        MotipError: no such run, or a run without scored epochs.
    """
    client = store.client()
    run = stage_run(store, client, run_id)
    own = run.info.run_id
    names = [each.path for each in client.list_artifacts(own, "scores") if each.path.endswith(".json")]
    if not names:
        raise MotipError(
            "this run has no scores",
            where=f"run {own}",
            expected="scores/epoch_<n>.json among its artifacts",
            fix="wait until its first epoch is scored, or name another run",
        )
    files = {}
    with tempfile.TemporaryDirectory(prefix="motip-") as folder:
        for name in names:
            files[Path(name).name] = json.loads(Path(client.download_artifacts(own, name, folder)).read_text())
    best = {name.removeprefix("best_"): value for name, value in run.data.metrics.items() if name.startswith("best_")}
    return RunScores(run.data.tags.get(Tag.STAGE, ""), own, files, best)


def _run_before(store: Store, client: MlflowClient, run: Run) -> Run | None:
    """The run that wrote the weights this run started from, found by id, else by the digest of the weights."""
    tags = run.data.tags
    if tags.get(Tag.FROM_RUN):
        try:
            return client.get_run(tags[Tag.FROM_RUN])
        except Exception as error:
            # The run was purged from the database; the digest may still match a copy of it.
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise
    if not re.fullmatch(r"[0-9a-f]{64}", tags.get(Tag.FROM_SHA256, "")):
        return None
    makers = client.search_runs(
        [run.info.experiment_id],
        f"tags.`{Tag.CHECKPOINT_SHA256}` = '{tags[Tag.FROM_SHA256]}'",
        order_by=["attributes.start_time DESC"],
    )
    return next((maker for maker in makers if maker.info.run_id != run.info.run_id), None)


def _given_weights(run: Run) -> list[LineageStep]:
    """Steps before a run that started from a given file: those of its lineage record, else the file alone."""
    tags = run.data.tags
    location = _location(tags, Tag.FROM_PATH, Tag.FROM_RELATIVE, Tag.FROM_SHA256)
    if location is None:
        return []
    record = join_params({key: value for key, value in tags.items() if key.startswith(Tag.FROM_RECORD)})
    if record:
        name = f"{Path(location.path).stem}{SUFFIX}"
        steps = parse_record(json.loads(record[Tag.FROM_RECORD]), location.sha256, name)
        return [*steps[:-1], replace(steps[-1], checkpoint=location)]
    return [LineageStep("weights", Path(location.path).stem, checkpoint=location)]


def _step(run: Run, config_before: Mapping[str, str]) -> LineageStep:
    tags, metrics = run.data.tags, run.data.metrics
    scores = {name.removeprefix("best_"): value for name, value in metrics.items() if name.startswith("best_")}
    domains = {name.removeprefix(_DOMAIN_PREFIX): value for name, value in metrics.items() if _is_domain(name)}
    config = _own_params(run.data.params)
    return LineageStep(
        kind=tags.get(Tag.KIND, "run"),
        stage=tags.get(Tag.STAGE, run.info.run_name),
        run_id=run.info.run_id,
        status=run.info.status,
        started=run.info.start_time,
        data_digest=tags.get(Tag.DATA_SHA256, ""),
        data=_data(run),
        came_from=_location(tags, Tag.FROM_PATH, Tag.FROM_RELATIVE, Tag.FROM_SHA256),
        checkpoint=_location(tags, Tag.CHECKPOINT_PATH, Tag.CHECKPOINT_RELATIVE, Tag.CHECKPOINT_SHA256),
        config=config,
        config_changes=changes(config_before, config),
        seed=tags.get(Tag.SEED, ""),
        git_commit=tags.get(Tag.GIT_COMMIT, ""),
        git_dirty=tags.get(Tag.GIT_DIRTY, ""),
        python=tags.get(Tag.PYTHON, ""),
        versions=json.loads(tags.get(Tag.VERSIONS, "{}")),
        hardware=json.loads(tags.get(Tag.HARDWARE, "{}")),
        scores=dict(sorted(scores.items())),
        domains=dict(sorted(domains.items())),
        interrupted=tags.get(Tag.INTERRUPTED, ""),
    )


def _is_domain(metric: str) -> bool:
    return metric.startswith(_DOMAIN_PREFIX) and metric.count("/") == 1


def _own_params(params: Mapping[str, str]) -> dict[str, str]:
    """Parameters that are configuration keys, long values joined."""
    return {key: value for key, value in join_params(params).items() if not key.startswith("_")}


def _data(run: Run) -> tuple[DataUsed, ...]:
    used = []
    for each in run.inputs.dataset_inputs if run.inputs else ():
        context = next((tag.value for tag in each.tags if tag.key == "mlflow.data.context"), "")
        source, profile = json.loads(each.dataset.source or "{}"), json.loads(each.dataset.profile or "{}")
        sha256 = str(source.pop("sha256", each.dataset.digest))
        profile.pop("sha256", None)
        used.append(DataUsed(each.dataset.name, sha256, context, source, profile))
    return tuple(sorted(used, key=lambda data: (data.context, data.name)))


def _location(tags: Mapping[str, str], path: str, relative: str, sha256: str) -> CheckpointLocation | None:
    if not tags.get(path):
        return None
    return CheckpointLocation(tags[path], tags.get(relative, ""), tags.get(sha256, ""))
