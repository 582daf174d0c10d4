"""When a checkpoint is due inside an epoch, what it holds, and how all ranks come through writing it together."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from motip.config import Config
from motip.errors import MotipError
from motip.storage.atomic import write_json_atomic
from motip.storage.paths import Location, put
from motip.storage.retries import retried
from motip.train.collectives import Communicator
from motip.weights.pretrained import save_checkpoint

if TYPE_CHECKING:
    from motip.train.loop import Meter, Run


METRICS = "metrics.json"
STORE_FOR_S = 180.0
"""Patience with an object store that stumbles. The other ranks wait no longer than COLLECTIVE_TIMEOUT_S for rank 0."""
LOOK_EVERY_S = 5.0
"""Between two looks for a reason to stop that only Ray or the driver knows; each makes all ranks wait a little."""


class Due(NamedTuple):
    """What all ranks do between two optimiser steps.

    Attributes:
        reason: to save: `""`, `interval`, or `notice` where some rank was told to stop.
        look: ask whether the machine will be taken away.
    """

    reason: str
    look: bool


class Cadence:
    """Says between two optimiser steps whether to save; every rank asks equally often and hears the same.

    Args:
        config: CHECKPOINT_EVERY_STEPS and CHECKPOINT_EVERY_MINUTES; whichever comes first.
        comm: the ranks. Minutes are counted by rank 0, whose clock the others follow.
        step: batches taken so far.
    """

    _looked = -math.inf

    def __init__(self, config: Config, comm: Communicator, step: int = 0) -> None:
        self._every_steps = config.CHECKPOINT_EVERY_STEPS
        self._every_s = None if config.CHECKPOINT_EVERY_MINUTES is None else 60 * config.CHECKPOINT_EVERY_MINUTES
        self._comm = comm
        self.saved(step)

    def looks(self) -> bool:
        """True now and then on rank 0, which brings the others along through `due`; the first time at once."""
        if self._comm.rank != 0 or time.monotonic() - self._looked < LOOK_EVERY_S:
            return False
        self._looked = time.monotonic()
        return True

    def due(self, step: int, notice: bool, look: bool = False) -> Due:
        """One sum over the ranks for all that there is to know.

        Args:
            notice: this rank was told to stop.
            look: `looks` of this rank.
        """
        late = self._every_s is not None and time.monotonic() - self._time >= self._every_s
        asked = torch.tensor([float(notice), float(late and self._comm.rank == 0), float(look)])
        noticed, timed, looking = self._comm.sum_(asked).tolist()
        stepped = self._every_steps is not None and step - self._step >= self._every_steps
        return Due("notice" if noticed else "interval" if timed or stepped else "", bool(looking))

    def saved(self, step: int) -> None:
        """Count from here on."""
        self._step, self._time = step, time.monotonic()


def save_epoch(run: Run, epoch: int, metrics: dict[str, float]) -> Path | None:
    """Write checkpoint_<epoch>.pth and metrics.json of a finished epoch; returns the folder on rank 0.

    Raises:
        MotipError: on every rank, where rank 0 cannot write.
    """

    def write() -> Path:
        folder = run.reporter.folder(f"epoch_{epoch:03d}")
        _write(run, folder / f"checkpoint_{epoch}.pth", epoch, {"epoch": epoch + 1, "step": 0}, metrics)
        # Written last: an epoch without this file is not finished.
        write_json_atomic(folder / METRICS, {"epoch": epoch, "step": run.global_step, "metrics": metrics})
        return folder

    folder = _on_first_rank(run, write)
    run.cadence.saved(run.global_step)
    return folder


def save_step(run: Run, epoch: int, step: int, meter: Meter, wait: bool) -> None:
    """Save a position inside an epoch, between two optimiser steps; every rank calls it.

    Args:
        step: batches of the epoch that were taken.
        meter: its sums belong to the position: the epoch's means are those of an undisturbed run.
        wait: return only when the checkpoint lies in the storage; else it is uploaded meanwhile.

    Raises:
        MotipError: on every rank, where rank 0 cannot write. The checkpoints before are kept.
    """
    position = {"epoch": epoch, "step": step, "meter": meter.state_dict(run.comm)}

    def write() -> Path:
        folder = run.reporter.folder(f"step_{run.global_step:08d}")
        _write(run, folder / f"checkpoint_step_{run.global_step}.pth", epoch - 1, position, {})
        return folder

    place = run.where
    run.where = f"{place}; writing the checkpoint"
    written = _on_first_rank(run, write)
    run.where = f"{place}; storing the checkpoint"
    run.reporter.step_done(run.global_step, written, wait)
    run.where = place
    run.cadence.saved(run.global_step)


def store_folder(source: Path, target: Location, say: Callable[[str], None]) -> None:
    """Copy a checkpoint's files into the storage, each whole, its metrics last: they make an epoch a finished one.

    Args:
        say: hears of tries that failed for a passing reason.

    Raises:
        MotipError: it cannot be stored; the checkpoints before are untouched.
    """
    if isinstance(target, Path) and not target.parent.is_dir():
        raise MotipError(
            "the stage's folder is not to be seen from the node of this worker",
            where=target.parent,
            expected="one storage that all nodes share",
            fix="give --storage an s3:// address, or a folder that every node mounts at the same place",
        )
    try:
        for path in sorted(source.iterdir(), key=lambda path: path.name == METRICS):
            whole = target / path.name
            retried(functools.partial(put, path, whole), f"storing {whole}", STORE_FOR_S, say)
    except (MotipError, OSError) as error:
        raise cannot_save(target.name, error, target) from error


def cannot_save(what: str, error: Exception, where: object) -> MotipError:
    """What the user reads where a checkpoint cannot be written."""
    # Not in the S3 client's own words: Ray would take them for its cue to start the whole upload over.
    reason = str(error).splitlines()[0].replace("AWS Error", "error")
    return MotipError(
        f"the checkpoint {what} cannot be written: {reason}",
        where=error.where if isinstance(error, MotipError) else where,
        expected="a storage that answers, with room for a whole checkpoint (weights, and twice that for the optimiser)",
        fix="free some space or choose another --storage, then run the same command again: the checkpoint before "
        "is untouched and training goes on from it",
    )


def _on_first_rank(run: Run, write: Any) -> Path | None:
    """Let rank 0 write; a failure ends the training on all ranks instead of leaving the others waiting."""
    folder: Path | None = None
    failure: MotipError | None = None
    if run.leads:
        try:
            folder = write()
        except (MotipError, OSError) as error:
            failure = cannot_save(f"at step {run.global_step}", error, f"stage {run.job.stage}")
        except RuntimeError as error:
            # torch's own writer wraps what the file system says.
            if "PytorchStreamWriter" not in str(error) and "write" not in str(error):
                raise
            failure = cannot_save(f"at step {run.global_step}", error, f"stage {run.job.stage}")
    # By `gather`, which waits: rank 0 may have scored for long before it came to write, and nobody must give up on it.
    if not all(run.comm.gather(failure is None)):
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
            "world": run.first_world,
            # Of one optimiser step; a run that goes on with other workers keeps it.
            "global_batch": run.config.BATCH_SIZE * run.config.ACCUMULATE_STEPS * run.first_world,
            "clips": run.clips,
            "gathered": run.step.gathered,
        },
        # No generator has a past: what is random follows from these and the position.
        rng={"seed": run.config.SEED, "drawn_from": ["SEED", "epoch", "step"]},
        counters={name: float(value) for name, value in metrics.items() if name.startswith("steps_")},
        run_id=run.job.run_id,
        parent=None if parent is None else {"path": parent.path, "sha256": parent.sha256, "run_id": parent.run_id},
    )
