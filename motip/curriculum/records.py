"""What a curriculum run is told, and what it writes down of each finished stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motip.config import Curriculum, Stage
from motip.errors import MotipError
from motip.lineage.driver_process import driver_lives, this_driver
from motip.storage.paths import Location, location, one_at_a_time, read_json, require_folder, sha256, write_json

FORMAT = 1
"""Part of every stage's identity; raised when the meaning of a stage's inputs or outputs changes."""


@dataclass(frozen=True)
class Options:
    """How and where a curriculum runs.

    Attributes:
        data_root: folder or URI that source roots and relative weights are found under.
        storage: folder or URI for shards, checkpoints and the MLflow database.
        workers: training workers; 0 trains in this process without Ray.
        least_workers: with fewer the training waits, with `workers` it is complete; None: always `workers`.
        strict: undecodable images end the conversion.
        config_path: for messages.
        until: name of the last stage to run, None for all.
    """

    data_root: str
    storage: str
    workers: int = 1
    least_workers: int | None = None
    strict: bool = False
    config_path: str = ""
    until: str | None = None


@dataclass(frozen=True)
class StageRecord:
    """A finished stage, as written to ``stage.json``; it is what the next stage starts from.

    Attributes:
        told: whether MLflow has been told of the end; a process can be killed between the two.
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
    told: bool = True


def curriculum_folder(curriculum: Curriculum, options: Options) -> Location:
    """Where what belongs to all stages lies: the list of stages, the domains, the report page."""
    storage = location(options.storage)
    return (storage.resolve() if isinstance(storage, Path) else storage) / "curricula" / curriculum.name


def stage_folder(curriculum: Curriculum, stage: Stage, inputs: str, options: Options) -> Location:
    """Checkpoints and records of a stage with these inputs; other inputs, other folder.

    OUTPUTS_DIR (or OUTPUT_DIR) of the stage's configuration moves it elsewhere under the storage.
    """
    chosen = stage.config.OUTPUTS_DIR or stage.config.OUTPUT_DIR
    storage = location(options.storage)
    if isinstance(storage, Path):
        storage = storage.resolve()
    base = storage / "curricula" / curriculum.name / stage.name if chosen is None else storage / chosen
    return base / inputs[:12]


def finished_record(folder: Location, inputs: str) -> StageRecord | None:
    """The record of a stage that is finished, of these inputs, and whose checkpoint is still what it was."""
    path = folder / "stage.json"
    if not path.is_file():
        return None
    stored = read_json(path)
    if stored.get("status") != "finished" or stored.get("inputs") != inputs or stored.get("format") != FORMAT:
        return None
    record = StageRecord(**{**stored, "skipped": True})
    checkpoint = location(record.checkpoint)
    if not checkpoint.is_file() or sha256(checkpoint) != record.sha256:
        return None
    return record


class InUse(MotipError):
    """Another process is at the same work.

    Attributes:
        under: MLflow run of the curriculum that it works for.
    """

    under = ""


def claim(path: Location, what: str, *, under: str = "", inputs: str | None = None) -> StageRecord | None:
    """Make this process the driver of a stage or a sweep: two of them would write into one folder.

    Args:
        path: its ``stage.json`` or ``sweep.json``.
        what: the word for it.
        under: MLflow run of the curriculum that this process works for.
        inputs: of a stage; a sweep that is finished may be gone on with.

    Returns:
        The record of a stage that is finished, of these inputs: it is not claimed, and stays so.

    Raises:
        InUse: another process on this machine drives it now. One on another machine cannot be seen from here.
    """
    require_folder(path.parent)
    with one_at_a_time(path.parent / ".driver.lock", f"another start of this {what}"):
        stored = read_json(path) if path.is_file() else {}
        # Whoever looked before may have seen the stage in the hands of a process that has finished it since.
        done = None if inputs is None else finished_record(path.parent, inputs)
        if done is not None:
            return done
        driver = str(stored.get("driver", ""))
        if stored.get("status") == "running" and driver != this_driver() and driver_lives(driver):
            in_use = InUse(
                f"this {what} is running already, with the same inputs",
                where=path.parent,
                found=f"process {driver.split('/')[-2]} of this machine, which is alive",
                fix="wait for it or end it, then run the same command again; or use another --storage",
            )
            in_use.under = str(stored.get("curriculum_run", ""))
            raise in_use
        write_json(path, {**stored, "status": "running", "driver": this_driver(), "curriculum_run": under})
    return None


def release(path: Location) -> None:
    """Let others drive what this process failed at, also where it lives on."""
    stored = read_json(path) if path.is_file() else {}
    if stored.get("driver") == this_driver():
        write_json(path, {key: value for key, value in stored.items() if key != "driver"})


def unfinished_run(folder: Location) -> str | None:
    """The MLflow run of an attempt that was cut off, so that one stage has one run."""
    path = folder / "stage.json"
    if not path.is_file():
        return None
    run_id = read_json(path).get("run_id")
    return None if run_id is None else str(run_id)
