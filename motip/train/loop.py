"""Epoch loop of a stage on one worker: training, validation, checkpoints and scores."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import numpy as np
import torch

from motip.config import Config
from motip.data.batch import ClipBatch
from motip.data.host_memory import keep_freed_memory
from motip.evaluation.validation import score_videos, track_videos
from motip.events import EpochDone, Scored, StepLogged, WeightsTransferred
from motip.tracking.settings import TrackerSettings
from motip.train.batch_sources import BatchSource
from motip.train.checkpoint_stores import CheckpointStore
from motip.train.checkpoints import save_epoch, save_step
from motip.train.collectives import ProcessGroup
from motip.train.optimizer import GROUP_NAMES, LearningRates, build_optimizer
from motip.train.preemption import Stopped
from motip.train.run_channel import RunChannel
from motip.train.setup import build_model_for, restore_optimizer
from motip.train.stage_job import StageJob
from motip.train.state import Meter, Run, time_split
from motip.train.step import TrainStep
from motip.train.timing import Interval, memory_gib
from motip.train.watchdog import Watchdog
from motip.weights import load_checkpoint

_log = logging.getLogger(__name__)


def train_stage_on_worker(
    job: StageJob,
    comm: ProcessGroup,
    batch_source: BatchSource,
    channel: RunChannel,
    store: CheckpointStore,
    device: torch.device,
) -> None:
    """Train a stage from its parent's weights, or from the newest checkpoint of an interrupted attempt.

    Raises:
        MotipError: weights, data or configuration do not fit together.
        Stopped: a stop was requested; the position is saved.
        WorkerLost: another rank died or hangs. If this rank hangs, its process exits.
    """
    config = Config.from_dict(job.config)
    if device.type == "cpu":
        keep_freed_memory()
    watchdog = Watchdog(comm, channel, config.COLLECTIVE_TIMEOUT_S, config.PROGRESS_TIMEOUT_S)
    with watchdog.monitored():
        run, first_epoch = _prepare(job, config, watchdog, batch_source, channel, store, device)
        watchdog.status = lambda: run.status
        with run.stop_request:
            for epoch in range(first_epoch, config.EPOCHS):
                _finish_epoch(run, epoch, train_epoch(run, epoch))


def _finish_epoch(run: Run, epoch: int, metrics: dict[str, float]) -> None:
    """Validate, save and report an epoch as the configuration requires.

    Raises:
        Stopped: a stop was requested; the epoch is saved.
    """
    config, stage = run.config, run.job.stage
    evaluated = (epoch + 1) % config.EVALUATE_EVERY_EPOCHS == 0 or epoch == config.EPOCHS - 1
    if evaluated:
        run.status = f"stage {stage}, validation after epoch {epoch + 1}"
        metrics |= validate(run, epoch)
    run.status = f"stage {stage}, after epoch {epoch + 1}"
    save = (epoch + 1) % config.SAVE_CHECKPOINT_PER_EPOCH == 0 or evaluated  # a score needs its weights
    save = save or _stop_requested(run)
    run.send(EpochDone(epoch, run.global_step, dict(metrics)))
    run.store.epoch_done(epoch, metrics, save_epoch(run, epoch, metrics) if save else None)
    begin = time.monotonic()
    if save and _stop_requested(run):  # during validation or saving
        _log_saved(run, f"stop request (SIGTERM): epoch {epoch + 1} saved", begin)
        raise Stopped


def train_epoch(run: Run, epoch: int) -> dict[str, float]:
    """Train all batches of one epoch; returns the epoch's means.

    The last accumulation of the epoch may be incomplete; its gradients are divided by the batches it has.
    """
    # Position: a resumed run enters its epoch in the middle.
    config, steps = run.config, run.batch_source.plan(epoch).steps
    run.model.train()
    meter, start = Meter.resumed(run.first_meter, run.is_main), run.first_step
    run.first_step, run.first_meter = 0, None
    interval = Interval(meter.sums_so_far())
    recent_norms: dict[str, float] = {}
    # A position at the end of an epoch has no batches left.
    batches = timed(run.batch_source.batches(epoch, start), meter) if start < steps else iter(())
    for index, batch in enumerate(batches, start):
        group = index % config.ACCUMULATE_STEPS
        divisor = min(config.ACCUMULATE_STEPS, steps - (index - group))
        rates = run.rates.set(epoch, index)
        run.status = f"stage {run.job.stage}, epoch {epoch + 1}, step {index + 1}/{steps}, {'; '.join(batch.names)}"
        # Micro-step, and the optimiser step at the end of an accumulation.
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
        # Events: skipped clips, and the step record at the logging interval.
        for line in losses.skip_reports:
            run.note(f"epoch {epoch + 1}, step {index + 1}: clips skipped: {line}")
        if (index + 1) % config.LOG_EVERY_STEPS == 0 or index == steps - 1:
            values = losses.values | recent_norms | dict(zip(_RATES, rates, strict=True))
            metrics = _step_metrics(run, meter, interval) | {f"step/{name}": value for name, value in values.items()}
            run.send(StepLogged(epoch, index, steps, run.global_step, metrics))
            recent_norms = {}
        if group == divisor - 1:
            _save_if_due(run, epoch, index + 1, meter)
    # Epoch metrics: counts per rank are summed over ranks.
    beyond = run.comm.sum_(torch.tensor([float(meter.distractors), float(meter.without_slot)])).tolist()
    overflow = dict(zip(("distractors", "objects_without_id_slot"), beyond, strict=True))
    return {
        **meter.means(),
        **overflow,
        **_skip_counts(run.step),
        **{f"plan/{name}": float(count) for name, count in run.batch_source.plan(epoch).counts.items()},
    }


def validate(run: Run, epoch: int) -> dict[str, float]:
    """Track the stage's validation videos, divided among the ranks, and score them on rank 0.

    Returns:
        the scores as metrics on rank 0, an empty dictionary on the other ranks.
    """
    run.model.eval()
    begin = time.perf_counter()
    job, config, status = run.job, run.config, run.status
    mine = job.val[run.comm.rank :: run.comm.world_size]
    notes: set[str] = set()

    def progress(what: str) -> None:
        # A changed status is progress to the watchdogs of all ranks.
        run.status = f"{status}, {what}"

    # Every rank tracks its videos.
    tracked = track_videos(
        run.model,
        mine,
        job.storage,
        TrackerSettings.from_config(config),
        on_video=lambda _, result: notes.update(result.notes),
        on_frame=lambda video, number: progress(f"{video.source}/{video.video}, frame {number} tracked"),
    )
    progress("its videos are tracked")
    parts = run.comm.all_gather((tracked, notes))
    if not run.is_main:
        return {}
    # Rank 0 scores all videos.
    scores = score_videos(
        job.val,
        {key: rows for own, _ in parts for key, rows in own.items()},
        job.storage,
        job.class_maps(config),
        job.protocols,
        config.val_config.SPLIT_TO_EVAL,
        averaged=config.val_config.CLASSES_TO_EVAL,
        notes=sorted(set().union(*(rank_notes for _, rank_notes in parts))),
        on_video=lambda source, name: progress(f"scoring {source}/{name}"),
    )
    progress("scored")
    run.send(Scored(epoch, run.global_step, scores.to_json()))
    return {**scores.flat(), "time/validation_s": time.perf_counter() - begin}


def timed(batches: Iterator[ClipBatch], meter: Meter) -> Iterator[ClipBatch]:
    """Yield the batches, adding the time spent waiting for each to the meter."""
    while True:
        begin = time.perf_counter()
        batch = next(batches, None)
        meter.waited += time.perf_counter() - begin
        if batch is None:
            return
        yield batch


def frame_order(seed: int, epoch: int, step: int) -> torch.Generator:
    """Generator of the frame permutation at a step: the same on all ranks and after a resume."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 1_000_003 + step)


def network_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Seed of dropout at a step. Derived from the position alone, so a resumed run needs no saved generator state."""
    return int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _save_if_due(run: Run, epoch: int, step: int, meter: Meter) -> None:
    """Save the position between two optimiser steps if the schedule, a stop request or a preemption requires it.

    Raises:
        Stopped: a stop was requested; the position is saved.
    """
    poll = run.checkpoint_schedule.time_to_poll()
    if poll and run.channel.stop_requested():
        run.stop_request.request()
    requested = run.stop_request.requested
    reason, poll = run.checkpoint_schedule.decide(run.global_step, requested, poll)
    preemption = run.store.preemption() if poll else ""
    if preemption and preemption != run.last_preemption:
        run.stop_request.start_deadline()
        reason, run.last_preemption = "stop", preemption
    else:
        preemption = ""  # none, or one that already has its checkpoint
    if not reason:
        return
    begin = time.monotonic()
    meter.read(run.step.clock)
    save_step(run, epoch, step, meter, wait=reason == "stop")
    if reason != "stop":
        return
    _log_saved(run, f"stop request ({preemption or 'SIGTERM'}): epoch {epoch + 1}, step {step} saved", begin)
    # A preemption alone does not end the training: it continues until the machine is gone.
    if run.comm.sum_(torch.tensor([float(requested)])).item():
        raise Stopped


def _stop_requested(run: Run) -> bool:
    """Whether any rank, or the driver, requested a stop."""
    if run.is_main and run.channel.stop_requested():
        run.stop_request.request()
    # `all_gather` instead of a sum: rank 0 may score and store for longer than the timeout of a sum.
    return any(run.comm.all_gather(run.stop_request.requested))


def _log_saved(run: Run, what: str, begin: float) -> None:
    text = f"{what} {run.stop_request.elapsed() or f'in {time.monotonic() - begin:.1f} s'}"
    _log.warning(text)
    run.note(text)


def _skip_counts(step: TrainStep) -> dict[str, float]:
    """Counts of the stage so far: out-of-memory fallbacks, skipped batches and clips, and gradient-norm spikes."""
    counters = step.counters
    counts = {
        "clips_skipped": counters.clips_left_out,
        "memory/fallback_retries": counters.lowered,
        "memory/batches_skipped": counters.out_of_memory,
        "nonfinite/losses": counters.nonfinite_losses,
        "nonfinite/gradients": counters.nonfinite_gradients,
        "nonfinite/gradient_jumps": counters.gradient_jumps,
    }
    counts |= {f"memory/clips_skipped_objects_{name}": n for name, n in sorted(counters.skipped_objects.items())}
    return {name: float(count) for name, count in counts.items()}


def _prepare(
    job: StageJob,
    config: Config,
    comm: ProcessGroup,
    batch_source: BatchSource,
    channel: RunChannel,
    store: CheckpointStore,
    device: torch.device,
) -> tuple[Run, int]:
    """Build the run from the newest checkpoint or the parent's weights; returns it and the first epoch to train."""
    # Checkpoint of an earlier attempt, and its world size.
    with store.newest() as resumed_from:
        stored = load_checkpoint(resumed_from) if resumed_from is not None else None
    stored_world_size = ((stored or {}).get("position") or {}).get("world")
    initial_world_size = int(stored_world_size or channel.initial_world_size(comm.world_size))
    batch_source.set_initial_world_size(initial_world_size)
    # Model, optimiser and schedule.
    model, transfer = build_model_for(job, config, stored)
    model.to(device)
    optimizer = build_optimizer(model, config)
    run = Run(
        job=job,
        config=config,
        comm=comm,
        batch_source=batch_source,
        channel=channel,
        store=store,
        device=device,
        model=model,
        optimizer=optimizer,
        rates=LearningRates(optimizer, config, batch_source.plan(0).steps),
        step=TrainStep(model, config, comm),
        initial_world_size=initial_world_size,
    )
    first_epoch = restore_optimizer(run, stored)
    run.checkpoint_schedule.mark_saved(run.global_step)
    # Events and log.
    if initial_world_size != comm.world_size:
        clips = -(-initial_world_size * config.BATCH_SIZE // comm.world_size)
        run.note(
            f"resumed with {comm.world_size} workers; the run began with {initial_world_size} and keeps their global "
            f"batches: each worker now trains {clips} clips per batch instead of {config.BATCH_SIZE}"
        )
    if transfer is not None:
        run.send(WeightsTransferred({"summary": transfer.summary_line(), **transfer.to_dict()}))
    if stored is not None:
        _log.info("stage %s resumes at epoch %d, step %d from %s", job.stage, first_epoch, run.first_step, resumed_from)
    return run, first_epoch


_RATES = tuple(f"lr/{name}" for name in GROUP_NAMES)


def _step_metrics(run: Run, meter: Meter, interval: Interval) -> dict[str, float]:
    """Means over the steps since the last record (speed and waiting: over the epoch), and the skipped clips so far."""
    meter.read(run.step.clock)
    memory = memory_gib(run.device)
    meter.memory_gib = max(meter.memory_gib, memory)
    growth, means = interval.since(meter.sums_so_far()), meter.means()
    return {
        "step/clips_per_s": means["clips_per_s"],
        "step/wait_share": means["time/wait_share"],
        "step/objects_per_clip": growth["objects"] / max(growth["clips"], 1),
        "step/memory_gib": memory,
        "step/clips_skipped": float(run.step.counters.clips_left_out),
        **{f"step/time/{name}": value for name, value in time_split(growth).items()},
    }
