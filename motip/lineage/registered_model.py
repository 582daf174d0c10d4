"""Checkpoints as external MLflow models: path and sha256 are registered, the weights are not uploaded."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from motip.lineage.store import Store
from motip.lineage.tags import Tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

_REGISTERED = "motip-curriculum"
"""Name in the model registry; each stage has an alias."""


def alias_of(stage: str) -> str:
    """The registry alias of a stage: lower case, words joined by hyphens (``bdd-foundation``)."""
    return re.sub(r"[^a-z0-9_]+", "-", stage.lower()).strip("-")


def find_run(client: MlflowClient, run_id: str) -> Run | None:
    """The run, or None if it was deleted or is not in this database."""
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def latest_model(client: MlflowClient, run_id: str | None) -> str:
    """Id of the last model a run registered, "" if there is none or the run is gone."""
    run = find_run(client, run_id) if run_id else None
    return str(run.data.tags.get(Tag.MODEL, "")) if run is not None else ""


def register(store: Store, run_id: str, uri: str, sha256: str, step: int) -> None:
    """Register the checkpoint as a model of the run, a version of the registered model and the stage's alias.

    Idempotent: a repeated call completes an interrupted one and creates no second model.
    """
    from mlflow.entities import LoggedModelOutput

    client = store.client()
    run = client.get_run(run_id)
    stage = run.data.tags.get(Tag.STAGE, run.info.run_name)
    models = client.search_logged_models([store.experiment_id], filter_string=f"source_run_id = '{run_id}'")
    model = next((each for each in models if each.params.get("sha256") == sha256), None)
    if model is None:
        model = client.create_logged_model(
            store.experiment_id,
            name=alias_of(stage),
            source_run_id=run_id,
            params={"uri": uri, "sha256": sha256},
            tags={"mlflow.model.isExternal": "true", Tag.STAGE: stage},
            model_type="motip-checkpoint",
        )
    _complete(client, model)
    client.set_tag(run_id, Tag.MODEL, model.model_id)
    outputs = {output.model_id for output in run.outputs.model_outputs} if run.outputs else set()
    if model.model_id not in outputs:
        client.log_outputs(run_id, [LoggedModelOutput(model_id=model.model_id, step=step)])
    _set_alias(store, client, run_id, stage, model, sha256)


def _complete(client: MlflowClient, model: LoggedModel) -> None:
    """The rest of ``mlflow.create_external_model``, which would use MLflow's global tracking address."""
    from mlflow.models.utils import get_external_mlflow_model_spec

    if model.status == "READY":
        return
    with tempfile.TemporaryDirectory() as folder:
        get_external_mlflow_model_spec(model).save(str(Path(folder) / "MLmodel"))
        client.log_model_artifacts(model.model_id, folder)
    client.finalize_logged_model(model.model_id, "READY")


def _set_alias(store: Store, client: MlflowClient, run_id: str, stage: str, model: LoggedModel, sha256: str) -> None:
    try:
        client.create_registered_model(_REGISTERED, description="Best checkpoint of every stage, by alias")
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{_REGISTERED}' and run_id = '{run_id}'")
    version = next((each for each in versions if each.tags.get("sha256") == sha256), None)
    if version is None:
        # Without a server, MLflow resolves models:/ through its global address, which is never set here.
        source = f"models:/{model.model_id}" if store.is_server else model.artifact_location
        version = client.create_model_version(
            _REGISTERED, source, run_id, tags={"stage": stage, "sha256": sha256}, model_id=model.model_id
        )
    client.set_registered_model_alias(_REGISTERED, alias_of(stage), version.version)
