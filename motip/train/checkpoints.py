"""Writing and storing checkpoints of epochs and of positions inside epochs, with one outcome on all ranks."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from motip.errors import MotipError
from motip.stage_folder import METRICS, epoch_file, epoch_folder, step_file, step_folder
from motip.storage.atomic import write_json_atomic
from motip.storage.paths import Location, upload
from motip.storage.retries import with_retries
from motip.train.state import Meter, Run
from motip.weights import save_checkpoint

STORE_FOR_S = 180.0
"""Time during which uploads to an object store are retried; rank 0's must stay below COLLECTIVE_TIMEOUT_S."""


def save_epoch(run: Run, epoch: int, metrics: dict[str, float]) -> Path | None:
    """Write checkpoint_<epoch>.pth and metrics.json of a finished epoch; returns the folder on rank 0.

    Raises:
        MotipError: on every rank, if rank 0 cannot write.
    """

    def write() -> Path:
        folder = run.store.folder(epoch_folder(epoch))
        _write(run, folder / epoch_file(epoch), epoch, {"epoch": epoch + 1, "step": 0}, metrics)
        # Written last: an epoch without this file is not finished.
        write_json_atomic(folder / METRICS, {"epoch": epoch, "step": run.global_step, "metrics": metrics})
        return folder

    folder = _write_on_rank_0(run, write)
    run.checkpoint_schedule.mark_saved(run.global_step)
    return folder


def save_step(run: Run, epoch: int, step: int, meter: Meter, wait: bool) -> None:
    """Save a position inside an epoch, between two optimiser steps; every rank calls it.

    Args:
        step: batches of the epoch trained so far.
        meter: its sums are part of the position, so that the epoch's means are those of an uninterrupted run.
        wait: return only when the checkpoint is in the storage; else it is uploaded in the background.

    Raises:
        MotipError: on every rank, if rank 0 cannot write. Earlier checkpoints are kept.
    """
    position = {"epoch": epoch, "step": step, "meter": meter.state_dict(run.comm)}

    def write() -> Path:
        folder = run.store.folder(step_folder(run.global_step))
        _write(run, folder / step_file(run.global_step), epoch - 1, position, {})
        return folder

    status = run.status
    run.status = f"{status}; writing the checkpoint"
    written = _write_on_rank_0(run, write)
    run.status = f"{status}; storing the checkpoint"
    run.store.step_done(run.global_step, written, wait)
    run.status = status
    run.checkpoint_schedule.mark_saved(run.global_step)


def store_folder(source: Path, target: Location, log_retry: Callable[[str], None]) -> None:
    """Copy a checkpoint's files into the storage, each atomically; the metrics come last and complete an epoch.

    Args:
        log_retry: called with a line for each transient failure that is retried.

    Raises:
        MotipError: the files cannot be stored; earlier checkpoints are untouched.
    """
    if isinstance(target, Path) and not target.parent.is_dir():
        raise MotipError(
            "the stage's folder does not exist on the node of this worker",
            where=target.parent,
            expected="one storage that all nodes share",
            fix="give --storage an s3:// address, or a folder that every node mounts at the same path",
        )
    try:
        for path in sorted(source.iterdir(), key=lambda path: path.name == METRICS):
            file = target / path.name
            with_retries(functools.partial(upload, path, file), f"storing {file}", STORE_FOR_S, log_retry)
    except (MotipError, OSError) as error:
        raise _cannot_save(target.name, error, target) from error


def _cannot_save(what: str, error: Exception, where: object) -> MotipError:
    """The error shown when a checkpoint cannot be written."""
    # "AWS Error" is replaced because Ray restarts the entire upload on that text.
    reason = str(error).splitlines()[0].replace("AWS Error", "error")
    return MotipError(
        f"the checkpoint {what} cannot be written: {reason}",
        where=error.where if isinstance(error, MotipError) else where,
        expected="a reachable storage with enough space for one checkpoint (weights, and twice that for the optimiser)",
        fix="free some space or choose another --storage, then run the same command again: the previous checkpoint "
        "is untouched and training resumes from it",
    )


def _write_on_rank_0(run: Run, write: Callable[[], Path]) -> Path | None:
    """Call ``write`` on rank 0; a failure raises on all ranks, so that none keeps waiting for rank 0."""
    folder: Path | None = None
    failure: MotipError | None = None
    if run.is_main:
        try:
            folder = write()
        except (MotipError, OSError, RuntimeError) as error:
            # torch's writer wraps errors of the file system in RuntimeError.
            if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|write", str(error)):
                raise
            failure = _cannot_save(f"at step {run.global_step}", error, f"stage {run.job.stage}")
    # `all_gather` has no fixed timeout: rank 0 may have spent a long time scoring before it writes.
    if not all(run.comm.all_gather(failure is None)):
        raise failure or MotipError(
            "rank 0 could not write its checkpoint", where=f"stage {run.job.stage}", fix="see the message of rank 0"
        )
    return folder


def _write(run: Run, path: Path, epoch: int, position: dict[str, Any], metrics: dict[str, float]) -> None:
    parent = run.job.parent
    save_checkpoint(
        path,
        model=run.model,
        classes=run.config.class_names,
        config=run.config.to_dict(),
        epoch=epoch,
        step=run.global_step,
        optimizer=run.optimizer,
        scheduler=run.rates,
        scaler=run.step.state_dict(),
        position={
            **position,
            "world": run.initial_world_size,
            # Clips of one optimiser step; a run resumed with another number of workers keeps it.
            "global_batch": run.config.BATCH_SIZE * run.config.ACCUMULATE_STEPS * run.initial_world_size,
            "clips": run.clips,
            "gathered": run.step.accumulated,
        },
        # Random generators have no state to save: their seeds follow from these values and the position.
        rng={"seed": run.config.SEED, "drawn_from": ["SEED", "epoch", "step"]},
        counters={name: float(value) for name, value in metrics.items() if name.startswith("steps_")},
        run_id=run.job.run_id,
        parent=None if parent is None else parent.to_dict(),
    )
