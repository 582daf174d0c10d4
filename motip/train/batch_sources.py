"""Where a worker's batches come from: this process, or decoding actors beside it."""

from __future__ import annotations

from collections.abc import Iterator

from motip.config import Config
from motip.data.batch import ClipBatch
from motip.data.clip_loader import ClipLoader, local_batches
from motip.data.clips import ClipRef, rank_rows
from motip.data.stream import clip_dataset, iterate
from motip.train.stage_job import EpochPlans, StageJob


class LocalFeed:
    """Batches loaded in this process."""

    def __init__(self, job: StageJob, config: Config) -> None:
        self._job, self._config = job, config
        self._plans = EpochPlans(job, config, world=1)
        self._loader = ClipLoader(config, job.class_maps(config), job.storage)

    def started_with(self, first_world: int) -> None:
        self._plans = EpochPlans(self._job, self._config, 1, first_world)

    def steps(self, epoch: int) -> int:
        return self._plans(epoch).steps

    def counts(self, epoch: int) -> dict[str, int]:
        return self._plans(epoch).counts

    def batches(self, epoch: int, start_step: int) -> Iterator[ClipBatch]:
        plan = self._plans(epoch)
        return local_batches(plan, self._loader, 0, 1, plan.global_batch, start_step)


class RayFeed:
    """Batches decoded by Ray Data actors beside this worker, or by the worker itself with NUM_WORKERS 0.

    The actors go on through several epochs, so that short epochs do not wait for them to start, and decode ahead while
    the validation runs.
    """

    ROWS_PER_DATASET = 8192
    """Clips after which the actors are started anew."""

    def __init__(self, job: StageJob, config: Config, rank: int, world: int, actors: int, actor_cpus: float) -> None:
        self._job, self._config = job, config
        self._plans = EpochPlans(job, config, world)
        self._rank, self._world = rank, world
        self._epochs = config.EPOCHS
        self._loader = ClipLoader(config, job.class_maps(config), job.storage)
        self._actors, self._actor_cpus, self._prefetch = actors, actor_cpus, config.PREFETCH_FACTOR
        self._stream: Iterator[ClipBatch] | None = None
        self._next = (-1, -1)
        self._until = -1

    def steps(self, epoch: int) -> int:
        return self._plans(epoch).steps

    def counts(self, epoch: int) -> dict[str, int]:
        return self._plans(epoch).counts

    def started_with(self, first_world: int) -> None:
        self._plans = EpochPlans(self._job, self._config, self._world, first_world)

    def batches(self, epoch: int, start_step: int) -> Iterator[ClipBatch]:
        if self._actors == 0:
            plan = self._plans(epoch)
            batch = plan.global_batch // self._world
            yield from local_batches(plan, self._loader, self._rank, self._world, batch, start_step)
            return
        if self._stream is None or self._next != (epoch, start_step) or epoch > self._until:
            self._stream = self._open(epoch, start_step)
        for _ in range(start_step, self.steps(epoch)):
            yield next(self._stream)
        self._next = (epoch + 1, 0)

    def _open(self, epoch: int, start_step: int) -> Iterator[ClipBatch]:
        """A stream of this rank's rows from a position on, over as many epochs as fit one dataset."""
        rows: list[ClipRef] = []
        self._until = epoch - 1
        batch = self._plans(epoch).global_batch // self._world
        while self._until + 1 < self._epochs and (not rows or len(rows) < self.ROWS_PER_DATASET):
            self._until += 1
            plan = self._plans(self._until).from_step(start_step if self._until == epoch else 0)
            rows += rank_rows(plan, self._world, self._rank, batch)
        dataset = clip_dataset(rows, self._loader, actors=self._actors, actor_cpus=self._actor_cpus)
        return iterate(dataset, rows, batch, self._prefetch)
