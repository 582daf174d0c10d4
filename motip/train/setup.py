"""Initial model and optimiser state of a stage, from a checkpoint, the parent's weights or fresh initialisation."""

from __future__ import annotations

from typing import Any

import torch

from motip.config import Config
from motip.errors import MotipError
from motip.model import MOTIP, ModelSpec, build_model
from motip.model.initialisation import init_copy_id_decoder, init_grid_queries
from motip.storage.paths import local_copy, location
from motip.train.optimizer import load_optimizer
from motip.train.stage_job import StageJob
from motip.train.state import Run
from motip.weights import TransferReport, apply_transfer, load_checkpoint, plan_transfer, read_weights


def fresh_model(config: Config) -> MOTIP:
    """A freshly initialised model, reproducible by SEED, with the optional initialisations of the configuration."""
    torch.manual_seed(config.SEED)
    model = build_model(ModelSpec.from_config(config))
    if config.INIT_GRID_QUERIES:
        init_grid_queries(model)
    if config.INIT_COPY_ID_DECODER and not config.ONLY_DETR:
        init_copy_id_decoder(model)
    return model


def build_model_for(
    job: StageJob, config: Config, stored: dict[str, Any] | None
) -> tuple[MOTIP, TransferReport | None]:
    """The stage's model: the stored weights of a resumed run, else its parent's weights transferred by name.

    Returns:
        the model on the CPU, and the transfer report (None for a resumed or freshly initialised model).

    Raises:
        MotipError: the parent's weights are missing, damaged or incompatible; nothing is loaded then.
    """
    model = fresh_model(config)
    if stored is not None:
        model.load_state_dict(stored["model"])
        return model, None
    if job.parent is None:
        return model, None
    weights = read_weights(local_copy(location(job.parent.path)), classes=config.PRETRAIN_CLASSES)
    if weights.sha256 != job.parent.sha256:
        raise MotipError(
            "the parent checkpoint has changed since the stage was planned",
            where=job.parent.path,
            found=f"sha256 {weights.sha256[:12]}",
            expected=job.parent.sha256[:12],
            fix="run the curriculum again: the stage is planned again from the current file",
        )
    plan = plan_transfer(
        weights,
        model.spec,
        config.class_names,
        new_class_from=config.CLASS_INIT,
        allow=config.PRETRAIN_ALLOW,
        skip=config.PRETRAIN_SKIP,
    )
    return model, apply_transfer(model, plan)


def restore_optimizer(run: Run, stored: dict[str, Any] | None) -> int:
    """Restore optimiser, schedule, loss scale and position; returns the first epoch to train.

    An interrupted stage resumes with all of them. A stage that starts from its parent's weights has a fresh optimiser:
    the parent's moments belong to another objective. Only for a given weights file written by the same configuration
    (a run extended by hand) RESUME_OPTIMIZER loads its moments, and RESUME_SCHEDULER its epoch.

    Raises:
        MotipError: no epoch is left to train with RESUME_SCHEDULER.
    """
    if stored is not None:
        load_optimizer(run.optimizer, stored["optimizer"])
        run.rates.load_state_dict(stored["scheduler"])
        run.step.load_state_dict(stored["scaler"])
        run.global_step = int(stored["step"])
        position = stored["position"]
        run.first_step, run.first_meter = int(position["step"]), position.get("meter")
        run.clips = int(position.get("clips", 0))
        return int(position["epoch"])
    resume = run.config.RESUME_OPTIMIZER, run.config.RESUME_SCHEDULER
    if run.job.parent is not None and run.job.parent.stage is None and any(resume):
        return _extend(run, run.job.parent.path, *resume)
    return 0


def _extend(run: Run, path: str, optimizer: bool, scheduler: bool) -> int:
    given = load_checkpoint(local_copy(location(path)))
    if (given.get("config") or {}).get("_name") != run.config.name:
        return 0
    if optimizer and given.get("optimizer"):
        load_optimizer(run.optimizer, given["optimizer"])
        run.note(f"optimiser moments loaded from {path}")
    if not scheduler:
        return 0
    first = int(given["epoch"]) + 1
    if first >= run.config.EPOCHS:
        raise MotipError(
            "the given checkpoint has trained all epochs of this configuration",
            where=path,
            found=f"epoch {first} of {run.config.EPOCHS}",
            fix="raise EPOCHS to continue, or set RESUME_SCHEDULER: False to train all epochs again from its weights",
        )
    run.note(f"resumed at epoch {first + 1} of {run.config.EPOCHS}, after the last epoch of {path}")
    return first
