"""Checkpoint stores: the newest checkpoint to resume from, and where new ones go; in a local folder or through Ray."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from motip.errors import MotipError
from motip.events import Note
from motip.stage_folder import StageFolder, epoch_folder, step_folder
from motip.storage.paths import download
from motip.train.checkpoints import store_folder
from motip.train.retention import Retention, drop_epochs, drop_steps
from motip.train.run_channel import RunChannel
from motip.train.temp_dirs import TempDirs

_log = logging.getLogger(__name__)


class FolderStore:
    """Store of a training without Ray: checkpoints are written to the stage's folder directly."""

    def __init__(self, stage: StageFolder, retention: Retention | None = None) -> None:
        self._stage = stage
        self._retention = retention or Retention()

    @contextlib.contextmanager
    def newest(self) -> Iterator[Path | None]:
        """The newest complete checkpoint, of an epoch or of a position inside one."""
        found = self._stage.checkpoints().latest()
        yield found if isinstance(found, Path) else None

    def folder(self, name: str) -> Path:
        path = Path(str(self._stage)) / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def step_done(self, step: int, folder: Path | None, wait: bool) -> None:
        if folder is not None:
            drop_steps(self._stage, self._retention.steps)

    def epoch_done(self, epoch: int, metrics: dict[str, float], folder: Path | None) -> None:
        if folder is not None:
            drop_steps(self._stage, 0)
            drop_epochs(self._stage, self._retention)

    def preemption(self) -> str:
        return ""


class RayStore:
    """Store of a Ray Train worker: checkpoints go through ray.train.report.

    Args:
        stage: Ray Train's folder of the run, where the checkpoints are stored.
        retention: the checkpoints to keep.
    """

    def __init__(self, channel: RunChannel, stage: StageFolder, retention: Retention) -> None:
        self._channel = channel
        self._stage = stage
        self._retention = retention
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
