"""The epochs of one stage, the same with one process or many: batches in, checkpoints and scores out."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from motip.config import Config
from motip.data.batch import ClipBatch
from motip.errors import MotipError
from motip.evaluate.validation import score_videos, track_videos
from motip.model import MOTIP
from motip.track.settings import TrackerSettings
from motip.train.checkpoints import Cadence, save_epoch, save_step
from motip.train.collectives import Communicator
from motip.train.host_memory import keep_freed_memory
from motip.train.optimizer import GROUP_NAMES, LearningRates, build_optimizer
from motip.train.preemption import Notice, Stopped
from motip.train.setup import build_model_for, restore_optimizer
from motip.train.stage_job import Feed, StageJob
from motip.train.step import StepLosses, TrainStep
from motip.train.timing import PARTS, Interval, StepClock, memory_gib
from motip.train.watchdog import Watched, WorkerLost
from motip.weights.pretrained import load_checkpoint

_log = logging.getLogger(__name__)


class Reporter(Protocol):
    """Where a stage's results go; the loop knows neither Ray nor MLflow."""

    def latest(self) -> Path | None:
        """The checkpoint file an interrupted run left, or None."""
        ...

    def loaded(self) -> None:
        """What `latest` named has been read by this rank."""
        ...

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Something worth showing or storing; called on rank 0 only."""
        ...

    def folder(self, name: str) -> Path:
        """A local folder to write the files of a checkpoint into; called on rank 0 only."""
        ...

    def step_done(self, step: int, folder: Path | None, wait: bool) -> None:
        """Hand over a checkpoint inside an epoch and drop the oldest; every rank calls it, rank 0 gives the folder."""
        ...

    def began_with(self, world: int) -> int:
        """Ranks of the first attempt, where an attempt before this one left no checkpoint; else ``world``."""
        ...

    def notice(self) -> str:
        """Why this machine will be taken away, or nothing. Every rank calls it equally often, and hears the same."""
        ...

    def lost(self, problem: MotipError) -> None:
        """This attempt ends because a rank died or hangs; any rank may call it, from any thread."""
        ...

    def asked_to_stop(self) -> bool:
        """True where whoever started the training wants it to end; called on rank 0 only."""
        ...

    def epoch_done(self, epoch: int, metrics: dict[str, float], folder: Path | None) -> None:
        """Hand over an epoch; every rank calls it, ``folder`` is given by rank 0 where a checkpoint was saved."""
        ...


@dataclass
class Run:
    """The live parts of a stage in training."""

    job: StageJob
    config: Config
    comm: Communicator
    feed: Feed
    reporter: Reporter
    device: torch.device
    model: MOTIP
    optimizer: torch.optim.Optimizer
    rates: LearningRates
    step: TrainStep
    global_step: int = 0
    clips: int = 0
    """Clips learnt from so far, over all ranks."""
    first_step: int = 0
    """Where in its epoch a resumed run goes on, with these sums of the epoch's first part; then 0 and None."""
    first_meter: dict[str, Any] | None = None
    first_world: int = 1
    """Ranks that the run began with; their batches are kept whatever the number of ranks is now."""
    noticed: str = ""
    where: str = "before the first step"
    notice: Notice = field(init=False)
    cadence: Cadence = field(init=False)

    def __post_init__(self) -> None:
        self.notice = Notice(lambda: self.where)
        self.cadence = Cadence(self.config, self.comm)

    @property
    def leads(self) -> bool:
        return self.comm.rank == 0

    def record(self, kind: str, values: dict[str, Any]) -> None:
        if self.leads:
            self.reporter.record(kind, values)

    def note(self, text: str) -> None:
        """Something in words that belongs to the history of the run."""
        self.record("note", {"step": self.global_step, "text": text})


def run_stage(job: StageJob, comm: Communicator, feed: Feed, reporter: Reporter, device: torch.device) -> None:
    """Train a stage from its parent's weights, or from where an earlier attempt was cut off.

    Raises:
        MotipError: weights, data or configuration do not fit together.
        Stopped: it was told to end; its position is saved.
        WorkerLost: another rank died or hangs. Where this one hangs itself, its process ends.
    """
    config = Config.from_dict(job.config)
    if device.type == "cpu":
        keep_freed_memory()
    watched = Watched(comm, config.COLLECTIVE_TIMEOUT_S, config.PROGRESS_TIMEOUT_S)
    with watched.guarded(reporter.lost):
        try:
            _train_stage(job, config, watched, feed, reporter, device)
        except WorkerLost as lost:
            reporter.lost(lost.problem)
            raise


def _train_stage(
    job: StageJob, config: Config, comm: Watched, feed: Feed, reporter: Reporter, device: torch.device
) -> None:
    run, first_epoch = _prepare(job, config, comm, feed, reporter, device)
    comm.where = lambda: run.where
    with run.notice:
        for epoch in range(first_epoch, config.EPOCHS):
            last = epoch == config.EPOCHS - 1
            metrics = train_epoch(run, epoch)
            evaluated = (epoch + 1) % config.EVALUATE_EVERY_EPOCHS == 0 or last
            if evaluated:
                run.where = f"stage {job.stage}, validation after epoch {epoch + 1}"
                metrics |= validate(run, epoch)
            run.where = f"stage {job.stage}, after epoch {epoch + 1}"
            save = (epoch + 1) % config.SAVE_CHECKPOINT_PER_EPOCH == 0 or evaluated  # a score needs its weights
            save = save or _told_to_stop(run)
            run.record("epoch", {"epoch": epoch, "step": run.global_step, "metrics": metrics})
            reporter.epoch_done(epoch, metrics, save_epoch(run, epoch, metrics) if save else None)
            if save:
                _stop_where_told(run, epoch)


def train_epoch(run: Run, epoch: int) -> dict[str, float]:
    """All batches of one epoch; returns the epoch's means.

    The tail of the epoch that does not fill an accumulation is used, divided by the batches it has.
    """
    config, steps = run.config, run.feed.steps(epoch)
    run.model.train()
    meter, start = Meter.resumed(run.first_meter, run.leads), run.first_step
    run.first_step, run.first_meter = 0, None
    interval = Interval(meter.sums_so_far())
    recent_norms: dict[str, float] = {}
    # A position at the end of an epoch has no batches left.
    batches = timed(run.feed.batches(epoch, start), meter) if start < steps else iter(())
    for index, batch in enumerate(batches, start):
        group = index % config.ACCUMULATE_STEPS
        divisor = min(config.ACCUMULATE_STEPS, steps - (index - group))
        rates = run.rates.set(epoch, index)
        run.where = f"stage {run.job.stage}, epoch {epoch + 1}, step {index + 1}/{steps}, {'; '.join(batch.names)}"
        meter.count(batch)
        losses = run.step.accumulate(
            batch,
            generator=frame_order(config.SEED, epoch, index),
            divisor=divisor,
            seed=network_seed(config.SEED, epoch, index, run.comm.rank),
        )
        norms = run.step.apply(run.optimizer) if group == divisor - 1 else {}
        run.global_step += 1
        run.clips += 0 if losses.skipped else losses.clips
        meter.add(losses, norms)
        recent_norms = norms or recent_norms
        for line in losses.left_out:
            run.note(f"epoch {epoch + 1}, step {index + 1}: clips left out: {line}")
        if (index + 1) % config.LOG_EVERY_STEPS == 0 or index == steps - 1:
            values = losses.values | recent_norms | dict(zip(_RATES, rates, strict=True))
            metrics = _step_metrics(run, meter, interval) | {f"step/{name}": value for name, value in values.items()}
            position = {"epoch": epoch, "index": index, "of": steps, "step": run.global_step}
            run.record("step", {**position, "metrics": metrics})
            recent_norms = {}
        if group == divisor - 1:
            _save_where_due(run, epoch, index + 1, meter)
    beyond = run.comm.sum_(torch.tensor([float(meter.distractors), float(meter.without_slot)])).tolist()
    overflow = dict(zip(("distractors", "objects_without_id_slot"), beyond, strict=True))
    return {
        **meter.means(),
        **overflow,
        **_left_out_counts(run.step),
        **{f"plan/{name}": float(count) for name, count in run.feed.counts(epoch).items()},
    }


def validate(run: Run, epoch: int) -> dict[str, float]:
    """Track the stage's validation videos, shared among the ranks, and score them on rank 0; others get no metrics."""
    run.model.eval()
    begin = time.perf_counter()
    job, config, place = run.job, run.config, run.where
    mine = job.val[run.comm.rank :: run.comm.world_size]
    notes: set[str] = set()

    def at(what: str) -> None:
        # Others see by the text that it changes: this rank does not hang.
        run.where = f"{place}, {what}"

    tracked = track_videos(
        run.model,
        mine,
        job.storage,
        TrackerSettings.from_config(config),
        on_video=lambda _, result: notes.update(result.notes),
        on_frame=lambda video, number: at(f"{video.source}/{video.video}, frame {number} tracked"),
    )
    at("its videos are tracked")
    parts = run.comm.gather((tracked, notes))
    if not run.leads:
        return {}
    scores = score_videos(
        job.val,
        {key: rows for own, _ in parts for key, rows in own.items()},
        job.storage,
        job.class_maps(config),
        job.protocols,
        config.val_config.SPLIT_TO_EVAL,
        averaged=config.val_config.CLASSES_TO_EVAL,
        notes=sorted(set().union(*(said for _, said in parts))),
        on_video=lambda source, name: at(f"scoring {source}/{name}"),
    )
    at("scored")
    run.record("scores", {"epoch": epoch, "step": run.global_step, "scores": scores.to_json()})
    return {**scores.flat(), "time/validation_s": time.perf_counter() - begin}


@dataclass
class Meter:
    """Running means of an epoch, and where its time went."""

    begin: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    clips: int = 0
    objects: float = 0.0
    steps: int = 0
    skipped: int = 0
    memory_gib: float = 0.0
    """The most that a step record has told."""
    distractors: int = 0
    without_slot: int = 0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    norms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    """Of the steps' parts, up to the last reading of the clock."""

    def count(self, batch: ClipBatch) -> None:
        """What this rank's clips hold beyond the ID vocabulary."""
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
        """Take over what the step's clock has measured; waits for the device."""
        for name, seconds in clock.take().items():
            self.seconds[name] += seconds

    def sums_so_far(self) -> dict[str, float]:
        """What grows from step to step: counts, and seconds of each part of the time. `other` is what is left of it:
        checks, waiting for other workers between the parts, and saving."""
        known = {"wait": self.waited, **self.seconds}
        elapsed = time.perf_counter() - self.begin
        counts = {"steps": self.steps, "clips": self.clips, "objects": self.objects}
        return counts | known | {"other": elapsed - sum(known.values())}

    @staticmethod
    def resumed(state: dict[str, Any] | None, leads: bool) -> Meter:
        """A new meter, or one that goes on with the sums of an epoch's first part."""
        if state is None:
            return Meter()
        state = {**state, "begin": time.perf_counter() - state["begin"]}
        if not leads:  # what is counted by rank was added up for rank 0
            state |= {"distractors": 0, "without_slot": 0}
        meter = Meter(**state)
        meter.sums, meter.norms = defaultdict(float, meter.sums), defaultdict(list, meter.norms)
        return meter

    def state_dict(self, comm: Communicator) -> dict[str, Any]:
        """Everything as plain values, `begin` as seconds so far; every rank calls it."""
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
        counted = max(self.steps - self.skipped, 1)
        means = {f"train/{name}": value / counted for name, value in self.sums.items()}
        means |= {f"train/{name}": sum(values) / len(values) for name, values in self.norms.items()}
        means |= {
            "clips_per_s": self.clips / seconds,
            "objects_per_clip": self.objects / max(self.clips, 1),
            "time/wait_share": self.waited / seconds,
            "time/epoch_s": seconds,
            "steps_skipped": float(self.skipped),
            "device/memory_gib": self.memory_gib,
        }
        return means | {f"time/{name}": value for name, value in _time_split(self.sums_so_far()).items()}


def timed(batches: Iterator[ClipBatch], meter: Meter) -> Iterator[ClipBatch]:
    """Pass batches on, adding the time spent waiting for each to the meter."""
    while True:
        begin = time.perf_counter()
        batch = next(batches, None)
        meter.waited += time.perf_counter() - begin
        if batch is None:
            return
        yield batch


def frame_order(seed: int, epoch: int, step: int) -> torch.Generator:
    """The draw of which frames get gradient: the same on all ranks, and the same after a resume."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 1_000_003 + step)


def network_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Seed of what is random inside the network at a step: a resumed run has no other past to remember."""
    return int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _save_where_due(run: Run, epoch: int, step: int, meter: Meter) -> None:
    """Save the position between two optimiser steps where it is time, or where the machine will be taken away.

    Raises:
        Stopped: this process was told to end; its position is saved.
    """
    look = run.cadence.looks()
    if look and run.reporter.asked_to_stop():
        run.notice.give()
    signalled = run.notice.given
    reason, look = run.cadence.due(run.global_step, signalled, look)
    told = run.reporter.notice() if look else ""
    if told and told != run.noticed:
        run.notice.heard()
        reason, run.noticed = "notice", told
    else:
        told = ""
    if not reason:
        return
    begin = time.monotonic()
    meter.read(run.step.clock)
    save_step(run, epoch, step, meter, wait=reason == "notice")
    if reason != "notice":
        return
    _say_saved(run, f"notice to stop ({told or 'SIGTERM'}): epoch {epoch + 1}, step {step} saved", begin)
    if run.comm.sum_(torch.tensor([float(signalled)])).item():
        raise Stopped


def _stop_where_told(run: Run, epoch: int) -> None:
    """End after an epoch that was saved, where some rank was told to while it was validated or saved.

    Raises:
        Stopped: so it was.
    """
    begin = time.monotonic()
    if _told_to_stop(run):
        _say_saved(run, f"notice to stop (SIGTERM): epoch {epoch + 1} saved", begin)
        raise Stopped


def _told_to_stop(run: Run) -> bool:
    """Asks all ranks, and rank 0 also whoever started the training."""
    if run.leads and run.reporter.asked_to_stop():
        run.notice.give()
    # Not a sum: rank 0 may have scored and stored for long, and the others must not give up on it.
    return any(run.comm.gather(run.notice.given))


def _say_saved(run: Run, what: str, begin: float) -> None:
    text = f"{what} {run.notice.committed() or f'in {time.monotonic() - begin:.1f} s'}"
    _log.warning(text)
    run.note(text)


def _left_out_counts(step: TrainStep) -> dict[str, float]:
    """Of the stage so far: clips that took a lower rung, and clips left out, by objects in their fullest frame."""
    counters = step.counters
    counts = {
        "clips_skipped": counters.clips_left_out,
        "memory/rungs_lowered": counters.lowered,
        "memory/batches_left_out": counters.out_of_memory,
        "nonfinite/losses": counters.nonfinite_losses,
        "nonfinite/gradients": counters.nonfinite_gradients,
        "nonfinite/gradient_jumps": counters.gradient_jumps,
    }
    counts |= {f"memory/clips_left_out_objects_{name}": n for name, n in sorted(counters.skipped_objects.items())}
    return {name: float(count) for name, count in counts.items()}


def _prepare(
    job: StageJob, config: Config, comm: Communicator, feed: Feed, reporter: Reporter, device: torch.device
) -> tuple[Run, int]:
    resumed_from = reporter.latest()
    stored = load_checkpoint(resumed_from) if resumed_from is not None else None
    reporter.loaded()
    stored_world = ((stored or {}).get("position") or {}).get("world")
    first_world = int(stored_world or reporter.began_with(comm.world_size))
    feed.started_with(first_world)
    model, transfer = build_model_for(job, config, stored)
    model.to(device)
    optimizer = build_optimizer(model, config)
    rates = LearningRates(optimizer, config, feed.steps(0))
    step = TrainStep(model, config, comm)
    run = Run(job, config, comm, feed, reporter, device, model, optimizer, rates, step, first_world=first_world)
    first_epoch = restore_optimizer(run, stored)
    run.cadence.saved(run.global_step)
    if first_world != comm.world_size:
        clips = -(-first_world * config.BATCH_SIZE // comm.world_size)
        run.note(
            f"goes on with {comm.world_size} workers; it began with {first_world}, whose batches it keeps: each worker "
            f"now takes {clips} clips at once instead of {config.BATCH_SIZE}"
        )
    if transfer is not None:
        run.record("transfer", {"summary": transfer.summary_line(), **transfer.to_dict()})
    if stored is not None:
        _log.info("stage %s goes on at epoch %d, step %d from %s", job.stage, first_epoch, run.first_step, resumed_from)
    return run, first_epoch


_RATES = tuple(f"lr/{name}" for name in GROUP_NAMES)


def _step_metrics(run: Run, meter: Meter, interval: Interval) -> dict[str, float]:
    """Means over the steps since the last record (speed and waiting: over the epoch), and what was skipped so far."""
    meter.read(run.step.clock)
    memory = memory_gib(run.device)
    meter.memory_gib = max(meter.memory_gib, memory)
    grown, means = interval.since(meter.sums_so_far()), meter.means()
    return {
        "step/clips_per_s": means["clips_per_s"],
        "step/wait_share": means["time/wait_share"],
        "step/objects_per_clip": grown["objects"] / max(grown["clips"], 1),
        "step/memory_gib": memory,
        "step/clips_skipped": float(run.step.counters.clips_left_out),
        **{f"step/time/{name}": value for name, value in _time_split(grown).items()},
    }


def _time_split(sums: dict[str, float]) -> dict[str, float]:
    """Mean seconds per step of each part of the time."""
    steps = max(sums["steps"], 1)
    # The device's clock and the host's do not start together: what is left can come out just below nothing.
    return {f"{name}_s": max(0.0, sums[name] / steps) for name in ("wait", *PARTS, "other")}
