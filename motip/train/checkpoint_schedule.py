"""Checkpoint schedule inside an epoch: by steps, by minutes, or on a stop request."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from motip.config import Config
from motip.train.collectives import ProcessGroup

POLL_INTERVAL_S = 5.0
"""Between two polls of Ray and of the driver for a reason to stop; each poll delays all ranks a little."""


class CheckpointDecision(NamedTuple):
    """What all ranks do between two optimiser steps.

    Attributes:
        reason: why a checkpoint is saved: `""` (none), `interval`, or `stop` if a rank received a stop request.
        poll: all ranks poll for a preemption of their machines.
    """

    reason: str
    poll: bool


class CheckpointSchedule:
    """Decides between two optimiser steps whether to save; every rank calls `decide` and gets the same decision.

    Args:
        config: CHECKPOINT_EVERY_STEPS and CHECKPOINT_EVERY_MINUTES; whichever comes first.
        comm: the ranks. Minutes are measured by rank 0 alone.
        step: batches trained so far.
    """

    _last_poll = -math.inf

    def __init__(self, config: Config, comm: ProcessGroup, step: int = 0) -> None:
        self._every_steps = config.CHECKPOINT_EVERY_STEPS
        self._every_s = None if config.CHECKPOINT_EVERY_MINUTES is None else 60 * config.CHECKPOINT_EVERY_MINUTES
        self._comm = comm
        self.mark_saved(step)

    def time_to_poll(self) -> bool:
        """True on rank 0 once per `POLL_INTERVAL_S`, starting with the first call; False on the other ranks, which
        follow rank 0 through `decide`."""
        if self._comm.rank != 0 or time.monotonic() - self._last_poll < POLL_INTERVAL_S:
            return False
        self._last_poll = time.monotonic()
        return True

    def decide(self, step: int, stop_requested: bool, poll: bool = False) -> CheckpointDecision:
        """Combine the ranks' flags in one sum over the ranks.

        Args:
            step: batches trained so far.
            stop_requested: this rank received a stop request.
            poll: `time_to_poll` of this rank.
        """
        minutes_over = self._every_s is not None and time.monotonic() - self._time >= self._every_s
        flags = torch.tensor([float(stop_requested), float(minutes_over and self._comm.rank == 0), float(poll)])
        any_stop, any_minutes, any_poll = self._comm.sum_(flags).tolist()
        steps_over = self._every_steps is not None and step - self._step >= self._every_steps
        return CheckpointDecision(
            "stop" if any_stop else "interval" if any_minutes or steps_over else "", bool(any_poll)
        )

    def mark_saved(self, step: int) -> None:
        """Restart both counts at this step."""
        self._step, self._time = step, time.monotonic()
