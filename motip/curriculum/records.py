"""Options of a curriculum run, stage records on disk, and the lock of a stage's folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from motip.config import Curriculum, Stage
from motip.errors import MotipError
from motip.lineage.driver_process import driver_is_alive, this_driver
from motip.storage.paths import (
    Location,
    absolute,
    create_folder,
    exclusive_lock,
    read_json,
    recorded_file,
    sha256,
    write_json,
)

FORMAT = 1
"""Part of every stage's identity; incremented when the meaning of a stage's inputs or outputs changes."""


@dataclass(frozen=True)
class Options:
    """How and where a curriculum runs.

    Attributes:
        data_root: folder or URI that source roots and relative weights are found under.
        storage: folder or URI for shards, checkpoints and the MLflow database.
        workers: training workers; 0 trains in this process without Ray.
        min_workers: training starts with this many workers and grows up to `workers`; None: exactly `workers`.
        strict: an undecodable image stops the conversion.
        config_path: path of the curriculum file, for messages and relative paths.
        until: name of the last stage to run, None for all.
    """

    data_root: str
    storage: str
    workers: int = 1
    min_workers: int | None = None
    strict: bool = False
    config_path: str = ""
    until: str | None = None


@dataclass(frozen=True)
class StageRecord:
    """A finished stage, as written to ``stage.json``; the next stage starts from its checkpoint.

    Attributes:
        skipped: found finished by this run, not trained by it.
        mlflow_synced: the result is recorded in MLflow; a process can be killed between writing the two.
    """

    stage: str
    inputs: str
    checkpoint: str
    sha256: str
    best_epoch: int
    step: int
    metrics: dict[str, float]
    run_id: str | None
    parent_sha256: str | None
    data_digest: str
    videos: int
    frames: int
    epochs: int
    seconds: float
    skipped: bool = False
    status: str = "finished"
    format: int = FORMAT
    transfer: dict[str, Any] = field(default_factory=dict)
    mlflow_synced: bool = True

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> StageRecord:
        """The record in a ``stage.json``; version 0.1 wrote ``mlflow_synced`` as ``told``."""
        values = dict(stored)
        if "told" in values:
            values["mlflow_synced"] = values.pop("told")
        return cls(**values)


def curriculum_folder(curriculum: Curriculum, options: Options) -> Location:
    """Folder of the files about all stages: list of stages, domain scores, report page."""
    return absolute(options.storage) / "curricula" / curriculum.name


def stage_folder(curriculum: Curriculum, stage: Stage, inputs: str, options: Options) -> Location:
    """Folder of a stage's checkpoints and records; each digest of inputs has its own.

    OUTPUTS_DIR (or OUTPUT_DIR) of the stage's configuration replaces the parent folder, relative to the storage.
    """
    chosen = stage.config.OUTPUTS_DIR or stage.config.OUTPUT_DIR
    storage = absolute(options.storage)
    base = storage / "curricula" / curriculum.name / stage.name if chosen is None else storage / chosen
    return base / inputs[:12]


def finished_record(folder: Location, inputs: str) -> StageRecord | None:
    """The record in a stage's folder if finished, with these inputs and an unchanged checkpoint; else None."""
    path = folder / "stage.json"
    if not path.is_file():
        return None
    stored = read_json(path)
    if stored.get("status") != "finished" or stored.get("inputs") != inputs or stored.get("format") != FORMAT:
        return None
    record = StageRecord.from_json({**stored, "skipped": True})
    checkpoint = recorded_file(record.checkpoint, folder)
    if not checkpoint.is_file() or sha256(checkpoint) != record.sha256:
        return None
    return replace(record, checkpoint=str(checkpoint))


class InUse(MotipError):
    """Another live process holds the lock of a stage or sweep.

    Attributes:
        parent_run_id: MLflow run of that process's curriculum.
    """

    parent_run_id = ""


def acquire_lock(
    path: Location, what: str, *, parent_run_id: str = "", inputs: str | None = None
) -> StageRecord | None:
    """Record this process as the driver of a stage or sweep, so that no second process writes to its folder.

    Args:
        path: its ``stage.json`` or ``sweep.json``, which holds the lock.
        what: "stage" or "sweep", for messages.
        parent_run_id: MLflow run of this process's curriculum.
        inputs: digest of a stage's inputs; None for a sweep: a finished sweep may be resumed.

    Returns:
        The record of the stage if it is already finished with these inputs; the lock is then not taken.

    Raises:
        InUse: another process of this machine holds the lock. Processes of other machines cannot be detected.
    """
    create_folder(path.parent)
    with exclusive_lock(path.parent / ".driver.lock", f"another start of this {what}"):
        stored = read_json(path) if path.is_file() else {}
        # Checked again under the file lock: another process may have finished the stage since the caller's check.
        done = None if inputs is None else finished_record(path.parent, inputs)
        if done is not None:
            return done
        driver = str(stored.get("driver", ""))
        if stored.get("status") == "running" and driver != this_driver() and driver_is_alive(driver):
            in_use = InUse(
                f"this {what} is running already, with the same inputs",
                where=path.parent,
                found=f"process {driver.split('/')[-2]} of this machine, which is alive",
                fix="wait for it or end it, then run the same command again; or use another --storage",
            )
            in_use.parent_run_id = str(stored.get("curriculum_run", ""))
            raise in_use
        write_json(path, {**stored, "status": "running", "driver": this_driver(), "curriculum_run": parent_run_id})
    return None


def release_lock(path: Location) -> None:
    """Give up the lock after a failure, so that other processes can take it while this one lives."""
    stored = read_json(path) if path.is_file() else {}
    if stored.get("driver") == this_driver():
        write_json(path, {key: value for key, value in stored.items() if key != "driver"})


def unfinished_run(folder: Location) -> str | None:
    """MLflow run of the interrupted attempt in a folder, if any, so that each stage has one run."""
    path = folder / "stage.json"
    if not path.is_file():
        return None
    run_id = read_json(path).get("run_id")
    return None if run_id is None else str(run_id)
