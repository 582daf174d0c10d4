"""State of a stage in training: parts, position, epoch means; interfaces to batches, checkpoints and events."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from motip.config import Config
from motip.data.batch import ClipBatch
from motip.events import Event, Note
from motip.model import MOTIP
from motip.train.checkpoint_schedule import CheckpointSchedule
from motip.train.collectives import ProcessGroup
from motip.train.optimizer import LearningRates
from motip.train.preemption import StopRequest
from motip.train.run_channel import RunChannel
from motip.train.stage_job import StageJob
from motip.train.step import StepLosses, TrainStep
from motip.train.timing import PARTS, StepClock


class BatchSource(Protocol):
    """Batches of one rank."""

    def steps(self, epoch: int) -> int:
        """Batches of one rank in an epoch; equal on all ranks."""
        ...

    def counts(self, epoch: int) -> dict[str, int]:
        """Clips that the clip plan of an epoch dropped or repeated, by reason."""
        ...

    def batches(self, epoch: int, start_step: int) -> Iterator[ClipBatch]:
        """This rank's batches from ``start_step`` on."""
        ...

    def set_initial_world_size(self, initial_world_size: int) -> None:
        """Keep the global batches of a run that began with this many ranks; called before any other method."""
        ...


class CheckpointStore(Protocol):
    """Where a training's checkpoints are; independent of Ray."""

    def newest(self) -> contextlib.AbstractContextManager[Path | None]:
        """The newest checkpoint file of an interrupted run, or None; readable inside the block."""
        ...

    def folder(self, name: str) -> Path:
        """A local folder for the files of a checkpoint; called on rank 0 only."""
        ...

    def step_done(self, step: int, folder: Path | None, wait: bool) -> None:
        """Store a checkpoint inside an epoch and drop the oldest; every rank calls it, rank 0 with the folder."""
        ...

    def epoch_done(self, epoch: int, metrics: dict[str, float], folder: Path | None) -> None:
        """Store an epoch; every rank calls it, rank 0 with the folder if a checkpoint was saved."""
        ...

    def preemption(self) -> str:
        """Why this machine will be preempted, or "". Every rank calls it equally often and gets the same answer."""
        ...


@dataclass
class Run:
    """A stage in training: its parts and its position."""

    job: StageJob
    config: Config
    comm: ProcessGroup
    batch_source: BatchSource
    channel: RunChannel
    store: CheckpointStore
    device: torch.device
    model: MOTIP
    optimizer: torch.optim.Optimizer
    rates: LearningRates
    step: TrainStep
    global_step: int = 0
    clips: int = 0
    """Clips trained so far, over all ranks."""
    first_step: int = 0
    """Step at which a resumed run enters its epoch; reset to 0 after the first use."""
    first_meter: dict[str, Any] | None = None
    """Sums of the epoch's first part in a resumed run; reset to None after the first use."""
    initial_world_size: int = 1
    """Ranks at the start of the run; their global batches are kept when the number of ranks changes."""
    last_preemption: str = ""
    """The preemption notice of Ray for which a checkpoint was saved."""
    status: str = "before the first step"
    """Stage, epoch, step and clips, for messages; a text that changes is progress."""
    stop_request: StopRequest = field(init=False)
    checkpoint_schedule: CheckpointSchedule = field(init=False)

    def __post_init__(self) -> None:
        self.stop_request = StopRequest(lambda: self.status)
        self.checkpoint_schedule = CheckpointSchedule(self.config, self.comm)

    @property
    def is_main(self) -> bool:
        return self.comm.rank == 0

    def send(self, event: Event) -> None:
        """Append an event to the run's log, from rank 0."""
        if self.is_main:
            self.channel.send(event)

    def note(self, text: str) -> None:
        """Record a line of text in the history of the run."""
        self.send(Note(text, self.global_step))


@dataclass
class Meter:
    """Running means of an epoch, and the split of its time. The field names are keys of a checkpoint's position."""

    begin: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    """Seconds spent waiting for batches."""
    clips: int = 0
    objects: float = 0.0
    steps: int = 0
    skipped: int = 0
    memory_gib: float = 0.0
    """Largest value of the epoch's step records."""
    distractors: int = 0
    without_slot: int = 0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    norms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    """Per part of the steps, up to the last `read`."""

    def count(self, batch: ClipBatch) -> None:
        """Count the objects of this rank's clips that exceed the ID vocabulary."""
        self.distractors += batch.distractors
        self.without_slot += batch.dropped

    def add(self, losses: StepLosses, norms: dict[str, float]) -> None:
        self.steps += 1
        self.clips += losses.clips
        self.objects += losses.objects
        self.skipped += losses.skipped
        if not losses.skipped:
            for name, value in losses.values.items():
                self.sums[name] += value
        for name, value in norms.items():
            self.norms[name].append(value)

    def read(self, clock: StepClock) -> None:
        """Add the seconds measured by the step's clock; waits for the device."""
        for name, seconds in clock.take().items():
            self.seconds[name] += seconds

    def sums_so_far(self) -> dict[str, float]:
        """Values that grow from step to step: counts, and seconds of each part of the time. `other` is the remaining
        time: checks, waiting for other workers between the parts, and saving."""
        measured = {"wait": self.waited, **self.seconds}
        elapsed = time.perf_counter() - self.begin
        counts = {"steps": self.steps, "clips": self.clips, "objects": self.objects}
        return counts | measured | {"other": elapsed - sum(measured.values())}

    @staticmethod
    def resumed(state: dict[str, Any] | None, is_main: bool) -> Meter:
        """A new meter, or one with the sums of the epoch's first part."""
        if state is None:
            return Meter()
        state = {**state, "begin": time.perf_counter() - state["begin"]}
        if not is_main:  # counts per rank were summed over ranks; rank 0 alone continues them
            state |= {"distractors": 0, "without_slot": 0}
        meter = Meter(**state)
        meter.sums, meter.norms = defaultdict(float, meter.sums), defaultdict(list, meter.norms)
        return meter

    def state_dict(self, comm: ProcessGroup) -> dict[str, Any]:
        """All fields as plain values, `begin` as elapsed seconds; every rank calls it."""
        own = torch.tensor([float(self.distractors), float(self.without_slot)])
        distractors, without_slot = comm.sum_(own).tolist()
        state = {each.name: getattr(self, each.name) for each in fields(self)}
        return state | {
            "begin": time.perf_counter() - self.begin,
            "distractors": int(distractors),
            "without_slot": int(without_slot),
            "sums": dict(self.sums),
            "norms": dict(self.norms),
            "seconds": dict(self.seconds),
        }

    def means(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.begin, 1e-9)
        trained = max(self.steps - self.skipped, 1)
        means = {f"train/{name}": value / trained for name, value in self.sums.items()}
        means |= {f"train/{name}": sum(values) / len(values) for name, values in self.norms.items()}
        means |= {
            "clips_per_s": self.clips / seconds,
            "objects_per_clip": self.objects / max(self.clips, 1),
            "time/wait_share": self.waited / seconds,
            "time/epoch_s": seconds,
            "steps_skipped": float(self.skipped),
            "device/memory_gib": self.memory_gib,
        }
        return means | {f"time/{name}": value for name, value in time_split(self.sums_so_far()).items()}


def time_split(sums: dict[str, float]) -> dict[str, float]:
    """Mean seconds per step of each part of the time, from `Meter.sums_so_far` or its growth."""
    steps = max(sums["steps"], 1)
    # Device time and host time are not synchronised, so the remainder can be slightly below zero.
    return {f"{name}_s": max(0.0, sums[name] / steps) for name in ("wait", *PARTS, "other")}
