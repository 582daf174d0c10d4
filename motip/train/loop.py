"""The epochs of one stage, the same with one process or many: batches in, checkpoints and scores out."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from motip.config import Config
from motip.data.batch import ClipBatch
from motip.evaluate.validation import score_videos, track_videos
from motip.files import write_json_atomic
from motip.model import MOTIP
from motip.model.weights import load_checkpoint, save_checkpoint
from motip.track.settings import TrackerSettings
from motip.train.build import build_model_for, restore_optimizer
from motip.train.communicate import Communicator, gather_objects
from motip.train.job import Feed, StageJob
from motip.train.optimizer import LearningRates, build_optimizer
from motip.train.step import StepLosses, TrainStep

_log = logging.getLogger(__name__)


class Reporter(Protocol):
    """Where a stage's results go; the loop knows neither Ray nor MLflow."""

    def latest(self) -> Path | None:
        """The checkpoint file an interrupted run left, or None."""
        ...

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Something worth showing or storing; called on rank 0 only."""
        ...

    def folder(self, epoch: int) -> Path:
        """A local folder to write the epoch's files into."""
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

    @property
    def leads(self) -> bool:
        return self.comm.rank == 0

    def record(self, kind: str, values: dict[str, Any]) -> None:
        if self.leads:
            self.reporter.record(kind, values)


def run_stage(job: StageJob, comm: Communicator, feed: Feed, reporter: Reporter, device: torch.device) -> None:
    """Train a stage from its parent's weights, or from where an earlier attempt was cut off.

    Raises:
        MotipError: weights, data or configuration do not fit together.
    """
    config = Config.from_dict(job.config)
    run, first_epoch = _prepare(job, config, comm, feed, reporter, device)
    for epoch in range(first_epoch, config.EPOCHS):
        last = epoch == config.EPOCHS - 1
        metrics = train_epoch(run, epoch)
        evaluated = last or (epoch + 1) % config.EVALUATE_EVERY_EPOCHS == 0
        if evaluated:
            metrics |= validate(run, epoch)
        save = (epoch + 1) % config.SAVE_CHECKPOINT_PER_EPOCH == 0 or evaluated  # a score needs its weights
        run.record("epoch", {"epoch": epoch, "step": run.global_step, "metrics": metrics})
        reporter.epoch_done(epoch, metrics, _save(run, epoch, metrics) if save and run.leads else None)


def train_epoch(run: Run, epoch: int) -> dict[str, float]:
    """All batches of one epoch; returns the epoch's means.

    The tail of the epoch that does not fill an accumulation is used, divided by the batches it has.
    """
    config, steps = run.config, run.feed.steps(epoch)
    run.model.train()
    meter = Meter()
    batches = timed(run.feed.batches(epoch, 0), meter)
    for index, batch in enumerate(batches):
        group = index % config.ACCUMULATE_STEPS
        divisor = min(config.ACCUMULATE_STEPS, steps - (index - group))
        rates = run.rates.set(epoch, index)
        losses = run.step.accumulate(batch, generator=frame_order(config.SEED, epoch, index), divisor=divisor)
        norms = run.step.apply(run.optimizer) if group == divisor - 1 else {}
        run.global_step += 1
        meter.add(losses, norms)
        if (index + 1) % config.LOG_EVERY_STEPS == 0 or index == steps - 1:
            run.record("step", _step_record(run, epoch, index, steps, losses, norms, rates, meter))
    return {**meter.means(), **{f"plan/{name}": float(count) for name, count in run.feed.counts(epoch).items()}}


def validate(run: Run, epoch: int) -> dict[str, float]:
    """Track the stage's validation videos, shared among the ranks, and score them on rank 0; others get no metrics."""
    run.model.eval()
    begin = time.perf_counter()
    job, config = run.job, run.config
    mine = job.val[run.comm.rank :: run.comm.world_size]
    notes: set[str] = set()
    tracked = track_videos(
        run.model, mine, job.storage, TrackerSettings.from_config(config), lambda _, result: notes.update(result.notes)
    )
    parts = gather_objects(run.comm, (tracked, notes))
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
    )
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
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    norms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

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
        }
        return means


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


def _prepare(
    job: StageJob, config: Config, comm: Communicator, feed: Feed, reporter: Reporter, device: torch.device
) -> tuple[Run, int]:
    resumed_from = reporter.latest()
    stored = load_checkpoint(resumed_from) if resumed_from is not None else None
    model, transfer = build_model_for(job, config, stored)
    model.to(device)
    optimizer = build_optimizer(model, config)
    rates = LearningRates(optimizer, config, feed.steps(0))
    step = TrainStep(model, config, comm)
    run = Run(job, config, comm, feed, reporter, device, model, optimizer, rates, step)
    first_epoch = restore_optimizer(run, stored)
    if transfer is not None:
        run.record("transfer", {"summary": transfer.summary_line(), **transfer.to_dict()})
    if stored is not None:
        _log.info("stage %s goes on at epoch %d from %s", job.stage, first_epoch, resumed_from)
    return run, first_epoch


def _save(run: Run, epoch: int, metrics: dict[str, float]) -> Path:
    """Write checkpoint_<epoch>.pth and metrics.json into the reporter's folder; returns the folder."""
    folder = run.reporter.folder(epoch)
    parent = run.job.parent
    save_checkpoint(
        folder / f"checkpoint_{epoch}.pth",
        model=run.model,
        classes=run.config.class_names,
        config=run.config.to_dict(),
        epoch=epoch,
        step=run.global_step,
        optimizer=run.optimizer,
        scheduler=run.rates,
        scaler=run.step.state_dict(),
        position={"epoch": epoch + 1, "step": 0},
        counters={name: float(value) for name, value in metrics.items() if name.startswith("steps_")},
        run_id=run.job.run_id,
        parent=None if parent is None else {"path": parent.path, "sha256": parent.sha256, "run_id": parent.run_id},
    )
    write_json_atomic(folder / "metrics.json", {"epoch": epoch, "step": run.global_step, "metrics": metrics})
    return folder


def _step_record(
    run: Run,
    epoch: int,
    index: int,
    steps: int,
    losses: StepLosses,
    norms: dict[str, float],
    rates: list[float],
    meter: Meter,
) -> dict[str, Any]:
    means = meter.means()
    metrics = {f"step/{name}": value for name, value in {**losses.values, **norms}.items()}
    metrics |= {f"step/lr_{number}": rate for number, rate in enumerate(rates)}
    metrics |= {"step/clips_per_s": means["clips_per_s"], "step/wait_share": means["time/wait_share"]}
    if run.device.type == "cuda":
        metrics["step/memory_gb"] = torch.cuda.max_memory_allocated(run.device) / 2**30
    return {"epoch": epoch, "index": index, "of": steps, "step": run.global_step, "metrics": metrics}
