"""State of a stage in training: parts, position, epoch means."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from motip.config import Config
from motip.data.batch import ClipBatch
from motip.events import Event, Note
from motip.model import MOTIP
from motip.train.batch_sources import BatchSource
from motip.train.checkpoint_schedule import CheckpointSchedule
from motip.train.checkpoint_stores import CheckpointStore
from motip.train.collectives import ProcessGroup
from motip.train.optimizer import LearningRates
from motip.train.preemption import StopRequest
from motip.train.run_channel import RunChannel
from motip.train.stage_job import StageJob
from motip.train.step import StepLosses, TrainStep
from motip.train.timing import PARTS, StepClock


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
