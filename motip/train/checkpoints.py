"""When a checkpoint is due inside an epoch, what it holds, and how all ranks come through writing it together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from motip.config import Config
from motip.errors import MotipError
from motip.files import write_json_atomic
from motip.model.weights import save_checkpoint
from motip.train.communicate import Communicator

if TYPE_CHECKING:
    from motip.train.loop import Meter, Run


class Cadence:
    """Says between two optimiser steps whether to save; every rank asks equally often and hears the same.

    Args:
        config: CHECKPOINT_EVERY_STEPS and CHECKPOINT_EVERY_MINUTES; whichever comes first.
        comm: the ranks. Minutes are counted by rank 0, whose clock the others follow.
        step: batches taken so far.
    """

    def __init__(self, config: Config, comm: Communicator, step: int = 0) -> None:
        self._every_steps = config.CHECKPOINT_EVERY_STEPS
        self._every_s = None if config.CHECKPOINT_EVERY_MINUTES is None else 60 * config.CHECKPOINT_EVERY_MINUTES
        self._comm = comm
        self.saved(step)

    def due(self, step: int, notice: bool) -> str:
        """`""`, `interval`, or `notice` where some rank was told that it will be taken away."""
        late = self._every_s is not None and time.monotonic() - self._time >= self._every_s
        asked = torch.tensor([float(notice), float(late and self._comm.rank == 0)])
        noticed, timed = self._comm.sum_(asked).tolist()
        if noticed:
            return "notice"
        stepped = self._every_steps is not None and step - self._step >= self._every_steps
        return "interval" if timed or stepped else ""

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
        write_json_atomic(folder / "metrics.json", {"epoch": epoch, "step": run.global_step, "metrics": metrics})
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

    run.reporter.step_done(run.global_step, _on_first_rank(run, write), wait)
    run.cadence.saved(run.global_step)


def _on_first_rank(run: Run, write: Any) -> Path | None:
    """Let rank 0 write; a failure ends the training on all ranks instead of leaving the others waiting."""
    folder: Path | None = None
    failure: MotipError | None = None
    if run.leads:
        try:
            folder = write()
        except (MotipError, OSError) as error:
            failure = _cannot_save(run, error)
        except RuntimeError as error:
            # torch's own writer wraps what the file system says.
            if "PytorchStreamWriter" not in str(error) and "write" not in str(error):
                raise
            failure = _cannot_save(run, error)
    # Not `all_agree`: rank 0 may have scored for long before it came to write, and the others must not give up on it.
    if not all(run.comm.gather(failure is None)):
        raise failure or MotipError(
            "rank 0 could not write its checkpoint", where=f"stage {run.job.stage}", fix="see the message of rank 0"
        )
    return folder


def _cannot_save(run: Run, error: Exception) -> MotipError:
    return MotipError(
        f"the checkpoint at step {run.global_step} cannot be written: {str(error).splitlines()[0]}",
        where=error.where if isinstance(error, MotipError) else f"stage {run.job.stage}",
        expected="free space for a whole checkpoint (weights, and twice that for the optimiser)",
        fix="free some space or choose another --storage, then run the same command again: the checkpoint before "
        "is untouched and training goes on from it",
    )


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
