"""Training of a stage on Ray Train, or in this process without Ray; reports events to the driver."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from motip.cluster import Cluster
from motip.config import Config
from motip.data.stream import data_resources
from motip.errors import MotipError, find_motip_error
from motip.events import Note
from motip.stage_folder import StageFolder
from motip.storage.atomic_filesystem import atomic_filesystem
from motip.storage.paths import RemotePath, location, write_bytes
from motip.train.batch_sources import LocalBatchSource, RayBatchSource
from motip.train.checkpoint_stores import FolderStore, RayStore
from motip.train.collectives import SingleProcess, current_process_group
from motip.train.loop import train_stage_on_worker
from motip.train.preemption import GRACE_PERIOD_S, SigtermForwarder, Stopped
from motip.train.retention import Retention
from motip.train.run_channel import LocalChannel, RemoteChannel, RunChannel
from motip.train.stage_job import StageJob

_log = logging.getLogger(__name__)

READ_EVERY_S = 0.5
"""Seconds between two readings of the event log."""


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


def fit(
    job: StageJob,
    resources: ResourcePlan,
    folder: str,
    catch_up: Callable[[], None] = lambda: None,
    channel_name: str | None = None,
) -> FitResult:
    """Train a stage to its last epoch; an interrupted run of the same ``folder`` is resumed.

    Args:
        resources: number and resources of the workers.
        folder: the stage's own folder or URI; checkpoints are written to ``<folder>/epoch_<n>/checkpoint_<n>.pth``,
            events to its event log.
        catch_up: called in this process while the workers train, and once at the end: the readers of the event log
            read what is new. If it raises `Stopped`, the training saves its position and ends.
        channel_name: name under which `request_stop` finds this training; unique in the Ray job.

    Raises:
        Stopped: a stop was requested before the last epoch; the position is saved.
        MotipError: the stage's inputs are wrong, training failed, or its events cannot be written.
    """
    if resources.workers == 0:
        _fit_in_process(job, folder, catch_up)
        return completed(folder)
    channel = RemoteChannel(_channel_actor(folder, channel_name))
    trainer = _trainer(job, resources, channel, folder)
    # Training, with events and signals handled in this process.
    readers = _ReaderThread(channel, catch_up)
    with _forward_sigterm(channel) as sigterm, readers, _sigint_as_keyboard_interrupt():
        try:
            trainer.fit()
        except Exception as error:
            _raise_worker_failure(channel, folder)
            failed = _training_failed(job, folder, error, str(error))  # keeps the workers' output in any case
            raise _lost_worker_error(channel, error, failed) or failed from error
        _raise_worker_failure(channel, folder)
        channel.close()
        if sigterm.received or readers.stopped:
            raise Stopped
    return completed(folder)


def request_stop(channel_name: str) -> None:
    """Request the stop of a training of this Ray job by its `channel_name`; no-op if it has ended."""
    import ray

    with contextlib.suppress(ValueError, ray.exceptions.RayActorError):
        RemoteChannel(ray.get_actor(channel_name)).request_stop()


def _fit_in_process(job: StageJob, folder: str, catch_up: Callable[[], None]) -> None:
    if isinstance(location(folder), RemotePath):
        raise MotipError(
            "without Ray workers a stage can only write to a local folder",
            where="--storage",
            found=folder,
            fix="use --workers 1 or more, or a local --storage",
        )
    config = Config.from_dict(job.config)
    channel = LocalChannel(folder, catch_up)
    store = FolderStore(StageFolder(folder), _retention(job, config))
    batches = LocalBatchSource(job, config)
    train_stage_on_worker(job, SingleProcess(), batches, channel, store, device_from_config(config))
    channel.close()


def completed(folder: str) -> FitResult:
    """The finished epochs in a stage's folder, of all attempts; `checkpoints` has those whose weights are kept."""
    result = FitResult()
    for each in StageFolder(folder).checkpoints().epochs:
        result.epochs[each.epoch] = each.metrics
        result.steps[each.epoch] = each.step
        if each.weights is not None:
            result.checkpoints[each.epoch] = str(each.weights)
    return result


def device_from_config(config: Config) -> torch.device:
    """CUDA if the configuration allows it and it is available, else the CPU."""
    cuda = config.DEVICE in ("cuda", "auto") and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def _retention(job: StageJob, config: Config) -> Retention:
    return Retention(config.CHECKPOINTS_KEPT, config.EPOCH_CHECKPOINTS_KEPT, job.best)


# ------------------------------------------------------------------------------------------------ on Ray


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
    job, resources, channel = settings["job"], settings["resources"], settings["channel"]
    if not channel.worker_started():
        return  # restarted by Ray after a permanent error, which the driver raises
    try:
        config = Config.from_dict(job.config)
        comm = current_process_group(config.COLLECTIVE_TIMEOUT_S)  # initialised by Ray Train
        device = _worker_device(resources)
        # Batches from Ray Data: this rank's rows of the clip plan, in order.
        batches = RayBatchSource(job, config, comm.rank, comm.world_size, resources.decoders, resources.decoder_cpus)
        store = RayStore(channel, StageFolder(settings["folder"]), _retention(job, config))
        try:
            train_stage_on_worker(job, comm, batches, channel, store, device)
        finally:
            store.remove_local_copies()
    except Stopped:
        # Every rank returns, its position saved; an error would make Ray restart the workers.
        channel.worker_stopped()
    except PERMANENT_ERRORS as error:
        problem = error if isinstance(error, MotipError) else MotipError(f"{type(error).__name__}: {error}")
        channel.report_failure(problem, traceback.format_exc())
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


def _channel_actor(folder: str, name: str | None) -> Any:
    """The `RunChannel` actor, pinned to the driver's node: it outlives every other node and writes to its disk."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pinned = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(RunChannel).options(name=name, num_cpus=0, scheduling_strategy=pinned).remote(folder)


def _trainer(job: StageJob, resources: ResourcePlan, channel: RemoteChannel, folder: str) -> Any:
    """Ray Train's trainer of a stage.

    Its run is named after the stage's folder, which contains the digest of the inputs: a run of other inputs cannot be
    resumed by accident.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    parent, _, name = folder.rpartition("/")
    return TorchTrainer(
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


def _forward_sigterm(channel: RemoteChannel) -> SigtermForwarder:
    """Forward SIGTERM of the driver, as sent by `ray job stop`, to the workers."""

    def on_timeout() -> None:
        text = (
            f"SIGTERM: training did not end within {GRACE_PERIOD_S:.0f} s: {channel.progress()}; the checkpoints so "
            "far are kept"
        )
        _log.error(text)
        channel.send(Note(text))

    return SigtermForwarder(channel.request_stop, on_timeout)


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


def _raise_worker_failure(channel: RemoteChannel, folder: str) -> None:
    """Raise the permanent error reported by a worker, if any; for a defect the traceback is written to a file."""
    failure = channel.failure()
    if failure is None:
        return
    error, text = failure
    if error.where is None and error.fix is None:
        path = StageFolder(folder).failure
        write_bytes(path, text.encode())
        raise MotipError(error.what, where=f"{path} (traceback)", fix="this is a defect of the program: report it")
    raise error


def _lost_worker_error(channel: RemoteChannel, error: BaseException, failed: MotipError) -> MotipError | None:
    """The report of a lost worker in the last attempt, or a MotipError among the causes of ``error``, if any.

    A lost worker may be the consequence of another worker's failure, so the full output of the workers is named too.
    """
    lost: MotipError | None = channel.lost()
    if lost is None:
        return find_motip_error(error)
    fix = f"read the output of the workers first: {failed.where}; {lost.fix}"
    return MotipError(lost.what, where=lost.where, found=lost.found, expected=lost.expected, fix=fix)


def _training_failed(job: StageJob, folder: str, error: BaseException, text: str) -> MotipError:
    path = StageFolder(folder).failure
    write_bytes(path, text.encode())
    return MotipError(
        f"training of stage {job.stage} failed: {_last_line(error)}",
        where=f"{path} (full worker output)",
        fix="the checkpoints so far are kept; run the same command again to resume",
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _ReaderThread:
    """Thread that lets the readers of the event log catch up every half second; a context manager.

    Attributes:
        stopped: a reader raised `Stopped`, and the workers were requested to stop.
    """

    def __init__(self, channel: RemoteChannel, catch_up: Callable[[], None]) -> None:
        self._channel = channel
        self._catch_up = catch_up
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="motip-readers", daemon=True)
        self.stopped = False

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            last = self._over.wait(READ_EVERY_S)
            try:
                self._catch_up()
                for line in self._channel.warnings():
                    _log.warning(line)
            except Stopped:
                self._channel.request_stop()
                self.stopped = True
            except Exception:
                _log.exception("the events of the training cannot be read; training continues")
            if last:
                return
