"""A stage on Ray Train: workers, batches from Ray Data, checkpoints, and the way back to the driver."""

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

from motip.cluster import OWN, Cluster
from motip.config import Config
from motip.data.stream import data_resources
from motip.errors import MotipError, find_motip_error
from motip.storage.atomic_filesystem import whole_files
from motip.storage.paths import RemotePath, fetch, location, write_bytes
from motip.train.batch_sources import LocalFeed, RayFeed
from motip.train.checkpoints import store_folder
from motip.train.collectives import SingleProcess, current_communicator
from motip.train.loop import run_stage
from motip.train.preemption import GRACE_S, PassedOn, Stopped
from motip.train.retention import Retention, drop_epochs, drop_steps, held
from motip.train.run_channel import Mailbox
from motip.train.stage_job import StageJob
from motip.train.temp_dirs import Scratch

_log = logging.getLogger(__name__)

OnRecord = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Placement:
    """How a stage is laid over the cluster.

    Attributes:
        workers: training workers; 0 trains in this process, without Ray.
        least_workers: the cluster may have room for only so many, and training goes on; None: always `workers`.
        cpus: CPUs reserved per training worker.
        decoders: decoding actors per training worker.
        decoder_cpus: CPUs reserved per decoding actor.
        gpu: one GPU per worker.
        runs: trainings that share the machines at a time; the threads of its cores are divided among them.
    """

    workers: int
    cpus: float = 1.0
    decoders: int = 1
    decoder_cpus: float = 0.5
    gpu: bool = False
    least_workers: int | None = None
    runs: int = 1


@dataclass
class FitResult:
    """Epochs that were completed, and where the checkpoints lie of those whose weights are kept."""

    epochs: dict[int, dict[str, float]] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    checkpoints: dict[int, str] = field(default_factory=dict)


def place(workers: int, config: Config, cluster: Cluster, least: int | None = None) -> Placement:
    """Share the cluster out among training workers and their decoding actors, or refuse with the arithmetic.

    Args:
        least: workers that must fit now; the others may find room later. None: all must.

    Raises:
        MotipError: more workers than GPUs or CPUs allow.
    """
    gpu = config.DEVICE != "cpu" and cluster.gpus >= 1
    if least is not None:
        return _place_between(least, workers, config, cluster, gpu)
    if gpu and workers > cluster.gpus:
        raise MotipError(
            "more training workers than GPUs",
            where="--workers",
            found=f"{workers} workers",
            expected=f"at most {cluster.gpus:g} (one GPU each)",
            fix=f"use --workers {int(cluster.gpus)} or add nodes",
        )
    shares = data_resources(cluster.cpus, workers, config.NUM_WORKERS, node_cpus=cluster.node_cpus)
    return Placement(workers, shares.worker_cpus, shares.actors_per_worker, shares.actor_cpus, gpu)


def _place_between(least: int, most: int, config: Config, cluster: Cluster, gpu: bool) -> Placement:
    """Ray counts how many workers fit by what one worker reserves, so that must bound them, with decoding and all."""
    if not gpu:
        if cluster.cpus < least:
            raise MotipError(
                "fewer CPUs than the least number of workers",
                where="--workers",
                found=f"{cluster.cpus:g} CPUs",
                expected=f"{least} (without GPUs each worker of a range takes one and decodes its own clips)",
                fix=f"use --workers {max(1, int(cluster.cpus))}:{most} or add nodes",
            )
        return Placement(most, decoders=0, least_workers=least)
    now = min(most, int(cluster.gpus))
    if now < least:
        raise MotipError(
            "fewer GPUs than the least number of workers",
            where="--workers",
            found=f"{cluster.gpus:g} GPUs",
            expected=f"{least} (one GPU each)",
            fix=f"use --workers {now}:{most} or add nodes",
        )
    return replace(place(now, config, cluster), workers=most, least_workers=least)


def fit(job: StageJob, placement: Placement, folder: str, on_record: OnRecord) -> FitResult:
    """Train a stage to its last epoch; an interrupted run of the same ``folder`` goes on where it was.

    Args:
        folder: the stage's own folder or URI; checkpoints are written to ``<folder>/epoch_<n>/checkpoint_<n>.pth``.
        on_record: called in this process with everything the training has to say (`step`, `epoch`, `scores`, …). Where
            it raises `Stopped`, the training saves its position and ends.

    Raises:
        Stopped: it was told to end before its last epoch; its position is saved.
        MotipError: the stage's inputs are wrong, or training failed for another reason that is named.
    """
    if placement.workers == 0:
        _fit_here(job, folder, on_record)
    else:
        _fit_on_ray(job, placement, folder, on_record)
    return completed(folder)


def completed(folder: str) -> FitResult:
    """The finished epochs of a stage's folder, whichever attempt trained them; `checkpoints` has those kept."""
    result = FitResult()
    for each in held(location(folder)).epochs:
        result.epochs[each.epoch] = each.metrics
        result.steps[each.epoch] = each.step
        if each.weights is not None:
            result.checkpoints[each.epoch] = str(each.weights)
    return result


def pick_device(config: Config) -> torch.device:
    """CUDA where it is wanted and there, else the CPU."""
    wanted = config.DEVICE in ("cuda", "auto") and torch.cuda.is_available()
    return torch.device("cuda" if wanted else "cpu")


class FolderReporter:
    """Checkpoints in a local folder, records to a callback: training without Ray."""

    def __init__(self, folder: Path, on_record: OnRecord, kept: Retention | None = None) -> None:
        self._folder = folder
        self._on_record = on_record
        self._kept = kept or Retention()

    def latest(self) -> Path | None:
        """The newest of the finished epochs and the positions inside epochs; what is half-written is neither."""
        found = held(self._folder).latest()
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
            drop_steps(self._folder, self._kept.steps)

    def began_with(self, world: int) -> int:
        return world

    def notice(self) -> str:
        return ""

    def lost(self, problem: MotipError) -> None:
        self._on_record("note", {"text": problem.render()})

    def asked_to_stop(self) -> bool:
        return False

    def epoch_done(self, epoch: int, metrics: dict[str, float], folder: Path | None) -> None:
        if folder is not None:
            drop_steps(self._folder, 0)
            drop_epochs(self._folder, self._kept)


def _retention(job: StageJob, config: Config) -> Retention:
    return Retention(config.CHECKPOINTS_KEPT, config.EPOCH_CHECKPOINTS_KEPT, job.best)


def _fit_here(job: StageJob, folder: str, on_record: OnRecord) -> None:
    if isinstance(location(folder), RemotePath):
        raise MotipError(
            "without Ray workers a stage can only write to a local folder",
            where="--storage",
            found=folder,
            fix="use --workers 1 or more, or a local --storage",
        )
    config = Config.from_dict(job.config)
    reporter = FolderReporter(Path(folder), on_record, _retention(job, config))
    run_stage(job, SingleProcess(), LocalFeed(job, config), reporter, pick_device(config))


# ------------------------------------------------------------------------------------------------ on Ray


class RayReporter:
    """Checkpoints through ray.train.report, records through the mailbox.

    Args:
        folder: where the checkpoints go, Ray Train's folder of the run.
        kept: what stays of them.
    """

    def __init__(self, mailbox: Any, folder: str, kept: Retention) -> None:
        self._mailbox = mailbox
        self._folder = location(folder)
        self._kept = kept
        self._scratch = Scratch(folder)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, copied where it is remote. Rank 0 looks for all: what an upload of the attempt
        before may finish meanwhile must not be there for one rank and not for another."""
        import ray.train
        import ray.train.collective

        context = ray.train.get_context()
        if context.get_local_rank() == 0:
            self._scratch.sweep()
        found = held(self._folder).latest() if context.get_world_rank() == 0 else None
        mine = None if found is None else f"{found.parent.name}/{found.name}"
        # Waits for all ranks, so nobody has a folder yet that another could sweep away.
        name = ray.train.collective.broadcast_from_rank_zero(mine)
        if name is None:
            return None
        newest = self._folder / name
        return newest if isinstance(newest, Path) else fetch(newest, self._scratch.new("resume") / newest.name)

    def loaded(self) -> None:
        self.leave()

    def leave(self) -> None:
        """Remove this rank's local copies; those that Ray Train still uploads it removes itself."""
        self._scratch.clear()

    def record(self, kind: str, values: dict[str, Any]) -> None:
        import ray

        ray.get(self._mailbox.put.remote(kind, values))

    def folder(self, name: str) -> Path:
        return self._scratch.new(name, given_away=name.startswith("step_"))

    def step_done(self, step: int, folder: Path | None, wait: bool) -> None:
        import ray.train

        # Uploaded while training goes on; Ray lists a checkpoint only once it is whole, and removes the local copy.
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
            # The newest may still be on its way, so one more than asked for stays.
            drop_steps(self._folder, self._kept.steps + 1)

    def began_with(self, world: int) -> int:
        import ray

        return int(ray.get(self._mailbox.began_with.remote(world)))

    def notice(self) -> str:
        import ray.train

        told = ray.train.get_preemption_info()
        return "" if told is None else f"preemption of {', '.join(sorted(told.preempted_node_ids))}"

    def lost(self, problem: MotipError) -> None:
        import ray

        ray.get(self._mailbox.lose.remote(problem))

    def asked_to_stop(self) -> bool:
        import ray

        return bool(ray.get(self._mailbox.stop_asked.remote()))

    def epoch_done(self, epoch: int, metrics: dict[str, float], folder: Path | None) -> None:
        import ray.train

        # [3] Ray Train lists the epoch once its folder lies in the stage's storage; every rank reports, rank 0 brings
        # the files.
        checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_dir_name=f"epoch_{epoch:03d}",
            checkpoint_upload_fn=self._store,
        )
        self.leave()
        if folder is not None:
            drop_steps(self._folder, 1)
            drop_epochs(self._folder, self._kept)

    def _store(self, checkpoint: Any, name: str) -> Any:
        """Ray Train's own copying puts files one after the other, so a cut leaves halves; ours puts whole ones."""
        import ray.train

        try:
            store_folder(Path(checkpoint.path), self._folder / name, self._stumbled)
        except MotipError as error:
            # Told here too: in the background there is nobody above who would.
            self._give_up(error)
            raise
        storage = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(storage.build_checkpoint_path_from_name(name), storage.storage_filesystem)

    def _stumbled(self, text: str) -> None:
        _log.warning(text)
        self.record("note", {"text": text})

    def _give_up(self, error: MotipError) -> None:
        import ray

        ray.get(self._mailbox.give_up.remote(error, traceback.format_exc()))


LASTING_ERRORS: tuple[type[Exception], ...] = (
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
"""Errors that come again however often the workers are restarted: wrong input, or a defect of the program."""


def _worker(settings: dict[str, Any]) -> None:
    """What each training worker runs."""
    import ray

    mailbox = settings["mailbox"]
    if not ray.get(mailbox.worker_begins.remote()):
        return  # restarted by Ray after an error that would only come again; the driver raises it
    try:
        _train(settings["job"], settings["placement"], mailbox, settings["folder"])
    except Stopped:
        # Every rank ends like this, its position saved; an error would make Ray start the workers again.
        ray.get(mailbox.stopped.remote())
    except LASTING_ERRORS as error:
        told = error if isinstance(error, MotipError) else MotipError(f"{type(error).__name__}: {error}")
        ray.get(mailbox.give_up.remote(told, traceback.format_exc()))
        raise


def _train(job: StageJob, placement: Placement, mailbox: Any, folder: str) -> None:
    import ray.train
    import ray.train.torch

    config = Config.from_dict(job.config)
    # [1] Ray Train has set up the process group.
    comm = current_communicator(config.COLLECTIVE_TIMEOUT_S)
    if placement.gpu:
        device = ray.train.torch.get_device()
    else:
        device = torch.device("cpu")
        here = ray.train.get_context().get_local_world_size()
        torch.set_num_threads(max(1, _cores() // (here * placement.runs)))
    # [2] The batches come from Ray Data, this rank's rows of the clip plan in order.
    feed = RayFeed(job, config, comm.rank, comm.world_size, placement.decoders, placement.decoder_cpus)
    reporter = RayReporter(mailbox, folder, _retention(job, config))
    try:
        run_stage(job, comm, feed, reporter, device)
    finally:
        reporter.leave()


def _cores() -> int:
    """Cores that this process may use: more threads than that would wait for each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fit_on_ray(job: StageJob, placement: Placement, folder: str, on_record: OnRecord) -> None:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's own node: as long as the driver lives, so does what the workers told it.
    beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=beside).remote()
    parent, _, name = folder.rpartition("/")
    # [4] One run name per set of inputs: a stale run of other inputs can never be resumed by accident.
    trainer = _trainer_class()(
        _worker,
        train_loop_config={"job": job, "placement": placement, "mailbox": mailbox, "folder": folder},
        # [5] A worker that does not answer ends the wait of the others, instead of half an hour of silence.
        torch_config=TorchConfig(timeout_s=int(job.config["COLLECTIVE_TIMEOUT_S"])),
        scaling_config=ScalingConfig(**_scaling(placement, int(job.config["RESIZE_EVERY_S"]))),
        run_config=RunConfig(
            name=name,
            # Plain paths in a file system of ours: Ray's own list of checkpoints is written with the same patience.
            storage_path=parent.removeprefix("s3://"),
            storage_filesystem=whole_files(remote=isinstance(location(folder), RemotePath)),
            failure_config=FailureConfig(max_failures=int(job.config["WORKER_RESTARTS"])),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )
    listening = _listening(mailbox, on_record)
    with _passing_on(mailbox) as sigterm, listening, _interruptible():
        try:
            trainer.fit()
        except Exception as error:
            _raise_told(mailbox, folder)
            told = _failed(job, folder, error, str(error))  # what all workers said is kept in any case
            raise _why(mailbox, error, told) or told from error
        _raise_told(mailbox, folder)
        if sigterm.given or listening.ended:
            raise Stopped


def _trainer_class() -> Any:
    """TorchTrainer, without the actor that looks after left placement groups on a Ray that `connect` started.

    That actor asks the dashboard's server whether the controller lives. Such a Ray has none, and a stage would wait for
    the answer at its end, for 12 s; what a controller that is killed leaves behind goes when the driver ends.
    """
    from ray.train.torch import TorchTrainer

    if OWN not in os.environ:
        return TorchTrainer

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]
            return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]

    return Trainer


def _scaling(placement: Placement, resize_every_s: int) -> dict[str, Any]:
    """With a range Ray looks now and then how many workers fit, and starts that many from the newest checkpoint."""
    least = placement.least_workers
    return {
        "num_workers": placement.workers if least is None else (least, placement.workers),
        "elastic_resize_monitor_interval_s": float(resize_every_s),
        "use_gpu": placement.gpu,
        "resources_per_worker": {"CPU": placement.cpus, **({"GPU": 1} if placement.gpu else {})},
    }


def _passing_on(mailbox: Any) -> PassedOn:
    """SIGTERM of the driver, as `ray job stop` sends it, to the workers."""
    import ray

    def too_late() -> None:
        reached = ray.get(mailbox.reached.remote())
        text = f"SIGTERM: training did not end within {GRACE_S:.0f} s: {reached}; the checkpoints so far are kept"
        _log.error(text)
        ray.get(mailbox.put.remote("note", {"text": text}))

    return PassedOn(lambda: ray.get(mailbox.stop.remote()), too_late)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C as KeyboardInterrupt: Ray Train sets a handler of its own, which leaves by SystemExit and stays set."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _raise_told(mailbox: Any, folder: str) -> None:
    """Raise what a worker gave up on, if any; a defect of the program comes with its traceback in a file."""
    import ray

    told = ray.get(mailbox.failure.remote())
    if told is None:
        return
    error, text = told
    if error.where is None and error.fix is None:
        place = location(folder) / "failure.txt"
        write_bytes(place, text.encode())
        raise MotipError(error.what, where=f"{place} (traceback)", fix="this is a defect of the program: report it")
    raise error


def _why(mailbox: Any, error: BaseException, told: MotipError) -> MotipError | None:
    """Why the last attempt ended, in our own words where there are any.

    A worker that waits in vain may be the consequence of another's failure, so the workers' own words are named too.
    """
    import ray

    lost: MotipError | None = ray.get(mailbox.lost.remote())
    if lost is None:
        return find_motip_error(error)
    fix = f"read first what all workers said: {told.where}; {lost.fix}"
    return MotipError(lost.what, where=lost.where, found=lost.found, expected=lost.expected, fix=fix)


def _failed(job: StageJob, folder: str, error: BaseException, text: str) -> MotipError:
    place = location(folder) / "failure.txt"
    write_bytes(place, text.encode())
    return MotipError(
        f"training of stage {job.stage} failed: {_last_line(error)}",
        where=f"{place} (all that the workers said)",
        fix="the checkpoints so far are kept; run the same command again to go on",
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _listening:
    """Fetch the mailbox's records every half second, in order, until the block ends; a record that cannot be handled
    is an error at its end."""

    def __init__(self, mailbox: Any, on_record: OnRecord) -> None:
        self._mailbox = mailbox
        self._on_record = on_record
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.ended = False
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

        while True:
            last = self._stop.is_set()
            records: list[tuple[str, dict[str, Any]]] = []
            with self._kept():
                records = ray.get(self._mailbox.drain.remote())
            for kind, values in records:
                with self._kept():
                    self._on_record(kind, values)
            if last:
                return
            time.sleep(0.5)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Said at once, raised at the end: a full disk on the driver must not cost hours of training, nor one record
        the others."""
        try:
            yield
        except Stopped:
            import ray

            ray.get(self._mailbox.stop.remote())
            self.ended = True
        except Exception as error:
            if self._error is None:
                _log.error("what the training says cannot be recorded: %s", error)
            self._error = self._error or error
