"""Batches of a training worker: loaded in the worker's process, or by Ray Data actors."""

from __future__ import annotations

from collections.abc import Iterator

from motip.config import Config
from motip.data.batch import ClipBatch
from motip.data.clip_loader import ClipLoader, local_batches
from motip.data.clips import ClipPlan, ClipRef, rank_rows
from motip.data.stream import clip_dataset, iterate
from motip.train.stage_job import EpochPlans, StageJob


class BatchSource:
    """Batches of one rank, decoded by its Ray Data actors, or by the worker itself without actors (NUM_WORKERS 0).

    The actors live for several epochs, so that short epochs do not wait for their start, and decode ahead during
    validation.
    """

    ROWS_PER_DATASET = 8192
    """Number of clips after which the actors are restarted."""

    def __init__(
        self,
        job: StageJob,
        config: Config,
        rank: int = 0,
        world_size: int = 1,
        actors: int = 0,
        actor_cpus: float = 0.0,
    ) -> None:
        self._job, self._config = job, config
        self._rank, self._world_size = rank, world_size
        self._actors, self._actor_cpus, self._prefetch = actors, actor_cpus, config.PREFETCH_FACTOR
        self._plans = EpochPlans(job, config, world_size)
        self._loader = ClipLoader(config, job.class_maps(config), job.storage)
        self._stream: Iterator[ClipBatch] | None = None
        self._next_position = (-1, -1)
        self._last_epoch = -1

    def set_initial_world_size(self, initial_world_size: int) -> None:
        """Keep the global batches of a run that began with this many ranks; called before any other method."""
        self._plans = EpochPlans(self._job, self._config, self._world_size, initial_world_size)

    def plan(self, epoch: int) -> ClipPlan:
        """The clip plan: its `steps` are the batches of each rank, its `counts` the clips dropped or repeated."""
        return self._plans(epoch)

    def batches(self, epoch: int, start_step: int) -> Iterator[ClipBatch]:
        """This rank's batches from ``start_step`` on."""
        plan = self.plan(epoch)
        if self._actors == 0:
            batch = plan.global_batch // self._world_size
            yield from local_batches(plan, self._loader, self._rank, self._world_size, batch, start_step)
            return
        if self._stream is None or self._next_position != (epoch, start_step) or epoch > self._last_epoch:
            self._stream = self._open(epoch, start_step)
        for _ in range(start_step, plan.steps):
            yield next(self._stream)
        self._next_position = (epoch + 1, 0)

    def _open(self, epoch: int, start_step: int) -> Iterator[ClipBatch]:
        """Stream this rank's rows from a position on, over as many epochs as fit one dataset."""
        rows: list[ClipRef] = []
        self._last_epoch = epoch - 1
        batch = self.plan(epoch).global_batch // self._world_size
        while self._last_epoch + 1 < self._config.EPOCHS and (not rows or len(rows) < self.ROWS_PER_DATASET):
            self._last_epoch += 1
            plan = self.plan(self._last_epoch).from_step(start_step if self._last_epoch == epoch else 0)
            rows += rank_rows(plan, self._world_size, self._rank, batch)
        dataset = clip_dataset(rows, self._loader, actors=self._actors, actor_cpus=self._actor_cpus)
        return iterate(dataset, rows, batch, self._prefetch)
