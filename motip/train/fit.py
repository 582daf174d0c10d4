"""A stage on Ray Train: workers, batches from Ray Data, checkpoints, and the way back to the driver."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from motip.cluster import Cluster
from motip.config import Config
from motip.data.batch import ClipBatch
from motip.data.clip_loader import ClipLoader, local_batches
from motip.data.clips import ClipRef, rank_rows
from motip.data.storage import Location, location, read_json
from motip.data.stream import clip_dataset, data_resources, iterate
from motip.errors import MotipError, find_motip_error
from motip.train.communicate import SingleProcess, current_communicator
from motip.train.job import EpochPlans, StageJob
from motip.train.loop import run_stage

OnRecord = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Placement:
    """How a stage is laid over the cluster.

    Attributes:
        workers: training workers; 0 trains in this process, without Ray.
        cpus: CPUs reserved per training worker.
        decoders: decoding actors per training worker.
        decoder_cpus: CPUs reserved per decoding actor.
        gpu: one GPU per worker.
    """

    workers: int
    cpus: float = 1.0
    decoders: int = 1
    decoder_cpus: float = 0.5
    gpu: bool = False


@dataclass
class FitResult:
    """Epochs that were completed, and where each one's checkpoint lies."""

    epochs: dict[int, dict[str, float]] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    checkpoints: dict[int, str] = field(default_factory=dict)


def place(workers: int, config: Config, cluster: Cluster) -> Placement:
    """Share the cluster out among training workers and their decoding actors, or refuse with the arithmetic.

    Raises:
        MotipError: more workers than GPUs or CPUs allow.
    """
    gpu = config.DEVICE != "cpu" and cluster.gpus >= 1
    if gpu and workers > cluster.gpus:
        raise MotipError(
            "more training workers than GPUs",
            where="--workers",
            found=f"{workers} workers",
            expected=f"at most {cluster.gpus:g} (one GPU each)",
            fix=f"use --workers {int(cluster.gpus)} or add nodes",
        )
    shares = data_resources(cluster.cpus, workers, config.NUM_WORKERS)
    return Placement(workers, shares.worker_cpus, shares.actors_per_worker, shares.actor_cpus, gpu)


def fit(job: StageJob, placement: Placement, folder: str, on_record: OnRecord) -> FitResult:
    """Train a stage to its last epoch; an interrupted run of the same ``folder`` goes on where it was.

    Args:
        folder: the stage's own folder or URI; checkpoints are written to ``<folder>/epoch_<n>/checkpoint_<n>.pth``.
        on_record: called in this process with everything the training has to say (`step`, `epoch`, `scores`, …).

    Raises:
        MotipError: the stage's inputs are wrong, or training failed for another reason that is named.
    """
    if placement.workers == 0:
        _fit_here(job, Path(folder), on_record)
    else:
        _fit_on_ray(job, placement, folder, on_record)
    return completed(folder)


def completed(folder: str) -> FitResult:
    """The epochs whose checkpoint lies in a stage's folder, whichever attempt trained them."""
    result = FitResult()
    place = location(folder)
    if not place.is_dir():
        return result
    children: list[Location] = list(place.iterdir())
    for child in sorted(children, key=lambda child: child.name):
        if child.name.startswith("epoch_") and (child / "metrics.json").is_file():
            stored = read_json(child / "metrics.json")
            epoch = int(stored["epoch"])
            result.epochs[epoch] = stored["metrics"]
            result.steps[epoch] = int(stored["step"])
            result.checkpoints[epoch] = str(child / f"checkpoint_{epoch}.pth")
    return result


def checkpoint_name(epoch: int) -> str:
    """Where an epoch's checkpoint lies under the stage's folder."""
    return f"epoch_{epoch:03d}/checkpoint_{epoch}.pth"


def pick_device(config: Config) -> torch.device:
    """CUDA where it is wanted and there, else the CPU."""
    wanted = config.DEVICE in ("cuda", "auto") and torch.cuda.is_available()
    return torch.device("cuda" if wanted else "cpu")


class LocalFeed:
    """Batches loaded in this process."""

    def __init__(self, job: StageJob, config: Config) -> None:
        self._plans = EpochPlans(job, config, world=1)
        self._loader = ClipLoader(config, job.class_maps(config), job.storage)
        self._batch = config.BATCH_SIZE

    def steps(self, epoch: int) -> int:
        return self._plans(epoch).steps

    def counts(self, epoch: int) -> dict[str, int]:
        return self._plans(epoch).counts

    def batches(self, epoch: int, start_step: int) -> Iterator[ClipBatch]:
        return local_batches(self._plans(epoch), self._loader, 0, 1, self._batch, start_step)


class FolderReporter:
    """Checkpoints in a local folder, records to a callback: training without Ray."""

    def __init__(self, folder: Path, on_record: OnRecord) -> None:
        self._folder = folder
        self._on_record = on_record

    def latest(self) -> Path | None:
        found = sorted(self._folder.glob("epoch_*/checkpoint_*.pth"))
        return found[-1] if found else None

    def record(self, kind: str, values: dict[str, Any]) -> None:
        self._on_record(kind, values)

    def folder(self, epoch: int) -> Path:
        path = self._folder / Path(checkpoint_name(epoch)).parent
        path.mkdir(parents=True, exist_ok=True)
        return path

    def epoch_done(self, epoch: int, metrics: dict[str, float], folder: Path | None) -> None:
        return


def _fit_here(job: StageJob, folder: Path, on_record: OnRecord) -> None:
    config = Config.from_dict(job.config)
    run_stage(job, SingleProcess(), LocalFeed(job, config), FolderReporter(folder, on_record), pick_device(config))


# ------------------------------------------------------------------------------------------------ on Ray


class _Mailbox:
    """What the workers have to say, kept until the driver fetches it: workers need no way to the tracking server."""

    def __init__(self) -> None:
        self._records: list[tuple[str, dict[str, Any]]] = []

    def put(self, kind: str, values: dict[str, Any]) -> None:
        self._records.append((kind, values))

    def drain(self) -> list[tuple[str, dict[str, Any]]]:
        records, self._records = self._records, []
        return records


class RayReporter:
    """Checkpoints through ray.train.report, records through the mailbox."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._local: list[Path] = []

    def latest(self) -> Path | None:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        folder = Path(tempfile.mkdtemp(prefix="motip_resume_"))
        checkpoint.to_directory(str(folder))
        self._local.append(folder)
        return next(iter(sorted(folder.glob("checkpoint_*.pth"))), None)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        import ray

        ray.get(self._mailbox.put.remote(kind, values))

    def folder(self, epoch: int) -> Path:
        path = Path(tempfile.mkdtemp(prefix="motip_epoch_"))
        self._local.append(path)
        return path

    def epoch_done(self, epoch: int, metrics: dict[str, float], folder: Path | None) -> None:
        import ray.train

        # [3] Ray Train copies the folder into the stage's storage; every rank reports, rank 0 brings the files.
        checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"epoch_{epoch:03d}")
        for path in self._local:
            shutil.rmtree(path, ignore_errors=True)
        self._local.clear()


class RayFeed:
    """Batches decoded by Ray Data actors beside this worker, or by the worker itself with NUM_WORKERS 0.

    The actors go on through several epochs, so that short epochs do not wait for them to start, and decode ahead while
    the validation runs.
    """

    ROWS_PER_DATASET = 8192
    """Clips after which the actors are started anew."""

    def __init__(self, job: StageJob, config: Config, rank: int, world: int, placement: Placement) -> None:
        self._plans = EpochPlans(job, config, world)
        self._rank, self._world, self._batch = rank, world, config.BATCH_SIZE
        self._epochs = config.EPOCHS
        self._loader = ClipLoader(config, job.class_maps(config), job.storage)
        self._placement, self._prefetch = placement, config.PREFETCH_FACTOR
        self._stream: Iterator[ClipBatch] | None = None
        self._next = (-1, -1)
        self._until = -1

    def steps(self, epoch: int) -> int:
        return self._plans(epoch).steps

    def counts(self, epoch: int) -> dict[str, int]:
        return self._plans(epoch).counts

    def batches(self, epoch: int, start_step: int) -> Iterator[ClipBatch]:
        if self._placement.decoders == 0:
            plan = self._plans(epoch)
            yield from local_batches(plan, self._loader, self._rank, self._world, self._batch, start_step)
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
        while self._until + 1 < self._epochs and (not rows or len(rows) < self.ROWS_PER_DATASET):
            self._until += 1
            plan = self._plans(self._until).from_step(start_step if self._until == epoch else 0)
            rows += rank_rows(plan, self._world, self._rank, self._batch)
        dataset = clip_dataset(
            rows, self._loader, actors=self._placement.decoders, actor_cpus=self._placement.decoder_cpus
        )
        return iterate(dataset, rows, self._batch, self._prefetch)


def _worker(settings: dict[str, Any]) -> None:
    """What each training worker runs."""
    import ray.train
    import ray.train.torch

    job, placement = settings["job"], settings["placement"]
    config = Config.from_dict(job.config)
    # [1] Ray Train has set up the process group.
    comm = current_communicator()
    if placement.gpu:
        device = ray.train.torch.get_device()
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, settings["threads"]))
    # [2] The batches come from Ray Data, this rank's rows of the clip plan in order.
    feed = RayFeed(job, config, comm.rank, comm.world_size, placement)
    run_stage(job, comm, feed, RayReporter(settings["mailbox"]), device)


def _fit_on_ray(job: StageJob, placement: Placement, folder: str, on_record: OnRecord) -> None:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    mailbox = ray.remote(num_cpus=0)(_Mailbox).remote()
    parent, _, name = folder.rpartition("/")
    cores = ray.cluster_resources().get("CPU", 1.0)
    settings = {
        "job": job,
        "placement": placement,
        "mailbox": mailbox,
        "threads": int(cores // max(1, placement.workers)),
    }
    # [4] One run name per set of inputs: a stale run of other inputs can never be resumed by accident.
    trainer = TorchTrainer(
        _worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=placement.workers,
            use_gpu=placement.gpu,
            resources_per_worker={"CPU": placement.cpus, **({"GPU": 1} if placement.gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=parent,
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )
    with _listening(mailbox, on_record):
        try:
            trainer.fit()
        except Exception as error:
            raise find_motip_error(error) or MotipError(
                f"training of stage {job.stage} failed: {_last_line(error)}",
                where=folder,
                fix="the checkpoints so far are kept; run the same command again to go on",
            ) from error


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _listening:
    """Fetch the mailbox's records every half second, in order, until the block ends; errors surface at its end."""

    def __init__(self, mailbox: Any, on_record: OnRecord) -> None:
        self._mailbox = mailbox
        self._on_record = on_record
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._listen, name="motip-mailbox", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and exc[0] is None:
            raise self._error

    def _listen(self) -> None:
        import ray

        try:
            while True:
                last = self._stop.is_set()
                for kind, values in ray.get(self._mailbox.drain.remote()):
                    self._on_record(kind, values)
                if last:
                    return
                time.sleep(0.5)
        except BaseException as error:
            self._error = error
