"""Training of a stage on Ray Train, or in this process without Ray; reports events to the driver."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from motip.cluster import OWN_RAY_ENV, Cluster
from motip.config import Config
from motip.data.stream import data_resources
from motip.errors import MotipError, find_motip_error
from motip.storage.atomic_filesystem import atomic_filesystem
from motip.storage.paths import RemotePath, download, location, write_bytes
from motip.train.batch_sources import LocalBatchSource, RayBatchSource
from motip.train.checkpoints import store_folder
from motip.train.collectives import SingleProcess, current_process_group
from motip.train.loop import train_stage_on_worker
from motip.train.preemption import GRACE_PERIOD_S, SigtermForwarder, Stopped
from motip.train.retention import Retention, drop_epochs, drop_steps, list_checkpoints
from motip.train.run_channel import RunChannel
from motip.train.stage_job import StageJob
from motip.train.temp_dirs import TempDirs

_log = logging.getLogger(__name__)

OnRecord = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class ResourcePlan:
    """Resources of a stage's training workers and decoding actors.

    Attributes:
        workers: training workers; 0 trains in this process, without Ray.
        min_workers: lower bound of an elastic number of workers, with `workers` as the upper bound; None: not elastic.
        cpus: CPUs reserved per training worker.
        decoders: decoding actors per training worker.
        decoder_cpus: CPUs reserved per decoding actor.
        gpu: one GPU per worker.
        concurrent_runs: training runs that share the machines; each gets its fraction of the cores as threads.
    """

    workers: int
    cpus: float = 1.0
    decoders: int = 1
    decoder_cpus: float = 0.5
    gpu: bool = False
    min_workers: int | None = None
    concurrent_runs: int = 1


@dataclass
class FitResult:
    """Finished epochs: metrics and optimiser-step counts by epoch, and the paths of the weights that are kept."""

    epochs: dict[int, dict[str, float]] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    checkpoints: dict[int, str] = field(default_factory=dict)


def plan_resources(workers: int, config: Config, cluster: Cluster, min_workers: int | None = None) -> ResourcePlan:
    """Divide the cluster among training workers and their decoding actors.

    Args:
        min_workers: workers that must fit now; the others may start when nodes join. None: all must fit.

    Raises:
        MotipError: more workers than GPUs or CPUs allow.
    """
    gpu = config.DEVICE != "cpu" and cluster.gpus >= 1
    if min_workers is not None:
        return _plan_worker_range(min_workers, workers, config, cluster, gpu)
    if gpu and workers > cluster.gpus:
        raise MotipError(
            "more training workers than GPUs",
            where="--workers",
            found=f"{workers} workers",
            expected=f"at most {cluster.gpus:g} (one GPU each)",
            fix=f"use --workers {int(cluster.gpus)} or add nodes",
        )
    shares = data_resources(cluster.cpus, workers, config.NUM_WORKERS, node_cpus=cluster.node_cpus)
    return ResourcePlan(workers, shares.worker_cpus, shares.actors_per_worker, shares.actor_cpus, gpu)


def _plan_worker_range(min_workers: int, max_workers: int, config: Config, cluster: Cluster, gpu: bool) -> ResourcePlan:
    """Resources of an elastic run. Ray computes the number of workers from one worker's reservation alone, so the
    reservation must bound it and include decoding."""
    if not gpu:
        if cluster.cpus < min_workers:
            raise MotipError(
                "fewer CPUs than the minimum number of workers",
                where="--workers",
                found=f"{cluster.cpus:g} CPUs",
                expected=f"{min_workers} (without GPUs each worker of a range takes one and decodes its own clips)",
                fix=f"use --workers {max(1, int(cluster.cpus))}:{max_workers} or add nodes",
            )
        return ResourcePlan(max_workers, decoders=0, min_workers=min_workers)
    now = min(max_workers, int(cluster.gpus))
    if now < min_workers:
        raise MotipError(
            "fewer GPUs than the minimum number of workers",
            where="--workers",
            found=f"{cluster.gpus:g} GPUs",
            expected=f"{min_workers} (one GPU each)",
            fix=f"use --workers {now}:{max_workers} or add nodes",
        )
    return replace(plan_resources(now, config, cluster), workers=max_workers, min_workers=min_workers)


def fit(job: StageJob, resources: ResourcePlan, folder: str, on_record: OnRecord) -> FitResult:
    """Train a stage to its last epoch; an interrupted run of the same ``folder`` is resumed.

    Args:
        resources: number and resources of the workers.
        folder: the stage's own folder or URI; checkpoints are written to ``<folder>/epoch_<n>/checkpoint_<n>.pth``.
        on_record: called in this process with every event of the training (`step`, `epoch`, `scores`, …). If it raises
            `Stopped`, the training saves its position and ends.

    Raises:
        Stopped: a stop was requested before the last epoch; the position is saved.
        MotipError: the stage's inputs are wrong, or training failed.
    """
    if resources.workers == 0:
        config = Config.from_dict(job.config)
        reporter = FolderReporter(_local_folder(folder), on_record, _retention(job, config))
        train_stage_on_worker(job, SingleProcess(), LocalBatchSource(job, config), reporter, device_from_config(config))
        return completed(folder)
    channel = _run_channel()
    trainer = _trainer(job, resources, channel, folder)
    # Training, with events and signals handled in this process.
    events = _EventPump(channel, on_record)
    with _forward_sigterm(channel) as sigterm, events, _sigint_as_keyboard_interrupt():
        try:
            trainer.fit()
        except Exception as error:
            _raise_worker_failure(channel, folder)
            failed = _training_failed(job, folder, error, str(error))  # keeps the workers' output in any case
            raise _lost_worker_error(channel, error, failed) or failed from error
        _raise_worker_failure(channel, folder)
        if sigterm.received or events.stopped:
            raise Stopped
    return completed(folder)


def completed(folder: str) -> FitResult:
    """The finished epochs in a stage's folder, of all attempts; `checkpoints` has those whose weights are kept."""
    result = FitResult()
    for each in list_checkpoints(location(folder)).epochs:
        result.epochs[each.epoch] = each.metrics
        result.steps[each.epoch] = each.step
        if each.weights is not None:
            result.checkpoints[each.epoch] = str(each.weights)
    return result


def device_from_config(config: Config) -> torch.device:
    """CUDA if the configuration allows it and it is available, else the CPU."""
    cuda = config.DEVICE in ("cuda", "auto") and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


class FolderReporter:
    """Reporter of training without Ray: checkpoints in a local folder, events to a callback."""

    def __init__(self, folder: Path, on_record: OnRecord, retention: Retention | None = None) -> None:
        self._folder = folder
        self._on_record = on_record
        self._retention = retention or Retention()

    def latest(self) -> Path | None:
        """The newest complete checkpoint, of an epoch or of a position inside one."""
        found = list_checkpoints(self._folder).latest()
        return found if isinstance(found, Path) else None

    def loaded(self) -> None:
        return

    def record(self, kind: str, values: dict[str, Any]) -> None:
        self._on_record(kind, values)

    def folder(self, name: str) -> Path:
        path = self._folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def step_done(self, step: int, folder: Path | None, wait: bool) -> None:
        if folder is not None:
            drop_steps(self._folder, self._retention.steps)

    def initial_world_size(self, world_size: int) -> int:
        return world_size

    def preemption(self) -> str:
        return ""

    def report_lost(self, problem: MotipError) -> None:
        self._on_record("note", {"text": problem.render()})

    def stop_requested(self) -> bool:
        return False

    def epoch_done(self, epoch: int, metrics: dict[str, float], folder: Path | None) -> None:
        if folder is not None:
            drop_steps(self._folder, 0)
            drop_epochs(self._folder, self._retention)


def _retention(job: StageJob, config: Config) -> Retention:
    return Retention(config.CHECKPOINTS_KEPT, config.EPOCH_CHECKPOINTS_KEPT, job.best)


def _local_folder(folder: str) -> Path:
    if isinstance(location(folder), RemotePath):
        raise MotipError(
            "without Ray workers a stage can only write to a local folder",
            where="--storage",
            found=folder,
            fix="use --workers 1 or more, or a local --storage",
        )
    return Path(folder)


# ------------------------------------------------------------------------------------------------ on Ray


class RayReporter:
    """Reporter of a Ray Train worker: checkpoints through ray.train.report, events through the run channel.

    Args:
        channel: the `RunChannel` actor.
        folder: Ray Train's folder of the run, where the checkpoints are stored.
        retention: the checkpoints to keep.
    """

    def __init__(self, channel: Any, folder: str, retention: Retention) -> None:
        self._channel = channel
        self._folder = location(folder)
        self._retention = retention
        self._temp_dirs = TempDirs(folder)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, downloaded if remote.

        Rank 0 chooses for all ranks: an upload of the previous attempt may complete between the listings of two ranks.
        """
        import ray.train
        import ray.train.collective

        context = ray.train.get_context()
        if context.get_local_rank() == 0:
            self._temp_dirs.remove_stale()
        found = list_checkpoints(self._folder).latest() if context.get_world_rank() == 0 else None
        chosen = None if found is None else f"{found.parent.name}/{found.name}"
        # The broadcast waits for all ranks: no rank creates a temporary directory before the stale ones are removed.
        name = ray.train.collective.broadcast_from_rank_zero(chosen)
        if name is None:
            return None
        newest = self._folder / name
        return newest if isinstance(newest, Path) else download(newest, self._temp_dirs.new("resume") / newest.name)

    def loaded(self) -> None:
        self.remove_local_copies()

    def remove_local_copies(self) -> None:
        """Remove this rank's temporary directories; Ray Train removes those that it still uploads."""
        self._temp_dirs.clear()

    def record(self, kind: str, values: dict[str, Any]) -> None:
        import ray

        ray.get(self._channel.put.remote(kind, values))

    def folder(self, name: str) -> Path:
        return self._temp_dirs.new(name, keep=name.startswith("step_"))

    def step_done(self, step: int, folder: Path | None, wait: bool) -> None:
        import ray.train

        # ASYNC uploads while training continues; Ray lists a checkpoint once complete, and removes the local copy.
        mode = ray.train.CheckpointUploadMode.SYNC if wait else ray.train.CheckpointUploadMode.ASYNC
        ray.train.report(
            {"step": step},
            checkpoint=None if folder is None else ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=f"step_{step:08d}",
            checkpoint_upload_mode=mode,
            checkpoint_upload_fn=self._store,
            delete_local_checkpoint_after_upload=True,
        )
        if folder is not None:
            # The newest may still be uploading, so one more than configured is kept.
            drop_steps(self._folder, self._retention.steps + 1)

    def initial_world_size(self, world_size: int) -> int:
        import ray

        return int(ray.get(self._channel.initial_world_size.remote(world_size)))

    def preemption(self) -> str:
        import ray.train

        info = ray.train.get_preemption_info()
        return "" if info is None else f"preemption of {', '.join(sorted(info.preempted_node_ids))}"

    def report_lost(self, problem: MotipError) -> None:
        import ray

        ray.get(self._channel.report_lost.remote(problem))

    def stop_requested(self) -> bool:
        import ray

        return bool(ray.get(self._channel.stop_requested.remote()))

    def epoch_done(self, epoch: int, metrics: dict[str, float], folder: Path | None) -> None:
        import ray.train

        # Every rank reports, rank 0 with the files; Ray Train lists the epoch once its folder is in the storage.
        checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_dir_name=f"epoch_{epoch:03d}",
            checkpoint_upload_fn=self._store,
        )
        self.remove_local_copies()
        if folder is not None:
            drop_steps(self._folder, 1)
            drop_epochs(self._folder, self._retention)

    def _store(self, checkpoint: Any, name: str) -> Any:
        """Upload function for Ray Train, whose own would leave partial files after an interruption."""
        import ray.train

        try:
            store_folder(Path(checkpoint.path), self._folder / name, self._log_retry)
        except MotipError as error:
            # Reported here too: an error in the upload thread does not reach the training loop.
            self._report_failure(error)
            raise
        storage = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(storage.build_checkpoint_path_from_name(name), storage.storage_filesystem)

    def _log_retry(self, text: str) -> None:
        _log.warning(text)
        self.record("note", {"text": text})

    def _report_failure(self, error: MotipError) -> None:
        import ray

        ray.get(self._channel.report_failure.remote(error, traceback.format_exc()))


PERMANENT_ERRORS: tuple[type[Exception], ...] = (
    MotipError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    TypeError,
    ValueError,
)
"""Errors that a restart of the workers cannot fix: wrong input, or a defect of the program."""


def _worker_main(settings: dict[str, Any]) -> None:
    """Entry point of a training worker."""
    import ray

    job, resources, channel = settings["job"], settings["resources"], settings["channel"]
    if not ray.get(channel.worker_started.remote()):
        return  # restarted by Ray after a permanent error, which the driver raises
    try:
        config = Config.from_dict(job.config)
        comm = current_process_group(config.COLLECTIVE_TIMEOUT_S)  # initialised by Ray Train
        device = _worker_device(resources)
        # Batches from Ray Data: this rank's rows of the clip plan, in order.
        batches = RayBatchSource(job, config, comm.rank, comm.world_size, resources.decoders, resources.decoder_cpus)
        reporter = RayReporter(channel, settings["folder"], _retention(job, config))
        try:
            train_stage_on_worker(job, comm, batches, reporter, device)
        finally:
            reporter.remove_local_copies()
    except Stopped:
        # Every rank returns, its position saved; an error would make Ray restart the workers.
        ray.get(channel.worker_stopped.remote())
    except PERMANENT_ERRORS as error:
        problem = error if isinstance(error, MotipError) else MotipError(f"{type(error).__name__}: {error}")
        ray.get(channel.report_failure.remote(problem, traceback.format_exc()))
        raise


def _worker_device(resources: ResourcePlan) -> torch.device:
    """The worker's GPU; without GPUs the CPU, with this worker's fraction of the cores as threads."""
    import ray.train
    import ray.train.torch

    if resources.gpu:
        return ray.train.torch.get_device()
    local_workers = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(max(1, _cores() // (local_workers * resources.concurrent_runs)))
    return torch.device("cpu")


def _cores() -> int:
    """Cores that this process may use, the upper bound of useful threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_channel() -> Any:
    """The `RunChannel` actor, pinned to the driver's node, so that it outlives every other node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pinned = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(RunChannel).options(num_cpus=0, scheduling_strategy=pinned).remote()


def _trainer(job: StageJob, resources: ResourcePlan, channel: Any, folder: str) -> Any:
    """Ray Train's trainer of a stage.

    Its run is named after the stage's folder, which contains the digest of the inputs: a run of other inputs cannot be
    resumed by accident.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    parent, _, name = folder.rpartition("/")
    return _trainer_class()(
        _worker_main,
        train_loop_config={"job": job, "resources": resources, "channel": channel, "folder": folder},
        # By default torch waits half an hour for a rank that does not respond.
        torch_config=TorchConfig(timeout_s=int(job.config["COLLECTIVE_TIMEOUT_S"])),
        scaling_config=ScalingConfig(**_scaling(resources, int(job.config["RESIZE_EVERY_S"]))),
        run_config=RunConfig(
            name=name,
            # With the package's file system Ray's list of checkpoints is written atomically and with retries.
            storage_path=parent.removeprefix("s3://"),
            storage_filesystem=atomic_filesystem(remote=isinstance(location(folder), RemotePath)),
            failure_config=FailureConfig(max_failures=int(job.config["WORKER_RESTARTS"])),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )


def _trainer_class() -> Any:
    """TorchTrainer, without the actor that cleans up placement groups on a Ray instance that `connect` started.

    That actor polls the dashboard server, which such an instance does not have, and delays the end of a stage by 12 s.
    Placement groups of a killed controller are removed when the driver ends.
    """
    from ray.train.torch import TorchTrainer

    if OWN_RAY_ENV not in os.environ:
        return TorchTrainer

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]
            return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]

    return Trainer


def _scaling(resources: ResourcePlan, resize_every_s: int) -> dict[str, Any]:
    """Arguments of ScalingConfig. With a range of workers Ray checks at the given interval how many fit, and restarts
    with that number from the newest checkpoint."""
    minimum = resources.min_workers
    return {
        "num_workers": resources.workers if minimum is None else (minimum, resources.workers),
        "elastic_resize_monitor_interval_s": float(resize_every_s),
        "use_gpu": resources.gpu,
        "resources_per_worker": {"CPU": resources.cpus, **({"GPU": 1} if resources.gpu else {})},
    }


def _forward_sigterm(channel: Any) -> SigtermForwarder:
    """Forward SIGTERM of the driver, as sent by `ray job stop`, to the workers."""
    import ray

    def on_timeout() -> None:
        progress = ray.get(channel.progress.remote())
        text = (
            f"SIGTERM: training did not end within {GRACE_PERIOD_S:.0f} s: {progress}; the checkpoints so far are kept"
        )
        _log.error(text)
        ray.get(channel.put.remote("note", {"text": text}))

    return SigtermForwarder(lambda: ray.get(channel.request_stop.remote()), on_timeout)


@contextlib.contextmanager
def _sigint_as_keyboard_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C: Ray Train installs a handler that raises SystemExit and is not removed."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _raise_worker_failure(channel: Any, folder: str) -> None:
    """Raise the permanent error reported by a worker, if any; for a defect the traceback is written to a file."""
    import ray

    failure = ray.get(channel.failure.remote())
    if failure is None:
        return
    error, text = failure
    if error.where is None and error.fix is None:
        path = location(folder) / "failure.txt"
        write_bytes(path, text.encode())
        raise MotipError(error.what, where=f"{path} (traceback)", fix="this is a defect of the program: report it")
    raise error


def _lost_worker_error(channel: Any, error: BaseException, failed: MotipError) -> MotipError | None:
    """The report of a lost worker in the last attempt, or a MotipError among the causes of ``error``, if any.

    A lost worker may be the consequence of another worker's failure, so the full output of the workers is named too.
    """
    import ray

    lost: MotipError | None = ray.get(channel.lost.remote())
    if lost is None:
        return find_motip_error(error)
    fix = f"read the output of the workers first: {failed.where}; {lost.fix}"
    return MotipError(lost.what, where=lost.where, found=lost.found, expected=lost.expected, fix=fix)


def _training_failed(job: StageJob, folder: str, error: BaseException, text: str) -> MotipError:
    path = location(folder) / "failure.txt"
    write_bytes(path, text.encode())
    return MotipError(
        f"training of stage {job.stage} failed: {_last_line(error)}",
        where=f"{path} (full worker output)",
        fix="the checkpoints so far are kept; run the same command again to resume",
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _EventPump:
    """Thread that drains the run channel every half second and passes the events on, in order; a context manager.

    The first error of the handler is raised at the end of the block.

    Attributes:
        stopped: the handler raised `Stopped`, and the workers were requested to stop.
    """

    def __init__(self, channel: Any, on_record: OnRecord) -> None:
        self._channel = channel
        self._on_record = on_record
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.stopped = False
        self._thread = threading.Thread(target=self._pump, name="motip-events", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and exc[0] is None:
            raise self._error

    def _pump(self) -> None:
        import ray

        while True:
            last = self._stop.is_set()
            records: list[tuple[str, dict[str, Any]]] = []
            with self._keep_errors():
                records = ray.get(self._channel.drain.remote())
            for kind, values in records:
                with self._keep_errors():
                    self._on_record(kind, values)
            if last:
                return
            time.sleep(0.5)

    @contextlib.contextmanager
    def _keep_errors(self) -> Iterator[None]:
        """Log an error now and raise it at the end: a full disk on the driver must not end the training or prevent the
        handling of later events."""
        try:
            yield
        except Stopped:
            import ray

            ray.get(self._channel.request_stop.remote())
            self.stopped = True
        except Exception as error:
            if self._error is None:
                _log.error("an event of the training cannot be recorded: %s", error)
            self._error = self._error or error
