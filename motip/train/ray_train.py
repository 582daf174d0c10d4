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
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from motip.cluster import Cluster
from motip.config import Config
from motip.data.stream import data_resources
from motip.errors import MotipError, find_motip_error
from motip.events import Note
from motip.stage_folder import StageFolder, epoch_folder, step_folder
from motip.storage.atomic_filesystem import atomic_filesystem
from motip.storage.paths import RemotePath, download, location, write_bytes
from motip.train.batch_sources import BatchSource
from motip.train.checkpoint_stores import CheckpointStore, Retention, drop_epochs, drop_steps
from motip.train.checkpoints import store_folder
from motip.train.collectives import SingleProcess, current_process_group
from motip.train.loop import train_stage_on_worker
from motip.train.preemption import GRACE_PERIOD_S, SigtermForwarder, Stopped
from motip.train.run_channel import LocalChannel, RemoteChannel, RunChannel
from motip.train.stage_job import StageJob
from motip.train.temp_dirs import TempDirs

_log = logging.getLogger(__name__)

READ_EVERY_S = 0.5
"""Seconds between two readings of the event log."""
_ANSWER_S = 120.0
"""Time for which the driver waits for an answer of the run channel, which may wait for a slow storage."""


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
        # Ray computes the number of workers from one worker's reservation alone, so it must include decoding.
        units, available = ("GPUs", cluster.gpus) if gpu else ("CPUs", cluster.cpus)
        now = max(1, min(workers, int(available)))
        if available < min_workers:
            why = "one GPU each" if gpu else "without GPUs each worker of a range takes one and decodes its own clips"
            raise MotipError(
                f"fewer {units} than the minimum number of workers",
                where="--workers",
                found=f"{available:g} {units}",
                expected=f"{min_workers} ({why})",
                fix=f"use --workers {now}:{workers} or add nodes",
            )
        plan = plan_resources(now, config, cluster) if gpu else ResourcePlan(workers, decoders=0)
        return replace(plan, workers=workers, min_workers=min_workers)
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
        if isinstance(location(folder), RemotePath):
            raise MotipError(
                "without Ray workers a stage can only write to a local folder",
                where="--storage",
                found=folder,
                fix="use --workers 1 or more, or a local --storage",
            )
        config = Config.from_dict(job.config)
        store = CheckpointStore(StageFolder(folder), _retention(job, config))
        with _closed(LocalChannel(folder, catch_up)) as local:
            train_stage_on_worker(
                job, SingleProcess(), BatchSource(job, config), local, store, device_from_config(config)
            )
        catch_up()
        return completed(folder)
    with contextlib.ExitStack() as stack:
        # Training, with events and signals handled in this process.
        channel = RemoteChannel.start(folder, channel_name, _ANSWER_S)
        stack.callback(channel.stop_actor)
        sigterm = stack.enter_context(_forward_sigterm(channel))
        stack.enter_context(_ReaderThread(channel, catch_up))
        stack.enter_context(_closed(channel))
        stack.enter_context(_sigint_as_keyboard_interrupt())
        try:
            _trainer(job, resources, channel.for_workers(), folder).fit()
        except Exception as error:
            raise _training_error(channel, job, folder, error) from error
        failure = channel.failure()
        if failure is not None:
            raise _worker_failure(failure, folder)
        if sigterm.received or channel.stop_requested():
            raise Stopped
    return completed(folder)


def request_stop(channel_name: str) -> None:
    """Request the stop of a training of this Ray job by its `channel_name`; no-op if it has ended."""
    import ray

    with contextlib.suppress(ValueError, MotipError):
        RemoteChannel(ray.get_actor(channel_name), _ANSWER_S).request_stop()


@contextlib.contextmanager
def _closed(channel: Any) -> Iterator[Any]:
    """Write the channel's last events on exit; after an error of the training a failure to do so is only logged."""
    try:
        yield channel
    except BaseException:
        try:
            channel.close()
        except MotipError as error:
            _log.error("%s", error)
        raise
    channel.close()


def completed(folder: str) -> FitResult:
    """The finished epochs in a stage's folder, of all attempts; `checkpoints` has those whose weights are kept."""
    found = StageFolder(folder).checkpoints().epochs
    return FitResult(
        {each.epoch: each.metrics for each in found},
        {each.epoch: each.step for each in found},
        {each.epoch: str(each.weights) for each in found if each.weights is not None},
    )


def device_from_config(config: Config) -> torch.device:
    """CUDA if the configuration allows it and it is available, else the CPU."""
    cuda = config.DEVICE in ("cuda", "auto") and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def _retention(job: StageJob, config: Config) -> Retention:
    return Retention(config.CHECKPOINTS_KEPT, config.EPOCH_CHECKPOINTS_KEPT, job.best)


# ------------------------------------------------------------------------------------------------ on Ray


_PERMANENT_ERRORS: tuple[type[Exception], ...] = (
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
        batches = BatchSource(job, config, comm.rank, comm.world_size, resources.decoders, resources.decoder_cpus)
        store = RayStore(channel, StageFolder(settings["folder"]), _retention(job, config))
        try:
            train_stage_on_worker(job, comm, batches, channel, store, device)
        finally:
            store.remove_local_copies()
    except Stopped:
        # Every rank returns, its position saved; an error would make Ray restart the workers.
        channel.worker_stopped()
    except _PERMANENT_ERRORS as error:
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


def _trainer(job: StageJob, resources: ResourcePlan, channel: RemoteChannel, folder: str) -> Any:
    """Ray Train's trainer of a stage.

    Its run is named after the stage's folder, which contains the digest of the inputs: a run of other inputs cannot be
    resumed by accident.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    parent, _, name = folder.rpartition("/")
    minimum, maximum = resources.min_workers, resources.workers
    # With a range of workers Ray checks at the interval how many fit, and restarts with that number from the newest
    # checkpoint.
    scaling: dict[str, Any] = {
        "num_workers": maximum if minimum is None else (minimum, maximum),
        "elastic_resize_monitor_interval_s": float(job.config["RESIZE_EVERY_S"]),
        "use_gpu": resources.gpu,
        "resources_per_worker": {"CPU": resources.cpus, **({"GPU": 1} if resources.gpu else {})},
    }
    return TorchTrainer(
        _worker_main,
        train_loop_config={"job": job, "resources": resources, "channel": channel, "folder": folder},
        # By default torch waits half an hour for a rank that does not respond.
        torch_config=TorchConfig(timeout_s=int(job.config["COLLECTIVE_TIMEOUT_S"])),
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            name=name,
            # With the package's file system Ray's list of checkpoints is written atomically and with retries.
            storage_path=parent.removeprefix("s3://"),
            storage_filesystem=atomic_filesystem(remote=isinstance(location(folder), RemotePath)),
            failure_config=FailureConfig(max_failures=int(job.config["WORKER_RESTARTS"])),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )


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


def _worker_failure(failure: tuple[MotipError, str], folder: str) -> MotipError:
    """The permanent error that a worker reported; for a defect of the program the traceback is written to a file."""
    error, text = failure
    if error.where is not None or error.fix is not None:
        return error
    path = StageFolder(folder).failure
    write_bytes(path, text.encode())
    return MotipError(error.what, where=f"{path} (traceback)", fix="this is a defect of the program: report it")


def _training_error(channel: RemoteChannel, job: StageJob, folder: str, error: Exception) -> MotipError:
    """The error to raise after a failed training.

    By precedence: a worker's permanent error; the report of a lost worker; a MotipError among the causes of ``error``;
    the last line of ``error``. The output of the workers is written to a file, and named beside a lost worker, which
    may be the consequence of another worker's failure.
    """
    lost: MotipError | None = None
    try:
        failure, lost = channel.failure(), channel.lost()
        if failure is not None:
            return _worker_failure(failure, folder)
    except MotipError as dead:
        _log.error("%s", dead)
    path = StageFolder(folder).failure
    write_bytes(path, str(error).encode())
    output = f"{path} (full worker output)"
    if lost is not None:
        fix = f"read the output of the workers first: {output}; {lost.fix}"
        return MotipError(lost.what, where=lost.where, found=lost.found, expected=lost.expected, fix=fix)
    last_line = [type(error).__name__, *filter(None, map(str.strip, str(error).splitlines()))][-1]
    return find_motip_error(error) or MotipError(
        f"training of stage {job.stage} failed: {last_line}",
        where=output,
        fix="the checkpoints so far are kept; run the same command again to resume",
    )


class _ReaderThread:
    """Thread that lets the readers of the event log catch up every half second; a context manager.

    If a reader raises `Stopped`, the workers are requested to stop. A failure is logged once per reason; if the last
    reading fails too, the end of the block raises its error.
    """

    def __init__(self, channel: RemoteChannel, catch_up: Callable[[], None]) -> None:
        self._channel = channel
        self._catch_up = catch_up
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="motip-readers", daemon=True)
        self._error: Exception | None = None

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        last = False
        while not last:
            last = self._over.wait(READ_EVERY_S)
            before, self._error = self._error, None
            try:
                self._read()
            except Exception as error:
                self._error = error
                if repr(error) != repr(before):
                    _log.exception("the events of the training cannot be read yet; training continues")

    def _read(self) -> None:
        try:
            self._catch_up()
        except Stopped:
            self._channel.request_stop()
        for line in self._channel.warnings():
            _log.warning(line)


class RayStore(CheckpointStore):
    """Store of a Ray Train worker: checkpoints go through ray.train.report to Ray Train's folder of the run."""

    def __init__(self, channel: RunChannel, stage: StageFolder, retention: Retention) -> None:
        super().__init__(stage, retention)
        self._channel = channel
        self._temp_dirs = TempDirs(str(stage))

    @contextlib.contextmanager
    def newest(self) -> Iterator[Path | None]:
        """The newest complete checkpoint, downloaded inside the block if it is remote.

        Rank 0 chooses for all ranks: an upload of the previous attempt may complete between the listings of two ranks.
        """
        import ray.train
        import ray.train.collective

        context = ray.train.get_context()
        if context.get_local_rank() == 0:
            self._temp_dirs.remove_stale()
        found = self._stage.checkpoints().latest() if context.get_world_rank() == 0 else None
        chosen = None if found is None else f"{found.parent.name}/{found.name}"
        # The broadcast waits for all ranks: no rank creates a temporary directory before the stale ones are removed.
        name = ray.train.collective.broadcast_from_rank_zero(chosen)
        newest = None if name is None else self._stage.path / name
        if newest is not None and not isinstance(newest, Path):
            newest = download(newest, self._temp_dirs.new("resume") / newest.name)
        yield newest
        self.remove_local_copies()

    def remove_local_copies(self) -> None:
        """Remove this rank's temporary directories; Ray Train removes those that it still uploads."""
        self._temp_dirs.clear()

    def folder(self, name: str) -> Path:
        return self._temp_dirs.new(name, keep=name.startswith("step_"))

    def step_done(self, step: int, folder: Path | None, wait: bool) -> None:
        import ray.train

        # ASYNC uploads while training continues; Ray lists a checkpoint once complete, and removes the local copy.
        mode = ray.train.CheckpointUploadMode.SYNC if wait else ray.train.CheckpointUploadMode.ASYNC
        ray.train.report(
            {"step": step},
            checkpoint=None if folder is None else ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=step_folder(step),
            checkpoint_upload_mode=mode,
            checkpoint_upload_fn=self._upload,
            delete_local_checkpoint_after_upload=True,
        )
        if folder is not None:
            # The newest may still be uploading, so one more than configured is kept.
            drop_steps(self._stage, self._retention.steps + 1)

    def epoch_done(self, epoch: int, metrics: dict[str, float], folder: Path | None) -> None:
        import ray.train

        # Every rank reports, rank 0 with the files; Ray Train lists the epoch once its folder is in the storage.
        checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_dir_name=epoch_folder(epoch),
            checkpoint_upload_fn=self._upload,
        )
        self.remove_local_copies()
        if folder is not None:
            drop_steps(self._stage, 1)
            drop_epochs(self._stage, self._retention)

    def preemption(self) -> str:
        import ray.train

        info = ray.train.get_preemption_info()
        return "" if info is None else f"preemption of {', '.join(sorted(info.preempted_node_ids))}"

    def _upload(self, checkpoint: Any, name: str) -> Any:
        """Upload function for Ray Train, whose own would leave partial files after an interruption."""
        import ray.train

        try:
            store_folder(Path(checkpoint.path), self._stage.path / name, self._log_retry)
        except MotipError as error:
            # Reported here too: an error in the upload thread does not reach the training loop.
            self._channel.report_failure(error, traceback.format_exc())
            raise
        storage = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(storage.build_checkpoint_path_from_name(name), storage.storage_filesystem)

    def _log_retry(self, text: str) -> None:
        _log.warning(text)
        self._channel.send(Note(text))
